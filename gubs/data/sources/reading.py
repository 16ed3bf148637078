"""Reads a table file into typed columns and keeps account of every row that is set aside on the way.

A source declares its columns (`Column`) and gets a `Sheet`: the good rows, their line numbers, and what was rejected,
by cause. It may reject more (`Sheet.reject`), and in the end hands its sheets to `assemble`, which makes the
`SourceTables`. No row is ever dropped without a cause.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.sources import FileCount, SourceTables
from gubs.data.sources.cells import CAUSES, Kind, convert, decode
from gubs.data.sources.formats import Batch, RawFile, TextFormat, open_table
from gubs.errors import InputError
from gubs.records import SCHEMAS, conform, empty

SHOWN = 200
"""Characters of a rejected value that are kept."""

_CHUNK = 1 << 18
"""Rows of the shared pieces that columns of one value are made of."""

_NOT_MALFORMED = {"blank line"}

_TYPES: dict[Kind, pa.DataType] = {
    "id": pa.string(),
    "text": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "time": pa.int64(),
    "texts": pa.list_(pa.string()),
}


@dataclass(frozen=True)
class Column:
    """A column that a source wants from a file."""

    name: str
    """What we call it."""
    kind: Kind = "text"
    source: tuple[str, ...] = ()
    """What the file may call it, best first; empty = as we do."""
    optional: bool = False
    """The file may lack the column; it is all null then."""
    nullable: bool = True
    """A cell may be missing; else its row is rejected."""
    minimum: float | None = None
    maximum: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which the file may call it."""
        return self.source or (self.name,)


@dataclass
class Sheet:
    """One input file's rows on their way in."""

    label: str
    table: pa.Table
    """The rows that are good so far."""
    lines: np.ndarray
    """1-based line (Parquet: row) of each of them."""
    rows_in: int
    rejected: Counter[str] = field(default_factory=Counter)
    rejects: list[pa.Table] = field(default_factory=list)
    max_bad: float = 1.0
    """Share of malformed rows from which the file is refused."""
    malformed: int = 0
    """Rejected rows that no good file has (duplicates, say, are normal)."""
    unused: list[str] = field(default_factory=list)
    """Columns of the file that nobody asked for."""

    def reject(
        self, mask: np.ndarray | pa.ChunkedArray, cause: str, column: str | None = None, malformed: bool = False
    ) -> None:
        """Sets the masked rows aside.

        Args:
            mask: true for rows to set aside; null counts as false.
            cause: why, in a few words.
            column: the column to blame; its values are kept with the rejects.
            malformed: no good file has such rows; too many of them, and the file is refused.

        Raises:
            InputError: the share of malformed rows is now above `max_bad`.
        """
        bad = np.asarray(mask.fill_null(False)) if isinstance(mask, pa.ChunkedArray) else mask
        if not bad.any():
            return
        values = [None] * int(bad.sum()) if column is None else self.table[column].filter(pa.array(bad)).to_pylist()
        self._keep(self.lines[bad], column, cause, values, malformed)
        self.table = self.table.filter(pa.array(~bad))
        self.lines = self.lines[~bad]
        if malformed:
            self.check_quality()

    def _keep(
        self, lines: np.ndarray, column: str | None, cause: str, values: Sequence[object], malformed: bool
    ) -> None:
        self.malformed += len(lines) * malformed
        self.rejected[cause] += len(lines)
        self.rejects.append(_rejects(self.label, lines, column, cause, values))

    def check_quality(self) -> None:
        """Refuses the file if more than the allowed share of its rows is malformed.

        Raises:
            InputError: with the first few rejected rows.
        """
        if self.malformed <= self.max_bad * self.rows_in:
            return
        rows = sorted((r for t in self.rejects for r in t.slice(0, 3).to_pylist()), key=lambda r: r["row"])[:3]
        shown = "; ".join(
            f"row {r['row']}"
            + (f", column {r['column']!r}" if r["column"] else "")
            + f": {r['cause']} ({r['value']!r:.80})"
            for r in rows
        )
        raise InputError(
            f"{self.label}: {self.malformed} of {self.rows_in} rows cannot be used, more than the share "
            f"{self.max_bad:g} that source.max_bad_rows allows. First: {shown}. Mend the file, or raise "
            f"source.max_bad_rows"
        )

    def count(self) -> FileCount:
        """The account of this file."""
        return FileCount(self.rows_in, self.table.num_rows, dict(self.rejected))

    def column(self, name: str) -> pa.ChunkedArray:
        """The column of that (our) name."""
        return self.table[name]


