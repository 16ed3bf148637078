"""Your own logs as a source: `interactions`, `users` and `videos` tables as .csv, .tsv, .jsonl or .parquet files.

Columns have the names of `records.SCHEMAS`, or are mapped with `source.columns.OUR_NAME=THEIR_NAME`. Only
`interactions` is required, with `user_id`, `video_id`, and what its task needs:

- task: the `task` column (`sequential` or `click`) if there is one. Otherwise a row with a `page_id` is a click row;
  else one with a play rate or watch time is sequential; else one with `clicked` is a click row.
- play_rate: the column if there is one, else `watch_s` / `duration_s`, where the duration is a column of `interactions`
  or of `videos`. It is capped at 1. A sequential row without a play rate is useless and is rejected.
- A duration or gap column that is mapped to a name ending in `_ms` is in milliseconds and is divided by 1,000.
- timestamp: seconds, ms, us or ns since 1970 (told apart by size), or ISO 8601 text (UTC if it has no zone).
- prev_op_gap_s, next_op_gap_s: the columns if the log has them; else unknown, since a log rarely holds every operation
  of a user. To declare that yours does, map both to your timestamp column: they become the times between a user's rows.
- users: other columns become facts (`User.other`), beside those of the column `other`, a map or a JSON object.
- videos: `uri` and `cover_uri` may be relative to the folder; a file `STEM.mp4` in `source.videos_dir` belongs to the
  video STEM.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.formats import open_table
from gubs.data.sources.media import VIDEO_SUFFIXES, media_paths
from gubs.data.sources.reading import Column, Sheet, assemble, build, codes, duplicated, facts, joined, read_sheet
from gubs.errors import InputError
from gubs.records import Task

_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
_GAPS = ("prev_op_gap_s", "next_op_gap_s")
_IN_SECONDS = ("duration_s", "watch_s", *_GAPS)

PERCENT_ABOVE = 1.5
"""If half of the play rates are above this, they are percentages or times, not shares."""

_USERS = (
    Column("user_id", "id", nullable=False),
    Column("age", "integer", optional=True, minimum=0, maximum=130),
    Column("gender", optional=True),
    Column("occupation", optional=True),
    Column("other", optional=True),
    Column("tags", "texts", optional=True),
)
_VIDEOS = (
    Column("video_id", "id", nullable=False),
    Column("title", optional=True),
    Column("duration_s", "number", optional=True, minimum=0),
    Column("uri", optional=True),
    Column("cover_uri", optional=True),
    Column("tags", "texts", optional=True),
)
_INTERACTIONS = (
    Column("interaction_id", "id", optional=True, nullable=False),
    Column("user_id", "id", nullable=False),
    Column("video_id", "id", nullable=False),
    Column("task", optional=True),
    Column("timestamp", "time", optional=True),
    Column("page_id", "id", optional=True),
    Column("position", "integer", optional=True, minimum=0, maximum=2**31 - 1),
    Column("watch_s", "number", optional=True, minimum=0),
    Column("duration_s", "number", optional=True, minimum=0),
    Column("play_rate", "number", optional=True, minimum=0),
    Column("clicked", "flag", optional=True),
    Column("liked", "flag", optional=True),
    Column("disliked", "flag", optional=True),
    Column("dislike_reason", optional=True),
    Column("rating", "number", optional=True, minimum=0, maximum=5),
    Column("prev_op_gap_s", "number", optional=True, minimum=0),
    Column("next_op_gap_s", "number", optional=True, minimum=0),
    Column("exited_app", "flag", optional=True),
)


@dataclass
class _Log:
    sheet: Sheet
    columns: frozenset[str]
    """Our names of the columns that the file has."""
    notes: list[str]


def read(settings: SourceSettings) -> SourceTables:
    """Reads your logs; `source.path` is their folder, or the interactions' file alone.

    Raises:
        InputError: no interactions, a file or column that cannot be used, or a setting that fits no column.
    """
    path = Path(settings.path)
    folder = path.parent if path.is_file() else path
    files = {name: _find(folder, name) for name in ("users", "videos")}
    main = path if path.is_file() else _find(folder, "interactions")
    if main is None:
        names = ", ".join(f"interactions{suffix}" for suffix in _SUFFIXES)
        raise InputError(f"{folder}: no interactions file; put one there: {names}")
    _check_mapping(settings.columns, [main, *(f for f in files.values() if f)])
    log = _read_log(main, settings)
    sheets, users, videos = [log.sheet], None, None
    if files["users"]:
        sheet, users = _read_users(files["users"], settings)
        sheets.append(sheet)
    if files["videos"]:
        sheet, videos = _read_videos(files["videos"], folder, settings)
        sheets.append(sheet)
    interactions = _interactions(log, videos, settings)
    tables = assemble(users, videos, interactions, sheets, log.notes)
    tables.videos = _attach(tables.videos, settings.videos_dir, tables.notes)
    return tables


def _find(folder: Path, name: str) -> Path | None:
    matches = [p for s in _SUFFIXES if (p := folder / (name + s)).is_file()]
    if len(matches) > 1:
        raise InputError(f"{folder}: has both {matches[0].name} and {matches[1].name}; keep one of them")
    return matches[0] if matches else None


def _check_mapping(columns: dict[str, str], files: Sequence[Path]) -> None:
    names = sorted({c.name for c in (*_USERS, *_VIDEOS, *_INTERACTIONS)})
    headers = {name for f in files for name in open_table(f).header}
    for ours, theirs in columns.items():
        if ours not in names:
            raise InputError(f"source.columns.{ours}: no such column of ours; they are {', '.join(names)}")
        if theirs not in headers:
            raise InputError(
                f"source.columns.{ours}={theirs}: none of {', '.join(f.name for f in files)} has a column {theirs!r} "
                f"in row 1; write its name as it is in the file"
            )


def _mapped(columns: Sequence[Column], mapping: dict[str, str]) -> list[Column]:
    """The columns with the names that the files may use: the mapped one, else our own."""
    return [replace(c, source=(mapping[c.name], c.name)) if c.name in mapping else c for c in columns]


def _to_seconds(sheet: Sheet, mapping: dict[str, str]) -> None:
    """Converts columns that are mapped to a `..._ms` column from milliseconds."""
    for name in _IN_SECONDS:
        if name in sheet.table.column_names and mapping.get(name, name).endswith("_ms"):
            _replace(sheet, name, pc.divide(sheet.column(name), 1000.0))


def _replace(sheet: Sheet, name: str, column: pa.ChunkedArray) -> None:
    sheet.table = sheet.table.set_column(sheet.table.column_names.index(name), name, column)


def _read_log(path: Path, settings: SourceSettings) -> _Log:
    header = open_table(path).header
    derived = frozenset(_GAPS) if _is_complete(settings.columns) else frozenset()
    columns = _mapped([c for c in _INTERACTIONS if c.name not in derived], settings.columns)
    sheet = read_sheet(path, columns, settings.max_bad_rows)
    _to_seconds(sheet, settings.columns)
    present = frozenset(c.name for c in columns if any(n in header for n in c.names))
    notes = [f"No column {name!r}: {lost}." for name, lost in _LOSSES.items() if name not in present | derived]
    if sheet.unused:
        notes.append(f"Columns of {path.name} that are not used: {', '.join(sheet.unused)}.")
    _reject_repeats(sheet, present, notes)
    return _Log(sheet, present, notes)


_LOSSES = {
    "timestamp": "the rows are taken to be in order of time, and repeated rows cannot be told from repeated views",
    "prev_op_gap_s": "the time since a user's previous operation is unknown, and the noise filter cannot use it",
    "next_op_gap_s": "the time until a user's next operation is unknown, and the noise filter cannot use it",
    "exited_app": "whether the user left the app is unknown, and the noise filter cannot use it",
}


def _is_complete(mapping: dict[str, str]) -> bool:
    """Whether both gaps are mapped to the timestamp's column, which declares that the log holds every operation."""
    return {mapping.get(name) for name in _GAPS} == {mapping.get("timestamp", "timestamp")}


