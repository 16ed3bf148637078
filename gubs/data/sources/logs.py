"""Your own logs as a source: `interactions`, `users` and `videos` tables as .csv, .tsv, .jsonl or .parquet files.

Columns are called as in `records.SCHEMAS`, or mapped with `source.columns.OUR_NAME=THEIR_NAME`. Only `interactions`
must be there, with `user_id`, `video_id`, and what its task needs:

- task: the `task` column (`sequential` or `click`) if there is one. Else a row with a `page_id` is a click row; else
  one with a play rate or watch time is sequential; else one with `clicked` is a click row.
- play_rate: the column if there is one, else `watch_s` / `duration_s`, where the duration is a column of `interactions`
  or of `videos`. It is capped at 1. A sequential row without a play rate cannot say anything and is rejected.
- A duration or time column that is mapped to a name ending in `_ms` is taken for milliseconds and divided by 1,000.
- timestamp: seconds, ms, us or ns since 1970 (told apart by size), or ISO 8601 text (UTC where it has no zone).
- prev_op_gap_s, next_op_gap_s: the columns if there are; else unknown, since a log rarely holds every operation of a
  user. To declare that yours does, map both to your timestamp column: then they are the times between a user's rows.
- users: columns that we do not know become facts (`User.other`), beside those of `other`, a map or a JSON object.
- videos: `uri` and `cover_uri` may be relative to the folder; a file `STEM.mp4` in `source.videos_dir` belongs to the
  video STEM.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.config import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.formats import open_table
from gubs.data.sources.media import VIDEO_SUFFIXES, media_by_stem, paths_of
from gubs.data.sources.reading import (
    Column,
    Sheet,
    assemble,
    build,
    codes,
    duplicated,
    facts,
    joined,
    read_sheet,
)
from gubs.errors import InputError
from gubs.records import Task

_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
_GAPS = ("prev_op_gap_s", "next_op_gap_s")
_IN_SECONDS = ("duration_s", "watch_s", *_GAPS)

PERCENT_ABOVE = 1.5
"""Where half of the play rates are above this, they are percentages or times, not shares."""

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
    """The interactions' file, the columns that it really has, and what is noted of it."""

    sheet: Sheet
    has: frozenset[str]
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
        raise InputError(
            f"{folder}: no interactions file; put one there: interactions{', interactions'.join(_SUFFIXES)}"
        )
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
    found = [p for s in _SUFFIXES if (p := folder / (name + s)).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder}: both {found[0].name} and {found[1].name} are there; keep one of them")
    return found[0] if found else None


def _check_mapping(columns: dict[str, str], files: Sequence[Path]) -> None:
    known = {c.name for c in (*_USERS, *_VIDEOS, *_INTERACTIONS)}
    headers = {name for f in files for name in open_table(f, f.name).header}
    for ours, theirs in columns.items():
        if ours not in known:
            raise InputError(
                f"source.columns.{ours}: no column of ours has that name; known: {', '.join(sorted(known))}"
            )
        if theirs not in headers:
            raise InputError(
                f"source.columns.{ours}={theirs}: none of {', '.join(f.name for f in files)} has a column {theirs!r} "
                f"in row 1; write its name as it is there"
            )


def _mapped(wanted: Sequence[Column], columns: dict[str, str]) -> list[Column]:
    """The columns under the names that the files may use; our own name serves where the mapped one is not there."""
    return [replace(c, source=(columns[c.name], c.name)) if c.name in columns else c for c in wanted]


def _seconds(sheet: Sheet, columns: dict[str, str]) -> None:
    """Brings columns mapped to a `..._ms` column from milliseconds to seconds."""
    for name in _IN_SECONDS:
        if name in sheet.table.column_names and columns.get(name, name).endswith("_ms"):
            place = sheet.table.column_names.index(name)
            sheet.table = sheet.table.set_column(place, name, pc.divide(sheet.table[name], 1000.0))


def _read_log(path: Path, settings: SourceSettings) -> _Log:
    header = open_table(path, path.name).header
    declared = _complete(settings.columns)
    wanted = [c for c in _INTERACTIONS if not (declared and c.name in _GAPS)]
    columns = _mapped(wanted, settings.columns)
    sheet = read_sheet(path, columns, settings.max_bad_rows)
    _seconds(sheet, settings.columns)
    has = frozenset(c.name for c in columns if any(n in header for n in c.names))
    notes = [f"No column {name!r}: {lost}." for name, lost in _LOSSES.items() if name not in has | _derived(declared)]
    if sheet.unused:
        notes.append(f"Columns of {path.name} that are not used: {', '.join(sheet.unused)}.")
    _reject_repeats(sheet, has, notes)
    return _Log(sheet, has, notes)