def read_sheet(
    path: Path, columns: Sequence[Column], max_bad: float, label: str = "", text: TextFormat | None = None
) -> Sheet:
    """Reads a file's columns into the kinds that are wanted.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file (text may be gzipped), or any text file if `text` is given.
        columns: what to read; other columns are ignored and listed in `Sheet.unused`.
        max_bad: share of malformed rows from which the file is refused (`source.max_bad_rows`).
        label: what messages call the file; empty = its name.
        text: delimiter, header, quoting, encoding, where the suffix does not say.

    Raises:
        InputError: missing or empty file, missing column, or too many malformed rows; names file, row, column, remedy.
    """
    raw = open_table(path, label or path.name, text)
    found = _find_columns(raw, columns)
    sheet = _Filler(raw, columns, found).fill()
    sheet.unused = [n for n in raw.header if n not in found.values() and not n.startswith("(unnamed")]
    if not sheet.rows_in:
        raise InputError(f"{raw.label}: row 1: a header and no rows below it; copy the file again from its origin")
    sheet.max_bad = max_bad
    sheet.check_quality()
    return sheet


def _find_columns(raw: RawFile, columns: Sequence[Column]) -> dict[str, str]:
    found = {}
    for c in columns:
        here = [n for n in c.names if n in raw.header]
        if here:
            found[c.name] = here[0]
        elif not c.optional:
            raise InputError(
                f"{raw.label}: row 1: no column {' or '.join(map(repr, c.names))}; the file has "
                f"{', '.join(map(repr, raw.header))}. Rename the column (or, in your own logs, map it with "
                f"source.columns.{c.name}=NAME)"
            )
    return found


class _Filler:
    """Types a raw file's batches and gathers them into a sheet."""

    def __init__(self, raw: RawFile, columns: Sequence[Column], found: dict[str, str]) -> None:
        self.raw, self.columns, self.found = raw, columns, found
        self.good: list[pa.Table] = []
        self.kept: list[np.ndarray] = []
        self.bad: list[tuple[np.ndarray, str | None, str, list[object]]] = []

    def fill(self) -> Sheet:
        """Reads all batches."""
        base = 0
        for batch in self.raw.batches(list(self.found.values())):
            self._take(batch, base)
            base += batch[0].num_rows
        schema = pa.schema([(c.name, _TYPES[c.kind]) for c in self.columns])
        table = pa.concat_tables(self.good) if self.good else schema.empty_table()
        rows = np.concatenate(self.kept) if self.kept else np.zeros(0, np.int64)
        torn = self.raw.torn_rows()
        sheet = Sheet(self.raw.label, table, self.raw.lines(rows), base + len(torn))
        for positions, column, cause, values in self.bad:
            sheet._keep(self.raw.lines(positions), column, cause, values, cause not in _NOT_MALFORMED)
        for t in torn:
            sheet._keep(np.array([t.line]), None, t.cause, [t.text], t.cause not in _NOT_MALFORMED)
        return sheet

    def _take(self, raw: Batch, base: int) -> None:
        batch, flags = raw
        n = batch.num_rows
        taken = np.zeros(n, bool)
        for cause, mask in flags.items():
            self._set_aside(base, taken, mask, None, cause, batch.column(batch.num_columns - 1))
        typed = [self._typed(batch, c, base, taken) for c in self.columns]
        table = pa.table(typed, names=[c.name for c in self.columns])
        rows = np.arange(base, base + n)
        self.good.append(table.filter(pa.array(~taken)) if taken.any() else table)
        self.kept.append(rows[~taken])

    def _typed(self, batch: pa.RecordBatch, c: Column, base: int, taken: np.ndarray) -> pa.Array:
        if c.name not in self.found:
            return pa.nulls(batch.num_rows, _TYPES[c.kind])
        name = self.found[c.name]
        cells = batch.column(batch.schema.get_field_index(name))
        text, undecodable = decode(cells)
        self._set_aside(base, taken, undecodable, name, "not UTF-8 text", cells)
        values, unfit = convert(text, c.kind)
        self._set_aside(base, taken, unfit, name, CAUSES[c.kind], text)
        if not c.nullable and values.null_count:
            self._set_aside(base, taken, np.asarray(values.is_null()), name, "missing value", text)
        for outside, cause in _outside(values, c):
            self._set_aside(base, taken, outside, name, cause, text)
        return values

    def _set_aside(
        self, base: int, taken: np.ndarray, mask: np.ndarray | None, column: str | None, cause: str, cells: pa.Array
    ) -> None:
        """Marks rows as taken; a row has one cause, the first that was found."""
        if mask is None:
            return
        new = mask & ~taken
        if new.any():
            taken |= new
            self.bad.append((np.flatnonzero(new) + base, column, cause, cells.filter(pa.array(new)).to_pylist()))


