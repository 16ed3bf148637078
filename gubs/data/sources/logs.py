"""Your own logs as a source: `interactions`, `users` and `videos` tables as .csv, .tsv, .jsonl or .parquet files.

docs/your-own-logs.md has the rules with an example of each. Columns have the names of `records.SCHEMAS`, or are mapped
with `source.columns.OUR_NAME=THEIR_NAME`. Only `interactions` is required, with `user_id`, `video_id`, and what its
task needs:

- task: the `task` column if there is one; else what `infer_tasks` makes of the row.
- play_rate: the column if there is one, else `watch_s` / `duration_s`, where the duration is that of `interactions`, or
  of `videos` where `interactions` has none above 0. It is capped at 1. A sequential row without a play rate is useless
  and is rejected.
- units: those of `source.units`; else what the column's name says (`play_ms`); else seconds, and shares for play rates.
  Values that are not plausible in their unit are refused (`units.py`).
- timestamp: seconds, ms, us or ns since 1970 (told apart by size), or ISO 8601 text (UTC if it has no zone).
- prev_op_gap_s, next_op_gap_s: the columns if the log has them; else unknown, since a log rarely holds every operation
  of a user. To declare that yours does, map both to your timestamp column: they become the times between a user's rows.
- users: other columns become facts (`User.other`), beside those of the column `other`, a map or a JSON object.
- videos: `uri` and `cover_uri` may be relative to the folder; a file `STEM.mp4` in `source.videos_dir` belongs to the
  video STEM.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables, units
from gubs.data.sources.columns import CellRules
from gubs.data.sources.formats import RawFile, open_table
from gubs.data.sources.media import VIDEO_SUFFIXES, media_paths
from gubs.data.sources.reading import (
    Column,
    Sheet,
    assemble,
    build,
    codes,
    duplicated,
    facts,
    joined,
    null_note,
    read_sheet,
)
from gubs.errors import InputError
from gubs.records import Task

_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
_GAPS = ("prev_op_gap_s", "next_op_gap_s")
_TIMES = ("duration_s", "watch_s", *_GAPS)
_RATE = "play_rate"

CLICK_FEED, AUTOPLAY = 0.1, 0.9
"""Share of the rows without a click that were played all the same: up to the first, a log without tasks and pages is a
feed of covers that play when they are clicked; from the second, its videos play by themselves."""

_USERS = (
    Column("user_id", "id", nullable=False),
    Column("age", "integer", optional=True, minimum=0, maximum=130),
    Column("gender", "word", optional=True),
    Column("occupation", "word", optional=True),
    Column("other", "word", optional=True),
    Column("tags", "texts", optional=True),
)
_VIDEOS = (
    Column("video_id", "id", nullable=False),
    Column("title", optional=True),
    Column("duration_s", "number", optional=True, minimum=0),
    Column("uri", "word", optional=True),
    Column("cover_uri", "word", optional=True),
    Column("tags", "texts", optional=True),
)
_INTERACTIONS = (
    Column("interaction_id", "id", optional=True, nullable=False),
    Column("user_id", "id", nullable=False),
    Column("video_id", "id", nullable=False),
    Column("task", "word", optional=True),
    Column("timestamp", "time", optional=True),
    Column("page_id", "id", optional=True),
    Column("position", "integer", optional=True, minimum=0, maximum=2**31 - 1),
    Column("watch_s", "number", optional=True, minimum=0),
    Column("duration_s", "number", optional=True, minimum=0),
    Column("play_rate", "number", optional=True, minimum=0),
    Column("clicked", "flag", optional=True),
    Column("liked", "flag", optional=True),
    Column("disliked", "flag", optional=True),
    Column("dislike_reason", "word", optional=True),
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
    found = {name: _find(folder, name) for name in ("interactions", "users", "videos")}
    files = {name: file for name, file in found.items() if file is not None}
    if path.is_file():
        files["interactions"] = path
    if "interactions" not in files:
        names = ", ".join(f"interactions{suffix}" for suffix in _SUFFIXES)
        raise InputError(f"{folder}: no interactions file; put one there: {names}")
    _check_mapping(settings.columns, files)
    stated = _stated_units(settings.units)
    log = _read_log(files["interactions"], settings, stated)
    sheets, users, videos = {"interactions": log.sheet}, None, None
    if "users" in files:
        sheets["users"], users = _read_users(files["users"], settings)
    if "videos" in files:
        sheets["videos"], videos = _read_videos(files["videos"], folder, settings, stated)
        log.notes += _unused(sheets["videos"])
    durations = _video_durations(log.sheet.table["video_id"], videos)
    _check_stated(stated, sheets)
    _check_units(sheets, durations, stated)
    interactions = _interactions(log, durations)
    log.notes += [note for sheet in sheets.values() if (note := null_note(sheet))]
    tables = assemble(users, videos, interactions, list(sheets.values()), log.notes)
    tables.videos = _attach(tables.videos, settings.videos_dir, tables.notes)
    return tables


def companions(interactions: Path) -> list[Path]:
    """The tables of users and videos beside a file of interactions."""
    return [file for name in ("users", "videos") if (file := _find(interactions.parent, name))]


def _find(folder: Path, name: str) -> Path | None:
    matches = [p for s in _SUFFIXES if (p := folder / (name + s)).is_file()]
    if len(matches) > 1:
        raise InputError(f"{folder}: has both {matches[0].name} and {matches[1].name}; keep one of them")
    return matches[0] if matches else None


_TABLES = {"users": _USERS, "videos": _VIDEOS, "interactions": _INTERACTIONS}
Nested = Mapping[str, str | dict[str, str]]
"""A setting per column, or per table and column."""


def _of_table(setting: Nested, table: str) -> dict[str, str]:
    """The entries that apply to a table; those that name it win."""
    general = {name: value for name, value in setting.items() if isinstance(value, str)}
    own = setting.get(table, {})
    return general | own if isinstance(own, dict) else general


def _check_mapping(columns: Nested, files: Mapping[str, Path]) -> None:
    opened = {table: open_table(file) for table, file in files.items()}
    for name, value in columns.items():
        if isinstance(value, str):
            _check_name(f"source.columns.{name}", name, value, opened)
        elif name not in _TABLES:
            raise InputError(f"source.columns.{name}: no such table; they are {', '.join(_TABLES)}")
        elif name not in files:
            raise InputError(f"source.columns.{name}: there is no file of {name}; put {name}.csv beside the others")
        else:
            for ours, theirs in value.items():
                _check_name(f"source.columns.{name}.{ours}", ours, theirs, {name: opened[name]})


def _check_name(setting: str, ours: str, theirs: str, files: Mapping[str, RawFile]) -> None:
    """Checks that the column `ours` belongs to one of the tables, and that one of their files has `theirs`."""
    names = sorted({c.name for table in files for c in _TABLES[table]})
    if ours not in names:
        raise InputError(f"{setting}: no such column of ours; they are {', '.join(names)}")
    if not any(theirs in file.header for file in files.values()):
        raise InputError(
            f"{setting}={theirs}: none of {', '.join(f.label for f in files.values())} has a column {theirs!r} in row 1"
            f"; write its name as it is in the file"
        )


_WITH_UNITS = {"interactions": (*_TIMES, _RATE), "videos": ("duration_s",)}


def _stated_units(setting: Nested) -> units.Stated:
    """The units that the setting states, by table and column; those for one table win."""
    general: dict[tuple[str, str], str] = {}
    own: dict[tuple[str, str], str] = {}
    for name, value in setting.items():
        if isinstance(value, str):
            general |= _stated(f"source.units.{name}", name, value, tuple(_WITH_UNITS))
        elif name not in _WITH_UNITS:
            raise InputError(f"source.units.{name}: no such table; they are {', '.join(_WITH_UNITS)}")
        else:
            for column, unit in value.items():
                own |= _stated(f"source.units.{name}.{column}", column, unit, (name,))
    return general | own


def _stated(key: str, name: str, unit: str, tables: Sequence[str]) -> dict[tuple[str, str], str]:
    """One unit for the column `name` (`watch` or `watch_s`) of those of the tables that have it."""
    column = name if name in _WITH_UNITS["interactions"] else f"{name}_s"
    found = {(table, column): unit for table in tables if column in _WITH_UNITS[table]}
    if not found:
        names = dict.fromkeys(c.removesuffix("_s") for table in tables for c in _WITH_UNITS[table])
        raise InputError(f"{key}: no such column of {' or '.join(tables)}; they are {', '.join(names)}")
    known = units.RATE_UNITS if column == _RATE else units.TIME_UNITS
    if unit not in known:
        raise InputError(f"{key}={unit}: no such unit; they are {', '.join(known)}")
    return found


def _check_stated(stated: units.Stated, sheets: Mapping[str, Sheet]) -> None:
    """Refuses a unit of a column that no file has."""
    there = {column for table, column in stated if table in sheets and column in sheets[table].names}
    if absent := sorted({column for _, column in stated} - there):
        name = absent[0].removesuffix("_s")
        raise InputError(
            f"source.units.{name}: no file has this column; map yours with source.columns.{absent[0]}=NAME"
        )


def _mapped(table: str, setting: Nested) -> list[Column]:
    """The table's columns with the names that the file may use: the mapped one, else our own."""
    mapping = _of_table(setting, table)
    return [replace(c, source=(mapping[c.name], c.name)) if c.name in mapping else c for c in _TABLES[table]]