def _reject_repeats(sheet: Sheet, columns: frozenset[str], notes: list[str]) -> None:
    if "interaction_id" in columns:
        sheet.reject_duplicates("interaction_id")
    if "timestamp" in columns:
        if untimed := sheet.column("timestamp").null_count:
            notes.append(f"{untimed} interactions have no time.")
        key = [sheet.column(n) for n in ("user_id", "video_id", "timestamp")]
        timed = np.asarray(sheet.column("timestamp").is_valid())
        sheet.reject(duplicated(key) & timed, "duplicate", "timestamp")


def _interactions(log: _Log, videos: pa.Table | None, settings: SourceSettings) -> pa.Table:
    sheet = log.sheet
    if _is_complete(settings.columns):
        _add_gaps(log)
    _replace(sheet, "play_rate", _play_rates(log, videos))
    _add_tasks(log)
    _reject_unlabelled(log)
    if "interaction_id" not in log.columns:
        _replace(sheet, "interaction_id", joined(pa.chunked_array([pa.array(sheet.lines)])))
    columns = dict(zip(sheet.table.column_names, sheet.table.columns, strict=True))
    return build("interactions", sheet.table.num_rows, **columns)


def _play_rates(log: _Log, videos: pa.Table | None) -> pa.ChunkedArray:
    """The watched share of each video, from the log or computed; null if it is unknown."""
    table = log.sheet.table
    durations = table["duration_s"]
    if videos is not None:
        rows = pc.index_in(table["video_id"], value_set=videos["video_id"].combine_chunks())
        durations = pc.coalesce(durations, pc.take(videos["duration_s"], rows))
    positive = pc.if_else(pc.greater(durations, 0), durations, None)
    rates = pc.coalesce(table["play_rate"], pc.divide(table["watch_s"], positive))
    given = table["play_rate"].drop_null()
    if len(given) and pc.quantile(given, 0.5)[0].as_py() > PERCENT_ABOVE:
        raise InputError(
            f"{log.sheet.label}: column 'play_rate': half of the values are above {PERCENT_ABOVE:g} (row "
            f"{log.sheet.lines[0]} has {table['play_rate'][0].as_py()}); give the watched share of the video, 0 to 1"
        )
    if over := pc.sum(pc.greater(rates, 1)).as_py():
        log.notes.append(f"{over} play rates above 1 (repeated views) are capped at 1.")
    capped = pc.min_element_wise(rates, 1.0, skip_nulls=False)
    return capped if isinstance(capped, pa.ChunkedArray) else pa.chunked_array([capped])