_LOSSES = {
    "timestamp": "the rows are taken to stand in order of time, and repeated rows cannot be told from repeated views",
    "prev_op_gap_s": "the time since a user's previous operation is unknown, and the noise filter cannot use it",
    "next_op_gap_s": "the time until a user's next operation is unknown, and the noise filter cannot use it",
    "exited_app": "whether the user left the app is unknown, and the noise filter cannot use it",
}


def _complete(columns: dict[str, str]) -> bool:
    """Whether both gaps are mapped to the timestamp's column: the log then holds every operation of its users."""
    return {columns.get(name) for name in _GAPS} == {columns.get("timestamp", "timestamp")}


def _derived(declared: bool) -> frozenset[str]:
    return frozenset(_GAPS) if declared else frozenset()


def _reject_repeats(sheet: Sheet, has: frozenset[str], notes: list[str]) -> None:
    if "interaction_id" in has:
        sheet.reject(duplicated([sheet.column("interaction_id")]), "duplicate", "interaction_id")
    if "timestamp" in has:
        unknown = sheet.column("timestamp").null_count
        if unknown:
            notes.append(f"{unknown} interactions have no time.")
        key = [sheet.column(n) for n in ("user_id", "video_id", "timestamp")]
        timed = np.asarray(sheet.column("timestamp").is_valid())
        sheet.reject(duplicated(key) & timed, "duplicate", "timestamp")


def _interactions(log: _Log, videos: pa.Table | None, settings: SourceSettings) -> pa.Table:
    sheet = log.sheet
    gaps = _all_gaps(sheet, log) if _complete(settings.columns) else {}
    for name, column in gaps.items():
        sheet.table = sheet.table.append_column(name, column)
    sheet.table = sheet.table.append_column("rate", _play_rates(log, videos))
    _add_tasks(log)
    _reject_unlabelled(log)
    table = sheet.table
    ids = table["interaction_id"] if "interaction_id" in log.has else joined(pa.chunked_array([pa.array(sheet.lines)]))
    kept = {n: table[n] for n in table.column_names if n not in ("rate", "duration_s", "interaction_id", "play_rate")}
    return build("interactions", table.num_rows, **kept, interaction_id=ids, play_rate=table["rate"])


def _play_rates(log: _Log, videos: pa.Table | None) -> pa.ChunkedArray:
    """The share of each video that was watched, from the log or computed; null where it cannot be known."""
    table = log.sheet.table
    durations = table["duration_s"]
    if videos is not None:
        place = pc.index_in(table["video_id"], value_set=videos["video_id"].combine_chunks())
        durations = pc.coalesce(durations, pc.take(videos["duration_s"], place))
    positive = pc.if_else(pc.greater(durations, 0), durations, None)
    rates = pc.coalesce(table["play_rate"], pc.divide(table["watch_s"], positive))
    given = table["play_rate"].drop_null()
    if len(given) and pc.quantile(given, 0.5)[0].as_py() > PERCENT_ABOVE:
        raise InputError(
            f"{log.sheet.label}: column 'play_rate': half of the values are above {PERCENT_ABOVE:g} (row "
            f"{log.sheet.lines[0]} has {table['play_rate'][0].as_py()}); give the watched share of the video, 0 to 1"
        )
    over = pc.sum(pc.greater(rates, 1)).as_py() or 0
    if over:
        log.notes.append(f"{over} play rates above 1 (repeated views) are capped at 1.")
    capped = pc.min_element_wise(rates, 1.0, skip_nulls=False)
    return capped if isinstance(capped, pa.ChunkedArray) else pa.chunked_array([capped])


def _add_tasks(log: _Log) -> None:
    sheet, t = log.sheet, log.sheet.table
    watched = pc.or_(t["rate"].is_valid(), t["watch_s"].is_valid())
    inferred = pc.if_else(t["clicked"].is_valid(), Task.CLICK.value, None)
    inferred = pc.if_else(watched, Task.SEQUENTIAL.value, inferred)
    inferred = pc.if_else(t["page_id"].is_valid(), Task.CLICK.value, inferred)
    given = pc.utf8_lower(t["task"])
    if "task" in log.has:
        known = pc.is_in(given, value_set=pa.array([task.value for task in Task]))
        sheet.reject(pc.and_(t["task"].is_valid(), pc.invert(known)), "unknown task", "task", malformed=True)
        keep = pc.or_(known, pc.is_null(given))
        given, inferred = given.filter(keep), inferred.filter(keep)
    place = sheet.table.column_names.index("task")
    sheet.table = sheet.table.set_column(place, "task", pc.coalesce(given, inferred))