def _convert_units(sheet: Sheet, table: str, stated: units.Stated) -> None:
    """Brings times to seconds and play rates to shares, from the units that are stated or that the names tell."""
    for ours in (*_TIMES, _RATE):
        theirs = sheet.names.get(ours)
        if theirs is None:
            continue
        known = units.RATE_UNITS if ours == _RATE else units.TIME_UNITS
        unit = stated.get((table, ours)) or units.named_unit(theirs)
        if unit is not None and unit in known:
            _replace(sheet, ours, units.converted(sheet.column(ours), unit))


def _replace(sheet: Sheet, name: str, column: pa.ChunkedArray) -> None:
    sheet.table = sheet.table.set_column(sheet.table.column_names.index(name), name, column)


def _read_log(path: Path, settings: SourceSettings, stated: units.Stated) -> _Log:
    derived = frozenset(_GAPS) if _is_complete(_of_table(settings.columns, "interactions")) else frozenset()
    columns = [c for c in _mapped("interactions", settings.columns) if c.name not in derived]
    sheet = read_sheet(path, columns, settings.max_bad_rows, rules=_rules(settings))
    _convert_units(sheet, "interactions", stated)
    present = frozenset(sheet.names)
    notes = [f"No column {name!r}: {lost}." for name, lost in _LOSSES.items() if name not in present | derived]
    log = _Log(sheet, present, notes + _unused(sheet))
    _add_tasks(log)
    _reject_repeats(log)
    if derived:
        _add_gaps(log)
    return log