def _outside(values: pa.Array, c: Column) -> Iterable[tuple[np.ndarray, str]]:
    if c.minimum is not None:
        yield np.asarray(pc.less(values, c.minimum).fill_null(False)), f"below {c.minimum:g}"
    if c.maximum is not None:
        yield np.asarray(pc.greater(values, c.maximum).fill_null(False)), f"above {c.maximum:g}"


def _rejects(label: str, lines: np.ndarray, column: str | None, cause: str, values: Sequence[object]) -> pa.Table:
    n = len(lines)
    return pa.table(
        [
            pa.array([label] * n, pa.string()),
            pa.array(lines, pa.int64()),
            pa.array([column] * n, pa.string()),
            pa.array([cause] * n, pa.string()),
            pa.array([_shown(v) for v in values], pa.string()),
        ],
        schema=SCHEMAS["rejects"],
    )


def _shown(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")[:SHOWN]
    return None if value is None else str(value)[:SHOWN]


def duplicated(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """Mask of rows that repeat an earlier row in all the columns (nulls equal each other); the first is not masked."""
    key = np.zeros(len(columns[0]), np.int64)
    size = 1
    for column in columns:
        code, many = codes(column)
        if size > 2**62 // max(many, 1):
            key, uniques = pd.factorize(key)
            size = len(uniques)
        key = key * many + code
        size *= many
    mask: np.ndarray = pd.Series(key).duplicated().to_numpy()
    return mask


def codes(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Equal numbers for equal values, from 0 (null), and how many there can be."""
    encoded = column.dictionary_encode().unify_dictionaries()
    parts = [c.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False) + 1 for c in encoded.chunks]
    found = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return found, int(found.max(initial=0)) + 1


def constant(value: object, n: int, kind: pa.DataType) -> pa.ChunkedArray:
    """A column with one value everywhere, made of shared pieces: no memory, whatever its length."""
    size = max(1, min(n, _CHUNK))
    piece = pa.nulls(size, kind) if value is None else pa.array([value] * size, kind)
    chunks = [piece] * (n // size) + ([piece.slice(0, n % size)] if n % size else [])
    return pa.chunked_array(chunks, kind)


def build(name: str, n: int, **columns: pa.ChunkedArray | pa.Array) -> pa.Table:
    """A table of `records.SCHEMAS[name]` with n rows; columns that are not given are null."""
    full = {f.name: columns.get(f.name) for f in SCHEMAS[name]}
    filled = {k: constant(None, n, SCHEMAS[name].field(k).type) if v is None else v for k, v in full.items()}
    return conform(pa.table(filled), name)


def joined(*parts: pa.ChunkedArray | str) -> pa.ChunkedArray:
    """Joins columns and texts to one text a row; null where a part is null."""
    columns = [p if isinstance(p, str) else p.cast(pa.string()) for p in parts]
    return pc.binary_join_element_wise(*columns, "")


def facts(n: int, columns: dict[str, pa.ChunkedArray]) -> pa.Array:
    """A map column: name of the fact to its text, for the facts that a row has."""
    offsets, names, values = _gather(n, columns)
    return pa.MapArray.from_arrays(offsets, names, values)


def tag_lists(n: int, columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    """A list column: in each row the texts of the columns, in order, without nulls."""
    offsets, _, values = _gather(n, {str(i): c for i, c in enumerate(columns)})
    return pa.ListArray.from_arrays(offsets, values)


def _gather(n: int, columns: dict[str, pa.ChunkedArray]) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Row by row, the values that are not null: offsets of the rows, names of the columns, values."""
    if not columns:
        return pa.array(np.zeros(n + 1, np.int32)), pa.array([], pa.string()), pa.array([], pa.string())
    stacked = pa.chunked_array([c for col in columns.values() for c in col.cast(pa.string()).chunks], pa.string())
    order = (np.arange(n)[:, None] + n * np.arange(len(columns))).ravel()
    values = stacked.combine_chunks().take(pa.array(order))
    valid = np.asarray(values.is_valid())
    offsets = np.concatenate([[0], np.cumsum(valid.reshape(n, len(columns)).sum(axis=1))]).astype(np.int32)
    names = pa.array(list(columns), pa.string()).take(pa.array(np.tile(np.arange(len(columns)), n)[valid]))
    return pa.array(offsets), names, values.filter(pa.array(valid))


def expand(lists: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """The elements of a list column one by one, the row that each is from, and its place in that row (from 0)."""
    column = lists.combine_chunks()
    parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.searchsorted(parents, parents, side="left")
    return pc.list_flatten(column), parents, np.arange(len(parents)) - starts


def assemble(
    users: pa.Table | None, videos: pa.Table | None, interactions: pa.Table, sheets: Sequence[Sheet], notes: list[str]
) -> SourceTables:
    """Puts a source's tables together.

    A user or video that only the interactions know becomes a bare record: its id, and nothing else. How many is noted.

    Args:
        users: table of `records.SCHEMAS`, or None where the source has none at all.
        videos: as `users`.
        interactions: table of `records.SCHEMAS`.
        sheets: the files that were read, for the account.
        notes: what the source does not have; more are added.
    """
    notes = list(notes)
    users = _with_bare("users", "user_id", users, interactions, notes)
    videos = _with_bare("videos", "video_id", videos, interactions, notes)
    rejects = [t for s in sheets for t in s.rejects]
    return SourceTables(
        users=users,
        videos=videos,
        interactions=interactions,
        rejects=pa.concat_tables(rejects) if rejects else empty("rejects"),
        files={s.label: s.count() for s in sheets},
        notes=notes,
    )


def _with_bare(name: str, key: str, table: pa.Table | None, interactions: pa.Table, notes: list[str]) -> pa.Table:
    ids = interactions[key].unique()
    if table is not None:
        ids = ids.filter(pc.invert(pc.is_in(ids, value_set=table[key].combine_chunks())))
    if not len(ids):
        return empty(name) if table is None else table
    blank = {"tags": pa.array([[]] * len(ids), pa.list_(pa.string()))}
    if name == "users":
        blank["other"] = facts(len(ids), {})
    bare = build(name, len(ids), **{key: pa.chunked_array([ids])}, **blank)
    if table is None:
        notes.append(f"No file describes the {name}: all {len(ids)} are known by their id alone.")
        return bare
    notes.append(f"{len(ids)} {name} occur in interactions only: they are known by their id alone.")
    return pa.concat_tables([table, bare])