def _reject_unlabelled(log: _Log) -> None:
    sheet = log.sheet
    before = sheet.table.num_rows
    sheet.reject(sheet.column("task").is_null(), "no task", "user_id")
    unlabelled = pc.and_(pc.equal(sheet.column("task"), Task.SEQUENTIAL.value), sheet.column("rate").is_null())
    sheet.reject(unlabelled, "no play rate", "watch_s")
    sheet.reject(
        pc.and_(pc.equal(sheet.column("task"), Task.CLICK.value), sheet.column("clicked").is_null()), "no click known"
    )
    if before and not sheet.table.num_rows:
        causes = ", ".join(f"{n} {cause}" for cause, n in sheet.rejected.items())
        raise InputError(
            f"{sheet.label}: no row is left ({causes}; the first is row {sheet.rejects[0]['row'][0]}). Give the "
            f"columns 'play_rate', or 'watch_s' and 'duration_s', for sequential views, or 'clicked' for exposures"
        )


def _all_gaps(sheet: Sheet, log: _Log) -> dict[str, pa.Array]:
    log.notes.append("The log is declared complete: the gaps are the times between a user's rows.")
    if sheet.column("timestamp").null_count:
        raise InputError(f"{sheet.label}: column 'timestamp': a log that is declared complete must have every time")
    users, _ = codes(sheet.column("user_id"))
    return dict(zip(_GAPS, operation_gaps(users, sheet.column("timestamp").to_numpy()), strict=True))


def operation_gaps(users: np.ndarray, timestamps: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """Seconds from each row to the user's row before and to the one after; null at a user's first and last row.

    Args:
        users: (n,) a number for each user; rows may stand in any order.
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
    named = {n for c in columns for n in c.names}
    header = open_table(path, path.name).header
    more = [n for n in header if n not in named and n != "other" and not n.startswith("(unnamed")]
    sheet = read_sheet(path, [*columns, *(Column(f"other {n}", source=(n,)) for n in more)], settings.max_bad_rows)
    sheet.reject(duplicated([sheet.column("user_id")]), "duplicate", "user_id")
    given = _given_facts(sheet)
    t, n = sheet.table, len(sheet.lines)
    known = {c.name: t[c.name] for c in _USERS if c.name not in ("tags", "other")}
    other = facts(n, given | {name: t[f"other {name}"] for name in more})
    return sheet, build("users", n, **known, other=other, tags=_or_empty(t["tags"]))


def _given_facts(sheet: Sheet) -> dict[str, pa.ChunkedArray]:
    """The facts of a column `other` that is a map, or a JSON object as text; rows where it is neither are rejected."""
    found: list[Any] = [_json(text) for text in sheet.column("other").to_pylist()]
    good = np.array([isinstance(f, dict) for f in found], bool)
    sheet.reject(~good, "not a JSON object", "other", malformed=True)
    kept = [f for f in found if isinstance(f, dict)]
    names = dict.fromkeys(name for f in kept for name in f)
    return {n: pa.chunked_array([pa.array([_text(f.get(n)) for f in kept], pa.string())]) for n in names}


def _json(text: str | None) -> Any:
    try:
        return {} if text is None else json.loads(text)
    except json.JSONDecodeError:
        return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _read_videos(path: Path, folder: Path, settings: SourceSettings) -> tuple[Sheet, pa.Table]:
    sheet = read_sheet(path, _mapped(_VIDEOS, settings.columns), settings.max_bad_rows)
    sheet.reject(duplicated([sheet.column("video_id")]), "duplicate", "video_id")
    _seconds(sheet, settings.columns)
    t = sheet.table
    durations = pc.if_else(pc.greater(t["duration_s"], 0), t["duration_s"], None)
    known = {c.name: t[c.name] for c in _VIDEOS} | {n: _absolute(t[n], folder) for n in ("uri", "cover_uri")}
    return sheet, build("videos", t.num_rows, **(known | {"duration_s": durations, "tags": _or_empty(t["tags"])}))


def _absolute(paths: pa.ChunkedArray, folder: Path) -> pa.ChunkedArray:
    texts = [p if p is None or "://" in p else str((folder / p).resolve()) for p in paths.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _or_empty(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([x or [] for x in lists.to_pylist()], pa.list_(pa.string()))])


def _attach(videos: pa.Table, videos_dir: str, notes: list[str]) -> pa.Table:
    """Gives the videos of `videos_dir` to the records that have no `uri` of their own."""
    if videos_dir:
        found = media_by_stem([Path(videos_dir)], VIDEO_SUFFIXES, "source.videos_dir")
        uris = pc.coalesce(videos["uri"], paths_of(videos["video_id"], found))
        videos = videos.set_column(videos.schema.get_field_index("uri"), videos.schema.field("uri"), uris)
    missing = videos["uri"].null_count
    if missing:
        notes.append(f"{missing} of {videos.num_rows} videos have no video file.")
    return videos