def _add_tasks(log: _Log) -> None:
    sheet, t = log.sheet, log.sheet.table
    watched = pc.or_(t["play_rate"].is_valid(), t["watch_s"].is_valid())
    inferred = pc.if_else(t["clicked"].is_valid(), Task.CLICK.value, None)
    inferred = pc.if_else(watched, Task.SEQUENTIAL.value, inferred)
    inferred = pc.if_else(t["page_id"].is_valid(), Task.CLICK.value, inferred)
    given = pc.utf8_lower(t["task"])
    if "task" in log.columns:
        valid = pc.or_(pc.is_in(given, value_set=pa.array([task.value for task in Task])), pc.is_null(given))
        sheet.reject(pc.invert(valid), "unknown task", "task", malformed=True)
        given, inferred = given.filter(valid), inferred.filter(valid)
    _replace(sheet, "task", pc.coalesce(given, inferred))


def _reject_unlabelled(log: _Log) -> None:
    sheet = log.sheet
    before = sheet.table.num_rows
    sheet.reject(sheet.column("task").is_null(), "no task", "user_id")
    sequential = pc.equal(sheet.column("task"), Task.SEQUENTIAL.value)
    sheet.reject(pc.and_(sequential, sheet.column("play_rate").is_null()), "no play rate", "watch_s")
    click = pc.equal(sheet.column("task"), Task.CLICK.value)
    sheet.reject(pc.and_(click, sheet.column("clicked").is_null()), "no click known")
    if before and not sheet.table.num_rows:
        causes = ", ".join(f"{n} {cause}" for cause, n in sheet.rejected.items())
        raise InputError(
            f"{sheet.label}: every row was rejected ({causes}; the first is row {sheet.rejects[0]['row'][0]}). Give "
            f"the columns 'play_rate', or 'watch_s' and 'duration_s', for sequential views, or 'clicked' for exposures"
        )


