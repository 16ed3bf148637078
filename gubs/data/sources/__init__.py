"""Sources of logs: each reads its own files and gives the same typed tables.

A source is a module of this package, named like its `source.kind`; it has a function `open_source` from
`SourceSettings` to a `log.Log`, which is read in pieces, or to the whole `SourceTables`, if it is small; and a function
`files` if its files are not simply those of its folder. The simulated app has no files and is made elsewhere
(`gubs.simulator`); it gives the same tables.
"""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.errors import InputError
from gubs.records import SCHEMAS

if TYPE_CHECKING:
    from gubs.data.sources.log import Log


@dataclass
class FileCount:
    """What became of the rows of one input file: rows_in == rows_out + sum(rejected.values())."""

    rows_in: int
    rows_out: int
    rejected: dict[str, int] = field(default_factory=dict)
    """Rows set aside, by cause."""


@dataclass
class SourceTables:
    """The tables of a source, which follow `records.SCHEMAS`, and an account of what was lost on the way."""

    users: pa.Table
    videos: pa.Table
    interactions: pa.Table
    rejects: pa.Table
    """Rows set aside: file, row, column, cause, value."""
    files: dict[str, FileCount]
    """Account of each input file that was read row by row."""
    notes: list[str] = field(default_factory=list)
    """What the source lacks, and what that rules out (the two-minute filter, for example)."""
    parts: pa.Table | None = None
    """interaction_id and part (`train`, `valid`, `test`), if the source comes divided."""
    truth: dict[str, pa.Table] = field(default_factory=dict)
    """Simulated sources only: the true causes of `skips`, and what is hidden of `users` and `videos`."""

    def check(self) -> None:
        """Checks schemas, ids, references and the account of rows.

        Raises:
            InputError: a table has another schema, an id occurs twice, an interaction refers to an unknown user or
                video, or rows are unaccounted for.
        """
        for name in ("users", "videos", "interactions", "rejects"):
            table: pa.Table = getattr(self, name)
            if not table.schema.equals(SCHEMAS[name]):
                raise InputError(f"source table {name!r} does not follow the schema of records.py: {table.schema}")
        for name, key in (("users", "user_id"), ("videos", "video_id"), ("interactions", "interaction_id")):
            column = getattr(self, name)[key]
            if repeated := len(column) - len(column.unique()):
                raise InputError(f"source table {name!r}: {repeated} values of {key!r} occur twice")
        for key, table in (("user_id", self.users), ("video_id", self.videos)):
            matched = pc.is_in(self.interactions[key], value_set=table[key].combine_chunks())
            if unmatched := pc.sum(pc.invert(matched)).as_py():
                raise InputError(f"{unmatched} interactions have a {key!r} that is in no table")
        for file, count in self.files.items():
            if count.rows_in != count.rows_out + sum(count.rejected.values()):
                raise InputError(f"{file}: rows in and rows out do not add up: {count}")


def named_files(source: SourceSettings) -> list[Path] | None:
    """The files that the source names itself; None: they are the table files of its folder.

    Raises:
        InputError: a file that it cannot do without is missing.
    """
    module = import_module(f"gubs.data.sources.{source.kind}")
    return module.files(source) if hasattr(module, "files") else None


def open_source(source: SourceSettings) -> "Log | SourceTables":
    """The source's log, to be read in pieces; or its tables, if it is one that is read in memory.

    Raises:
        InputError: a file of the source cannot be used.
    """
    opened: Log | SourceTables = import_module(f"gubs.data.sources.{source.kind}").open_source(source)
    return opened


def read_source(source: SourceSettings) -> SourceTables:
    """Reads the source that the settings name into memory, and checks its tables.

    Raises:
        InputError: a file of the source cannot be used.
    """
    from gubs.data.sources.log import in_memory

    opened = open_source(source)
    tables = opened if isinstance(opened, SourceTables) else in_memory(opened)
    tables.check()
    return tables