def _unused(sheet: Sheet) -> list[str]:
    return [f"Columns of {sheet.label} that are not used: {', '.join(sheet.unused)}."] if sheet.unused else []


def _rules(settings: SourceSettings) -> CellRules:
    return CellRules(settings.nulls, settings.separators)


_LOSSES = {
    "timestamp": "the rows are taken to be in order of time, and repeated rows cannot be told from repeated views",
    "prev_op_gap_s": "the time since a user's previous operation is unknown, and the noise filter cannot use it",
    "next_op_gap_s": "the time until a user's next operation is unknown, and the noise filter cannot use it",
    "exited_app": "whether the user left the app is unknown, and the noise filter cannot use it",
}


def _is_complete(mapping: dict[str, str]) -> bool:
    """Whether both gaps are mapped to the timestamp's column, which declares that the log holds every operation."""
    return {mapping.get(name) for name in _GAPS} == {mapping.get("timestamp", "timestamp")}


def _reject_repeats(log: _Log) -> None:
    """Rejects rows that repeat an earlier one. A click and the view that it starts are two records."""
    sheet = log.sheet
    if "interaction_id" in log.columns:
        sheet.reject_duplicates("interaction_id")
    if "timestamp" in log.columns:
        if untimed := sheet.column("timestamp").null_count:
            log.notes.append(f"{untimed} interactions have no time.")
        key = [sheet.column(n) for n in ("user_id", "video_id", "timestamp", "task")]
        timed = np.asarray(sheet.column("timestamp").is_valid())
        sheet.reject(duplicated(key) & timed, "duplicate", "timestamp")


def _video_durations(video_ids: pa.ChunkedArray, videos: pa.Table | None) -> pa.ChunkedArray:
    """Each row's duration by the table `videos`; null where it has none."""
    if videos is None:
        return pa.chunked_array([pa.nulls(len(video_ids), pa.float64())])
    rows = pc.index_in(video_ids, value_set=videos["video_id"].combine_chunks())
    return pc.take(videos["duration_s"], rows)