def _add_gaps(log: _Log) -> None:
    log.notes.append("The log is declared complete: the gaps are the times between a user's rows.")
    users, times = codes(log.sheet.column("user_id")), log.sheet.column("timestamp")
    if times.null_count:
        raise InputError(
            f"{log.sheet.label}: column 'timestamp': a log that is declared complete must have a time in every row; "
            f"fill them in, or do not map the gaps to it"
        )
    for name, gaps in zip(_GAPS, operation_gaps(users, times.to_numpy()), strict=True):
        log.sheet.table = log.sheet.table.append_column(name, gaps)


def operation_gaps(users: np.ndarray, timestamps: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """Seconds from each row to the user's row before and to the one after; null at a user's first and last row.

    Args:
        users: (n,) a number for each user; rows may be in any order.
        timestamps: (n,) milliseconds since 1970.
    """
    order = np.lexsort((timestamps, users))
    same = users[order][1:] == users[order][:-1]
    steps = np.where(same, np.diff(timestamps[order]) / 1000.0, np.nan)
    before, after = np.full(len(users), np.nan), np.full(len(users), np.nan)
    before[order[1:]] = steps
    after[order[:-1]] = steps
    return pa.array(before, from_pandas=True), pa.array(after, from_pandas=True)


def _read_users(path: Path, settings: SourceSettings) -> tuple[Sheet, pa.Table]:
    columns = _mapped(_USERS, settings.columns)
    ours = {n for c in columns for n in c.names}
    header = open_table(path).header
    more = [n for n in header if n not in ours and n != "other" and not n.startswith("(unnamed")]
    sheet = read_sheet(path, [*columns, *(Column(f"other {n}", source=(n,)) for n in more)], settings.max_bad_rows)
    sheet.reject_duplicates("user_id")
    other = _facts_of_column(sheet)
    t, n = sheet.table, len(sheet.lines)
    filled = {c.name: t[c.name] for c in _USERS}
    filled["other"] = facts(n, other | {name: t[f"other {name}"] for name in more})
    filled["tags"] = _or_empty(t["tags"])
    return sheet, build("users", n, **filled)


def _facts_of_column(sheet: Sheet) -> dict[str, pa.ChunkedArray]:
    """The facts in the column `other`, a map or a JSON object as text; rows where it is neither are rejected."""
    objects = [_json_object(text) for text in sheet.column("other").to_pylist()]
    sheet.reject(np.array([o is None for o in objects], bool), "not a JSON object", "other", malformed=True)
    valid = [o for o in objects if o is not None]
    return {
        name: pa.chunked_array([pa.array([None if o.get(name) is None else str(o[name]) for o in valid], pa.string())])
        for name in dict.fromkeys(name for o in valid for name in o)
    }


def _json_object(text: str | None) -> dict[str, object] | None:
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _read_videos(path: Path, folder: Path, settings: SourceSettings) -> tuple[Sheet, pa.Table]:
    sheet = read_sheet(path, _mapped(_VIDEOS, settings.columns), settings.max_bad_rows)
    sheet.reject_duplicates("video_id")
    _to_seconds(sheet, settings.columns)
    t = sheet.table
    columns = {c.name: t[c.name] for c in _VIDEOS} | {n: _absolute(t[n], folder) for n in ("uri", "cover_uri")}
    columns["duration_s"] = pc.if_else(pc.greater(t["duration_s"], 0), t["duration_s"], None)
    columns["tags"] = _or_empty(t["tags"])
    return sheet, build("videos", t.num_rows, **columns)


def _absolute(paths: pa.ChunkedArray, folder: Path) -> pa.ChunkedArray:
    texts = [p if p is None or "://" in p else str((folder / p).resolve()) for p in paths.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _or_empty(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([x or [] for x in lists.to_pylist()], pa.list_(pa.string()))])


def _attach(videos: pa.Table, videos_dir: str, notes: list[str]) -> pa.Table:
    """Adds the files of `videos_dir` to the records without a `uri`."""
    if videos_dir:
        paths = media_paths(videos["video_id"], [Path(videos_dir)], VIDEO_SUFFIXES, "source.videos_dir")
        uris = pc.coalesce(videos["uri"], paths)
        videos = videos.set_column(videos.schema.get_field_index("uri"), videos.schema.field("uri"), uris)
    if missing := videos["uri"].null_count:
        notes.append(f"{missing} of {videos.num_rows} videos have no video file.")
    return videos
