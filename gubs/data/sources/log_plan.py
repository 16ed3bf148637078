"""How your own logs are read, decided before the first row: their files, columns and units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from gubs.data.settings import SourceSettings
from gubs.data.sources import units
from gubs.data.sources.columns import KINDS, CellRules
from gubs.data.sources.files import InputFile, fixed_folder, in_folder, is_wild, listed, located, matching
from gubs.data.sources.log import Head
from gubs.data.sources.reading import (
    Column,
    match_columns,
)
from gubs.errors import InputError

_PLAIN = (".parquet", ".csv", ".tsv", ".jsonl")

_SUFFIXES = (*_PLAIN, *(f"{s}.{z}" for s in _PLAIN[1:] for z in ("gz", "zst")))

GAPS = ("prev_op_gap_s", "next_op_gap_s")

TIMES = ("duration_s", "watch_s", *GAPS)

RATE = "play_rate"

_FILES_NAMED = 4
"""Files that a refusal names."""

USERS = (
    Column("user_id", "id", nullable=False),
    Column("age", "integer", optional=True, minimum=0, maximum=130),
    Column("gender", "word", optional=True),
    Column("occupation", "word", optional=True),
    Column("other", "word", optional=True),
    Column("tags", "texts", optional=True),
)

VIDEOS = (
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

TABLES = ("interactions", "users", "videos")

Files = Mapping[str, Sequence[InputFile]]
"""The files of each table."""


def find_files(path: str) -> tuple[dict[str, list[InputFile]], str]:
    """The files of each table, and their folder. `path` is a folder, the file (or a glob of the files) of the
    interactions alone, or a URI of either; a table is a file or a folder of parts.

    Raises:
        InputError: there are no interactions, or a table is there twice.
    """
    fs, place = located(path)
    if is_wild(path):
        own, folder = matching(path), fixed_folder(path)
        folder = folder.rpartition("/")[0] if folder.endswith("/interactions") else folder
    elif fs.isfile(place):
        folder, _, name = path.rpartition("/")
        folder, own = folder or ".", [InputFile(path, name)]
    else:
        folder, own = path, []
    by_table = {name: _find(folder, name) for name in TABLES}
    files = {name: parts for name, parts in (by_table | ({"interactions": own} if own else {})).items() if parts}
    if "interactions" not in files:
        names = ", ".join(f"interactions{suffix}" for suffix in _SUFFIXES)
        raise InputError(
            f"{folder}: no interactions file; put one there: {names}; or a folder 'interactions' of parts, or give "
            f"source.path={folder}/PATTERN"
        )
    return files, folder


def _find(folder: str, name: str) -> list[InputFile]:
    matches = [f for s in _SUFFIXES if (f := in_folder(folder, name + s)).exists()]
    parts = listed(f"{folder.rstrip('/')}/{name}", _SUFFIXES)
    if len(matches) > 1:
        raise InputError(f"{folder}: has both {matches[0].label} and {matches[1].label}; keep one of them")
    if matches and parts:
        raise InputError(f"{folder}: has both {matches[0].label} and a folder {name!r} of parts; keep one of them")
    return matches or parts


@dataclass(frozen=True)
class LogPlan:
    """How a log is read; made from its heads and the settings."""

    settings: SourceSettings
    files: Files
    folder: str
    heads: Mapping[str, Sequence[Head]]
    columns: tuple[Column, ...]
    """The columns to read of the interactions."""
    names: Mapping[str, str]
    """Our name of each column that a file of the interactions has -> its name there."""
    derived: frozenset[str]
    """Columns that are computed from others: the gaps of a log that is declared complete."""
    stated: units.Stated

    @property
    def rules(self) -> CellRules:
        """What cells mean."""
        return _rules(self.settings)

    def label(self, table: str) -> str:
        """What a table is called in messages."""
        return _label(table, self.heads[table])

    @property
    def piece_schema(self) -> pa.Schema:
        """The columns of the rows between `read` and `finish`."""
        kept = [c for c in self.columns if c.name in self.names or c.name in _ALWAYS]
        return pa.schema([("file", pa.int32()), ("line", pa.int64()), *((c.name, KINDS[c.kind][0]) for c in kept)])


def _label(table: str, heads: Sequence[Head]) -> str:
    return heads[0].label if len(heads) == 1 else f"{table} ({len(heads)} files)"


_ALWAYS = ("user_id", "video_id", "task", "timestamp", "page_id", "clicked", "watch_s", "duration_s", "play_rate")
"""Columns that a piece has, even if they are empty."""


def plan(settings: SourceSettings, files: Files, folder: str, heads: Mapping[str, Sequence[Head]]) -> LogPlan:
    """Checks the settings against the heads of the files.

    Raises:
        InputError: a file lacks a column, all files of a table are empty, or a setting fits no column.
    """
    for table, parts in heads.items():
        if all(head.blank for head in parts):
            one, many = "the file is empty; copy it again from its origin", "all files are empty; copy them again"
            raise InputError(f"{_label(table, parts)}: {one if len(parts) == 1 else many}")
    _check_mapping(settings.columns, heads)
    mapping = _of_table(settings.columns, "interactions")
    derived = frozenset(GAPS) if _is_complete(mapping) else frozenset[str]()
    columns = tuple(c for c in mapped("interactions", settings.columns) if c.name not in derived)
    matches = [match_columns(h.label, h.header, columns) for h in heads["interactions"] if not h.blank]
    names = {ours: theirs for one in reversed(matches) for ours, theirs in one.items()}
    return LogPlan(settings, files, folder, heads, columns, names, derived, _stated_units(settings.units))


def widened(log: LogPlan, late: Mapping[str, Sequence[str]]) -> LogPlan | None:
    """The plan by heads with these columns too, by file of the interactions; None if none of them could be used.

    Raises:
        InputError: see `plan`.
    """
    usable = {name for column in log.columns for name in column.names}
    if usable.isdisjoint(name for names in late.values() for name in names):
        return None
    heads = [replace(h, header=(*h.header, *late.get(h.label, ()))) for h in log.heads["interactions"]]
    return plan(log.settings, log.files, log.folder, {**log.heads, "interactions": heads})


_TABLES = {"users": USERS, "videos": VIDEOS, "interactions": _INTERACTIONS}

Nested = Mapping[str, str | dict[str, str]]
"""A setting per column, or per table and column."""


def _of_table(setting: Nested, table: str) -> dict[str, str]:
    """The entries that apply to a table; those that name it win."""
    general = {name: value for name, value in setting.items() if isinstance(value, str)}
    own = setting.get(table, {})
    return general | own if isinstance(own, dict) else general


def _check_mapping(columns: Nested, heads: Mapping[str, Sequence[Head]]) -> None:
    for name, value in columns.items():
        if isinstance(value, str):
            _check_name(f"source.columns.{name}", name, value, heads)
        elif name not in _TABLES:
            raise InputError(f"source.columns.{name}: no such table; they are {', '.join(_TABLES)}")
        elif name not in heads:
            raise InputError(f"source.columns.{name}: there is no file of {name}; put {name}.csv beside the others")
        else:
            for ours, theirs in value.items():
                _check_name(f"source.columns.{name}.{ours}", ours, theirs, {name: heads[name]})


def _check_name(setting: str, ours: str, theirs: str, heads: Mapping[str, Sequence[Head]]) -> None:
    """Checks that the column `ours` belongs to one of the tables, and that one of their files has `theirs`."""
    names = sorted({c.name for table in heads for c in _TABLES[table]})
    if ours not in names:
        raise InputError(f"{setting}: no such column of ours; they are {', '.join(names)}")
    labels = [h.label for parts in heads.values() for h in parts]
    if not any(theirs in head.header for parts in heads.values() for head in parts):
        shown = ", ".join(labels[:_FILES_NAMED]) + (" ..." if len(labels) > _FILES_NAMED else "")
        raise InputError(
            f"{setting}={theirs}: none of {shown} has a column {theirs!r} in row 1; write its name as it is in the file"
        )


_WITH_UNITS = {"interactions": (*TIMES, RATE), "videos": ("duration_s",)}


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
    entries = {(table, column): unit for table in tables if column in _WITH_UNITS[table]}
    if not entries:
        names = dict.fromkeys(c.removesuffix("_s") for table in tables for c in _WITH_UNITS[table])
        raise InputError(f"{key}: no such column of {' or '.join(tables)}; they are {', '.join(names)}")
    allowed = units.RATE_UNITS if column == RATE else units.TIME_UNITS
    if unit not in allowed:
        raise InputError(f"{key}={unit}: no such unit; they are {', '.join(allowed)}")
    return entries


def mapped(table: str, setting: Nested) -> list[Column]:
    """The table's columns with the names that the file may use: the mapped one, else our own."""
    mapping = _of_table(setting, table)
    return [replace(c, source=(mapping[c.name], c.name)) if c.name in mapping else c for c in _TABLES[table]]


def _rules(settings: SourceSettings) -> CellRules:
    return CellRules(settings.nulls, settings.separators)


def _is_complete(mapping: Mapping[str, str]) -> bool:
    """Whether both gaps are mapped to the timestamp's column, which declares that the log holds every operation."""
    return {mapping.get(name) for name in GAPS} == {mapping.get("timestamp", "timestamp")}
