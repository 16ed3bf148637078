"""Sources of logs: each reads its own files and gives the same typed tables (`SourceTables`).

A source is a function `(SourceSettings) -> SourceTables`. `read_source` finds it by its kind.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pyarrow as pa

from gubs.config import Settings, SourceSettings
from gubs.errors import InputError
from gubs.records import SCHEMAS


@dataclass
class FileCount:
    """Where the rows of one input file went: rows_in == rows_out + sum(rejected.values())."""

    rows_in: int
    rows_out: int
    rejected: dict[str, int] = field(default_factory=dict)
    """Rows set aside, by cause."""


@dataclass
class SourceTables:
    """What a source gives: tables that follow `records.SCHEMAS`, and an account of what was lost on the way."""

    users: pa.Table
    videos: pa.Table
    interactions: pa.Table
    rejects: pa.Table
    """Rows set aside: file, row, column, cause, value."""
    files: dict[str, FileCount]
    """Account of each input file that was read row by row."""
    notes: list[str] = field(default_factory=list)
    """What the source does not have, and what that rules out (say, the two-minute filter)."""
    truth: dict[str, pa.Table] = field(default_factory=dict)
    """Simulated sources only: true causes of `skips`, and what is hidden of `users` and `videos`."""

    def check(self) -> None:
        """Checks schemas, identities, references and the account of rows.

        Raises:
            InputError: an id occurs twice, an interaction points nowhere, or rows are unaccounted for.
        """
        for name in ("users", "videos", "interactions", "rejects"):
            table: pa.Table = getattr(self, name)
            if not table.schema.equals(SCHEMAS[name]):
                raise InputError(f"source table {name!r} does not follow the schema of records.py: {table.schema}")
        for name, key in (("users", "user_id"), ("videos", "video_id"), ("interactions", "interaction_id")):
            column = getattr(self, name)[key]
            if len(column.unique()) != len(column):
                raise InputError(
                    f"source table {name!r}: {len(column) - len(column.unique())} values of {key!r} occur twice"
                )
        for key, table in (("user_id", self.users), ("video_id", self.videos)):
            known = pa.compute.is_in(self.interactions[key], value_set=table[key].combine_chunks())
            if not pa.compute.all(known).as_py():
                missing = pa.compute.sum(pa.compute.invert(known)).as_py()
                raise InputError(f"{missing} interactions point to a {key!r} that no table has")
        for file, count in self.files.items():
            if count.rows_in != count.rows_out + sum(count.rejected.values()):
                raise InputError(f"{file}: rows in and rows out do not add up: {count}")


Reader = Callable[[SourceSettings], SourceTables]

_READERS = {
    "logs": "gubs.data.sources.logs:read",
    "movielens": "gubs.data.sources.movielens:read",
    "amazon": "gubs.data.sources.amazon:read",
    "kuairand": "gubs.data.sources.kuairand:read",
    "microlens": "gubs.data.sources.microlens:read",
}


def read_source(settings: Settings) -> SourceTables:
    """Reads (or simulates) the source that the settings name, and checks it."""
    tables: SourceTables
    if settings.source.kind == "synthetic":
        simulate = import_module("gubs.data.sources.synthetic").simulate
        tables = simulate(settings.synthetic, settings.seed)
    else:
        module, _, function = _READERS[settings.source.kind].partition(":")
        reader: Reader = getattr(import_module(module), function)
        tables = reader(settings.source)
    tables.check()
    return tables


def account(files: dict[str, FileCount]) -> dict[str, Any]:
    """The account as plain JSON for a manifest."""
    return {name: {"rows_in": c.rows_in, "rows_out": c.rows_out, "rejected": c.rejected} for name, c in files.items()}