def _check_units(sheets: Mapping[str, Sheet], durations: pa.ChunkedArray, stated: units.Stated) -> None:
    """Refuses values that are not plausible in their units.

    Raises:
        InputError: with the reason and the setting for each column.
    """
    log = sheets["interactions"]
    own = [c for c in (*_TIMES, _RATE) if c not in _GAPS or c in log.names]
    evidence = units.Evidence.of(log.table.select(own), durations)
    if "videos" in sheets:
        evidence += units.Evidence(video_duration=units.Sizes.of(sheets["videos"].column("duration_s")))
    if found := units.objections(evidence, stated):
        reasons = "; ".join(f"{_example(sheets[o.table], o.column)}: {o.reason}" for o in found)
        raise InputError(f"{reasons}. Set {', '.join(dict.fromkeys(o.remedy for o in found))}")


def _example(sheet: Sheet, column: str) -> str:
    """Names the file, the column, and the first row with a value above 0."""
    row = pc.index(pc.greater(sheet.column(column), 0), True).as_py()
    value = f"{sheet.column(column)[row].as_py():g}{'' if column == _RATE else ' s'}"
    return f"{sheet.label}: column {sheet.names.get(column, column)!r} (row {sheet.lines[row]} has {value})"


def _interactions(log: _Log, durations: pa.ChunkedArray) -> pa.Table:
    sheet = log.sheet
    rates, over = play_rates(sheet.table, durations)
    if over:
        log.notes.append(f"{over} play rates above 1 (repeated views) are capped at 1.")
    _replace(sheet, _RATE, rates)
    _reject_unlabelled(log)
    if "interaction_id" not in log.columns:
        _replace(sheet, "interaction_id", joined(pa.chunked_array([pa.array(sheet.lines)])))
    columns = dict(zip(sheet.table.column_names, sheet.table.columns, strict=True))
    return build("interactions", sheet.table.num_rows, **columns)


def play_rates(block: pa.Table, durations: pa.ChunkedArray) -> tuple[pa.ChunkedArray, int]:
    """The watched share of each video, from the log or computed, null if it is unknown; and how many were above 1.

    Args:
        block: play_rate, watch_s and duration_s of the log; a duration of 0 counts as unknown.
        durations: of the rows' videos by the table `videos`.
    """
    known = pc.coalesce(pc.if_else(pc.greater(block["duration_s"], 0), block["duration_s"], None), durations)
    rates = pc.coalesce(block["play_rate"], pc.divide(block["watch_s"], known))
    capped = pc.min_element_wise(rates, 1.0, skip_nulls=False)
    capped = capped if isinstance(capped, pa.ChunkedArray) else pa.chunked_array([capped])
    return capped, pc.sum(pc.greater(rates, 1)).as_py() or 0


def _add_tasks(log: _Log) -> None:
    sheet = log.sheet
    given = pc.utf8_lower(sheet.column("task"))
    valid = pc.or_(pc.is_in(given, value_set=pa.array([task.value for task in Task])), pc.is_null(given))
    sheet.reject(pc.invert(valid), "unknown task", "task", malformed=True)
    _replace(sheet, "task", infer_tasks(sheet.table, _is_click_feed(log)))


@dataclass(frozen=True)
class Unclicked:
    """Rows without a click, page or task: how many, and how many of them were played. Counts of blocks add up."""

    rows: int = 0
    played: int = 0
    empty: int = 0
    """Rows with a watch time or play rate where `clicked` is empty."""
    played_empty: int = 0
    clicked: int = 0
    """Rows with a click, but without page or task."""

    @classmethod
    def of(cls, block: pa.Table) -> "Unclicked":
        """Counts a block's rows; it has task, page_id, clicked, watch_s and play_rate."""
        untold = block.filter(pc.and_(pc.is_null(block["task"]), pc.is_null(block["page_id"])))
        rows = untold.filter(pc.fill_null(pc.invert(untold["clicked"]), False))
        empty = untold.filter(pc.and_(pc.is_null(untold["clicked"]), _is_watched(untold)))
        played, played_empty = (pc.sum(_played(part)).as_py() or 0 for part in (rows, empty))
        clicked = pc.sum(untold["clicked"]).as_py() or 0
        return cls(rows.num_rows, played, empty.num_rows, played_empty, clicked)

    def __add__(self, other: "Unclicked") -> "Unclicked":
        return Unclicked(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _is_watched(rows: pa.Table) -> pa.ChunkedArray:
    return pc.or_(rows["play_rate"].is_valid(), rows["watch_s"].is_valid())


def _played(rows: pa.Table) -> pa.ChunkedArray:
    watched, rated = (pc.fill_null(pc.greater(rows[name], 0), False) for name in ("watch_s", "play_rate"))
    return pc.or_(watched, rated)


def _is_click_feed(log: _Log) -> bool:
    """Whether rows with `clicked` but without a page or task are exposures, by what happened to those without a click.

    Raises:
        InputError: some of them were played and many were not; or `clicked` is empty where nothing was clicked.
    """
    unclicked = Unclicked.of(log.sheet.table)
    if unclicked.clicked and not unclicked.rows and unclicked.played_empty < CLICK_FEED * unclicked.empty:
        raise InputError(
            f"{log.sheet.label}: column {log.sheet.names['clicked']!r} is empty in {unclicked.empty:,} rows with a "
            f"watch time, and nearly all of these are 0: they would count as skips. Write 0 where a video was shown "
            f"and not clicked, or add a column 'task' (sequential or click)"
        )
    if not unclicked.rows or unclicked.played >= AUTOPLAY * unclicked.rows:
        return False
    told = f"{unclicked.played:,} of {unclicked.rows:,} rows without a click, page_id and task were played"
    if unclicked.played > CLICK_FEED * unclicked.rows:
        raise InputError(
            f"{log.sheet.label}: column {log.sheet.names['clicked']!r}: {told}: too many for a page of covers, too few "
            f"for videos that play by themselves. Add a column 'task' (sequential or click), or a 'page_id' to the "
            f"exposures"
        )
    if "watch_s" in log.columns or _RATE in log.columns:
        log.notes.append(
            f"{told}: rows with a value in {log.sheet.names['clicked']!r} are exposures of the click task."
        )
    return True


def infer_tasks(block: pa.Table, click_feed: bool) -> pa.ChunkedArray:
    """The task of each row: its own; else click if it has a page; else by what is known of it.

    A row with a click or without one is an exposure in a `click_feed`, or if nothing is known of its watching; other
    rows with a play rate or a watch time are views. Null if nothing is known.
    """
    exposed = block["clicked"].is_valid()
    watched = _is_watched(block)
    inferred = pc.if_else(exposed, Task.CLICK.value, None)
    inferred = pc.if_else(pc.and_(watched, pc.invert(pc.and_(exposed, click_feed))), Task.SEQUENTIAL.value, inferred)
    inferred = pc.if_else(block["page_id"].is_valid(), Task.CLICK.value, inferred)
    return pc.coalesce(pc.utf8_lower(block["task"]), inferred)


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
    columns = _mapped("users", settings.columns)
    ours = {n for c in columns for n in c.names}
    header = open_table(path).header
    more = [n for n in header if n not in ours and n != "other" and not n.startswith("(unnamed")]
    columns += [Column(f"other {n}", "word", (n,)) for n in more]
    sheet = read_sheet(path, columns, settings.max_bad_rows, rules=_rules(settings))
    sheet.reject_duplicates("user_id")
    other = _facts_of_column(sheet, re.compile(_rules(settings).missing))
    t, n = sheet.table, len(sheet.lines)
    filled = {c.name: t[c.name] for c in _USERS}
    filled["other"] = facts(n, other | {name: t[f"other {name}"] for name in more})
    filled["tags"] = _or_empty(t["tags"])
    return sheet, build("users", n, **filled)


def _facts_of_column(sheet: Sheet, missing: re.Pattern[str]) -> dict[str, pa.ChunkedArray]:
    """The facts in the column `other`, a map or a JSON object as text; rows where it is neither are rejected."""

    def fact(value: object) -> str | None:
        return None if value is None or missing.match(str(value)) else str(value)

    objects = [_json_object(text) for text in sheet.column("other").to_pylist()]
    sheet.reject(np.array([o is None for o in objects], bool), "not a JSON object", "other", malformed=True)
    valid = [o for o in objects if o is not None]
    return {
        name: pa.chunked_array([pa.array([fact(o.get(name)) for o in valid], pa.string())])
        for name in dict.fromkeys(name for o in valid for name in o)
    }


def _json_object(text: str | None) -> dict[str, object] | None:
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _read_videos(path: Path, folder: Path, settings: SourceSettings, stated: units.Stated) -> tuple[Sheet, pa.Table]:
    sheet = read_sheet(path, _mapped("videos", settings.columns), settings.max_bad_rows, rules=_rules(settings))
    sheet.reject_duplicates("video_id")
    _convert_units(sheet, "videos", stated)
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
