"""Reads a table file into typed columns and accounts for every row that is set aside.

A source declares its columns (`Column`) and gets a `Sheet`: the good rows, their line numbers, and the rejected rows by
cause. It may reject more rows (`Sheet.reject`). `log.Log` makes a log of the sheets of many pieces; `assemble` puts
together the `SourceTables` of a source that is read at once. No row is dropped without a cause.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from sys import maxsize

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.sources import FileCount, SourceTables
from gubs.data.sources.columns import KINDS, RULES, CellRules, Converted, Kind, convert, convert_lists, decode
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import Batch, Blank, RawFile, TextFormat, open_table
from gubs.errors import InputError
from gubs.records import SCHEMAS, Task, conform, empty

LIKED_FROM, DISLIKED_TO = 4.0, 2.0
"""Stars (of 5) from which a rating is a like, and up to which it is a dislike."""

STARS_NOTE = f"liked means {LIKED_FROM:g} stars or more, disliked {DISLIKED_TO:g} or fewer."

_VALUE_CHARS = 200
"""Characters kept of a rejected value."""

_ROWS_NAMED = 3
"""Rejected rows that a refusal names."""

_FILES_NAMED = 4
"""Files without rows that a note names."""

_WORDS_NAMED = 8
"""Words for missing values that a note names."""

_CHUNK = 1 << 18
"""Rows of the shared chunk that a column of one value is made of."""

_NOT_MALFORMED = {"blank line"}


@dataclass(frozen=True)
class Column:
    """A column that a source reads from a file."""

    name: str
    """Our name for it."""
    kind: Kind = "text"
    source: tuple[str, ...] = ()
    """Names that it may have in the file, best first; empty = our name."""
    optional: bool = False
    """The file may lack the column; it is all null then."""
    nullable: bool = True
    """Cells may be missing; otherwise their rows are rejected."""
    minimum: float | None = None
    maximum: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names that it may have in the file."""
        return self.source or (self.name,)


@dataclass(frozen=True)
class Account:
    """What became of the rows of a file; those of its parts add up."""

    rows_in: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Rejected rows by cause."""
    malformed: int = 0
    """Rejected rows that no good file has (duplicates, for example, are normal)."""
    first: tuple[tuple[int, str, str, str], ...] = ()
    """The first few rejected rows: row, column or nothing, cause, value."""
    nulls: dict[str, Counter[str]] = field(default_factory=dict)
    """By column of the file: how often each word for a missing value occurs."""

    def __add__(self, other: "Account") -> "Account":
        names = dict.fromkeys([*self.nulls, *other.nulls])
        return Account(
            self.rows_in + other.rows_in,
            self.rejected + other.rejected,
            self.malformed + other.malformed,
            tuple(sorted(self.first + other.first)[:_ROWS_NAMED]),
            {n: self.nulls.get(n, Counter()) + other.nulls.get(n, Counter()) for n in names},
        )

    def check_quality(self, label: str, max_bad: float) -> None:
        """Refuses the file if too large a share of its rows is malformed.

        Raises:
            InputError: with the first few rejected rows.
        """
        if self.malformed <= max_bad * self.rows_in:
            return
        examples = "; ".join(
            f"row {row}" + (f", column {column!r}" if column else "") + f": {cause} ({value:.80})"
            for row, column, cause, value in self.first
        )
        raise InputError(
            f"{label}: {self.malformed} of {self.rows_in} rows cannot be used, more than the share {max_bad:g} that "
            f"source.max_bad_rows allows. First: {examples}. Fix the file, or raise source.max_bad_rows"
        )


@dataclass
class Sheet:
    """The rows of an input file, of a piece of it, or of several files."""

    label: str
    table: pa.Table
    """The rows that have not been rejected."""
    lines: np.ndarray
    """1-based line (Parquet: row) of each of them."""
    rows_in: int
    rejected: Counter[str] = field(default_factory=Counter)
    rejects: list[pa.Table] = field(default_factory=list)
    max_bad: float = 1.0
    """Share of malformed rows above which the file is refused."""
    malformed: int = 0
    """Rejected rows that no good file has (duplicates, for example, are normal)."""
    names: dict[str, str] = field(default_factory=dict)
    """Our name of each column that the file has -> its name there."""
    unused: list[str] = field(default_factory=list)
    """Columns of the file that were not read."""
    late: tuple[str, ...] = ()
    """Those of them that the file's header did not name (`RawFile.late`)."""
    nulls: dict[str, Counter[str]] = field(default_factory=dict)
    """By column of the file: how often each word for a missing value occurs."""
    labels: pa.Array | None = None
    """For each row the name of its file, if the sheet is of several."""

    def reject(
        self, mask: np.ndarray | pa.ChunkedArray, cause: str, column: str | None = None, malformed: bool = False
    ) -> None:
        """Sets the masked rows aside.

        Args:
            mask: true for rows to set aside; null counts as false.
            cause: why, in a few words.
            column: the column to blame; its values are kept with the rejects.
            malformed: no good file has such rows; with too many of them the file is refused.

        Raises:
            InputError: the share of malformed rows is now above `max_bad`.
        """
        bad = np.asarray(mask.fill_null(False)) if isinstance(mask, pa.ChunkedArray) else mask
        if not bad.any():
            return
        values = [None] * int(bad.sum()) if column is None else self.table[column].filter(pa.array(bad)).to_pylist()
        labels = None if self.labels is None else self.labels.filter(pa.array(bad))
        self.record(self.lines[bad], column, cause, values, malformed, labels)
        self.table = self.table.filter(pa.array(~bad))
        self.lines = self.lines[~bad]
        if self.labels is not None:
            self.labels = self.labels.filter(pa.array(~bad))
        if malformed:
            self.check_quality()

    def reject_duplicates(self, *key: str) -> None:
        """Sets aside the rows that repeat an earlier row in all these columns; the last one is blamed."""
        self.reject(duplicated([self.column(name) for name in key]), "duplicate", key[-1])

    def record(
        self,
        lines: np.ndarray,
        column: str | None,
        cause: str,
        values: Sequence[object],
        malformed: bool,
        labels: pa.Array | None = None,
    ) -> None:
        """Adds rows to the rejects; they must not be in the table."""
        self.malformed += len(lines) * malformed
        self.rejected[cause] += len(lines)
        n = len(lines)
        files = [self.label] * n if labels is None else labels.cast(pa.string())
        columns = [files, lines, [column] * n, [cause] * n, [_excerpt(v) for v in values]]
        self.rejects.append(pa.table(columns, schema=SCHEMAS["rejects"]))

    def check_quality(self) -> None:
        """Refuses the file if too large a share of its rows is malformed.

        Raises:
            InputError: with the first few rejected rows.
        """
        self.account().check_quality(self.label, self.max_bad)

    def account(self) -> Account:
        """What became of the rows so far."""
        rows = (r for t in self.rejects for r in t.slice(0, _ROWS_NAMED).to_pylist())
        first = sorted((r["row"], r["column"] or "", r["cause"], repr(r["value"])) for r in rows)
        return Account(self.rows_in, self.rejected, self.malformed, tuple(first[:_ROWS_NAMED]), self.nulls)

    def counts(self) -> dict[str, FileCount]:
        """The account of each of its files, once everything is rejected that is to be."""
        if self.labels is None:
            return {self.label: FileCount(self.rows_in, self.table.num_rows, dict(self.rejected))}
        return file_counts(self.labels, self.rejects)

    def column(self, name: str) -> pa.ChunkedArray:
        """The column of this (our) name."""
        return self.table[name]


def read_sheet(
    file: Path | InputFile,
    columns: Sequence[Column],
    max_bad: float,
    text: TextFormat | None = None,
    rules: CellRules = RULES,
) -> Sheet:
    """Reads columns of a file and converts them to their kinds.

    Args:
        file: a .csv, .tsv, .jsonl or .parquet file (text may be packed), or any text file if `text` is given.
        columns: what to read; other columns are ignored and listed in `Sheet.unused`.
        max_bad: share of malformed rows above which the file is refused (`source.max_bad_rows`).
        text: delimiter, header, quoting and encoding, if the suffix does not tell them.
        rules: what cells mean.

    Raises:
        InputError: missing or empty file, missing column, or too many malformed rows; names file, row, column, remedy.
    """
    return read_raw(open_table(file, text), columns, max_bad, rules)


def read_raw(raw: RawFile, columns: Sequence[Column], max_bad: float, rules: CellRules = RULES) -> Sheet:
    """`read_sheet` of an open file."""
    (sheet,) = read_blocks(raw, columns, rules, maxsize)
    refuse_empty(sheet.label, sheet.rows_in)
    sheet.max_bad = max_bad
    sheet.check_quality()
    return sheet


def refuse_empty(label: str, rows_in: int, files: int = 1) -> None:
    """Refuses a file, or a table of several files, without rows.

    Raises:
        InputError: it has none.
    """
    if not rows_in and files > 1:
        raise InputError(f"{label}: none of them has a row; copy the files again from their origin")
    if not rows_in:
        raise InputError(f"{label}: row 1: a header and no rows below it; copy the file again from its origin")


def empty_note(table: str, rows_in: Mapping[str, int]) -> list[str]:
    """Which files of a table have no rows; nothing if all have some.

    Args:
        table: its name.
        rows_in: by the name of the file.
    """
    files = [label for label, rows in rows_in.items() if not rows]
    shown = ", ".join(files[:_FILES_NAMED]) + (" ..." if len(files) > _FILES_NAMED else "")
    return [f"{len(files)} of {len(rows_in)} files of {table} have no rows: {shown}."] if files else []


def read_blocks(raw: RawFile, columns: Sequence[Column], rules: CellRules, rows: int) -> Iterator[Sheet]:
    """The file in sheets of about this many rows, in order; at least one. What `read_sheet` refuses is left to the
    caller, who adds up their accounts.

    Raises:
        InputError: a column is missing, or cannot be read at all.
    """
    names = {} if isinstance(raw, Blank) else match_columns(raw.label, raw.header, columns)
    for sheet in _SheetReader(raw, columns, names, rules).sheets(rows):
        seen = (*raw.header, *raw.late)
        sheet.unused = [n for n in seen if n not in names.values() and not n.startswith("(unnamed")]
        sheet.late = tuple(raw.late)
        yield sheet


def together(sheets: Sequence[Sheet], label: str) -> Sheet:
    """The sheets of several files as one; the sheet itself if it is one."""
    if len(sheets) == 1:
        return sheets[0]
    labels = pa.concat_arrays([constant(s.label, len(s.lines), pa.string()).combine_chunks() for s in sheets])
    return Sheet(
        label=label,
        table=pa.concat_tables([s.table for s in sheets]),
        lines=np.concatenate([s.lines for s in sheets]),
        rows_in=sum(s.rows_in for s in sheets),
        rejected=sum((s.rejected for s in sheets), Counter[str]()),
        rejects=[t for s in sheets for t in s.rejects],
        malformed=sum(s.malformed for s in sheets),
        names={ours: theirs for s in reversed(sheets) for ours, theirs in s.names.items()},
        unused=list(dict.fromkeys(n for s in sheets for n in s.unused)),
        nulls=sum((s.account() for s in sheets), Account()).nulls,
        labels=labels,
    )


def file_counts(kept: pa.Array, rejects: Sequence[pa.Table]) -> dict[str, FileCount]:
    """The account of each file, from the file of each row that stays and from the rejects."""
    out = {v["values"]: v["counts"] for v in pc.value_counts(kept).to_pylist()}
    rejected = by_cause(rejects)
    causes = {name: rejected.get(name, Counter[str]()) for name in sorted(out.keys() | rejected.keys())}
    return {n: FileCount(out.get(n, 0) + c.total(), out.get(n, 0), dict(c)) for n, c in causes.items()}


def by_cause(rejects: Sequence[pa.Table]) -> dict[str, Counter[str]]:
    """How many rows of each file were rejected, by cause."""
    causes: dict[str, Counter[str]] = {}
    for table in rejects:
        for row in table.group_by(["file", "cause"]).aggregate([([], "count_all")]).to_pylist():
            causes.setdefault(row["file"], Counter[str]())[row["cause"]] += row["count_all"]
    return causes


def match_columns(label: str, header: Sequence[str], columns: Sequence[Column]) -> dict[str, str]:
    """Our name to the file's name, for the columns that the file has.

    Raises:
        InputError: it lacks one that it must have.
    """
    names = {}
    for c in columns:
        name = next((n for n in c.names if n in header), None)
        if name is not None:
            names[c.name] = name
        elif not c.optional:
            raise InputError(
                f"{label}: row 1: no column {' or '.join(map(repr, c.names))}; the file has "
                f"{', '.join(map(repr, header))}. Rename the column (or, in your own logs, map it with "
                f"source.columns.{c.name}=NAME)"
            )
    return names


class _SheetReader:
    """Converts a raw file's batches and gathers them into a sheet."""

    def __init__(self, raw: RawFile, columns: Sequence[Column], names: dict[str, str], rules: CellRules) -> None:
        self.raw, self.columns, self.names, self.rules = raw, columns, names, rules
        self._begin()

    def _begin(self) -> None:
        self.nulls: dict[str, Counter[str]] = {}
        self.good: list[pa.Table] = []
        self.positions: list[np.ndarray] = []
        self.rejects: list[tuple[np.ndarray, str | None, str, list[object]]] = []
        self.rows = 0

    def sheets(self, rows: int) -> Iterator[Sheet]:
        """Sheets of at least `rows` rows, except the last, which has the broken rows too."""
        base = 0
        for batch in self.raw.batches(list(dict.fromkeys(self.names.values()))):
            if self.rows >= rows:
                yield self._sheet()
            self._add(batch, base)
            base += batch[0].num_rows
            self.rows += batch[0].num_rows
        sheet = self._sheet()
        broken = self.raw.broken_rows()
        sheet.rows_in += len(broken)
        for row in broken:
            sheet.record(np.array([row.line]), None, row.cause, [row.text], row.cause not in _NOT_MALFORMED)
        yield sheet

    def _sheet(self) -> Sheet:
        """What was added since the last one."""
        schema = pa.schema([(c.name, KINDS[c.kind][0]) for c in self.columns])
        table = pa.concat_tables(self.good) if self.good else schema.empty_table()
        positions = np.concatenate([np.zeros(0, np.int64), *self.positions])
        sheet = Sheet(self.raw.label, table, self.raw.lines(positions), self.rows)
        sheet.names, sheet.nulls = self.names, self.nulls
        for at, column, cause, values in self.rejects:
            sheet.record(self.raw.lines(at), column, cause, values, cause not in _NOT_MALFORMED)
        self._begin()
        return sheet

    def _add(self, raw: Batch, base: int) -> None:
        batch, flags = raw
        rejected = np.zeros(batch.num_rows, bool)
        for cause, mask in flags.items():
            self._reject(base, rejected, mask, None, cause, batch.column(batch.num_columns - 1))
        converted = [self._converted(batch, c, base, rejected) for c in self.columns]
        table = pa.table(converted, names=[c.name for c in self.columns])
        self.good.append(table.filter(pa.array(~rejected)) if rejected.any() else table)
        self.positions.append(base + np.flatnonzero(~rejected))

    def _converted(self, batch: pa.RecordBatch, c: Column, base: int, rejected: np.ndarray) -> pa.Array:
        dtype, misfit = KINDS[c.kind]
        if c.name not in self.names:
            return pa.nulls(batch.num_rows, dtype)
        name = self.names[c.name]
        cells = batch.column(batch.schema.get_field_index(name))
        text, undecodable = decode(cells)
        self._reject(base, rejected, undecodable, name, "not UTF-8 text", cells)
        values, unfit = self._convert(text, c, name)
        self._reject(base, rejected, unfit, name, misfit, text)
        if not c.nullable and values.null_count:
            self._reject(base, rejected, np.asarray(values.is_null()), name, "missing value", text)
        for outside, cause in _outside(values, c):
            self._reject(base, rejected, outside, name, cause, text)
        return values

    def _convert(self, text: pa.Array, c: Column, name: str) -> Converted:
        words = Counter[str]()
        try:
            if c.kind == "texts":
                (values, unfit), words = convert_lists(text, self.rules)
            else:
                values, unfit = convert(text, c.kind, self.rules)
        except (pa.ArrowException, TypeError, ValueError, KeyError) as e:
            raise InputError(
                f"{self.raw.label}: column {name!r}: its type {text.type} cannot be read as {c.kind} ({e}); write "
                f"text or numbers"
            ) from None
        if c.kind != "text" and values.null_count:
            words += self.rules.words(text)
        if words:
            self.nulls.setdefault(name, Counter()).update(words)
        return values, unfit

    def _reject(
        self, base: int, rejected: np.ndarray, mask: np.ndarray | None, column: str | None, cause: str, cells: pa.Array
    ) -> None:
        """Marks rows as rejected; a row keeps its first cause."""
        if mask is None:
            return
        new = mask & ~rejected
        if new.any():
            rejected |= new
            self.rejects.append((np.flatnonzero(new) + base, column, cause, cells.filter(pa.array(new)).to_pylist()))


def null_note(label: str, nulls: Mapping[str, Counter[str]]) -> str | None:
    """Which cells of a file count as missing because of a word in them (`Account.nulls`); None if there are none."""
    if not nulls:
        return None
    words = sum(nulls.values(), Counter[str]())
    shown = ", ".join(repr(word) for word, _ in words.most_common(_WORDS_NAMED))
    columns = ", ".join(f"{name} {sum(counts.values()):,}" for name, counts in nulls.items())
    return f"{sum(words.values()):,} cells of {label} count as missing, since they say {shown} ({columns})."


def _outside(values: pa.Array, c: Column) -> Iterator[tuple[np.ndarray, str]]:
    if c.minimum is not None:
        yield np.asarray(pc.less(values, c.minimum).fill_null(False)), f"below {c.minimum:g}"
    if c.maximum is not None:
        yield np.asarray(pc.greater(values, c.maximum).fill_null(False)), f"above {c.maximum:g}"


def _excerpt(value: object) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return None if value is None else str(value)[:_VALUE_CHARS]


def duplicated(columns: Sequence[pa.ChunkedArray]) -> np.ndarray:
    """Mask of rows that repeat an earlier row in all the columns (nulls equal each other); the first is not masked."""
    mask: np.ndarray = pd.DataFrame({i: codes(c) for i, c in enumerate(columns)}).duplicated().to_numpy()
    return mask


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """Equal numbers for equal values; 0 for null."""
    # One chunk first: each of many gets a dictionary of all values before it, and to unify these takes far longer.
    whole = column.combine_chunks()
    chunked = whole if isinstance(whole, pa.ChunkedArray) else pa.chunked_array([whole])
    encoded = chunked.dictionary_encode().unify_dictionaries()
    parts = [c.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False) + 1 for c in encoded.chunks]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def constant(value: object, n: int, kind: pa.DataType) -> pa.ChunkedArray:
    """A column that repeats one value. Its chunks are shared, so its length costs no memory."""
    size = max(1, min(n, _CHUNK))
    chunk = pa.nulls(size, kind) if value is None else pa.array([value] * size, kind)
    return pa.chunked_array([chunk] * (n // size) + [chunk.slice(0, n % size)], kind)


def build(name: str, n: int, **columns: pa.ChunkedArray | pa.Array) -> pa.Table:
    """A table of `records.SCHEMAS[name]` with n rows; columns that are not given are null."""
    missing = {f.name: constant(None, n, f.type) for f in SCHEMAS[name] if f.name not in columns}
    return conform(pa.table(columns | missing), name)


def clicks(rows: pa.Table, *key: str) -> pa.Table:
    """Interactions of a source that knows only what its users chose: rows of the click task, all of them clicked.

    Args:
        rows: user_id and video_id, and if known timestamp and rating (stars, which give liked and disliked).
        key: columns that make the interactions' ids.
    """
    n = rows.num_rows
    ids = pc.binary_join_element_wise(*(pc.fill_null(rows[name].cast(pa.string()), "") for name in key), "-")
    columns = {name: rows[name] for name in ("user_id", "video_id", "timestamp", "rating") if name in rows.column_names}
    if "rating" in columns:
        columns["liked"] = pc.greater_equal(columns["rating"], LIKED_FROM)
        columns["disliked"] = pc.less_equal(columns["rating"], DISLIKED_TO)
    task, clicked = constant(Task.CLICK.value, n, pa.string()), constant(True, n, pa.bool_())
    return build("interactions", n, interaction_id=ids, task=task, clicked=clicked, **columns)


def click_sequences(users: pa.ChunkedArray, videos: pa.ChunkedArray) -> pa.Table:
    """`clicks` of a source that knows each user's videos in order (a column of lists), but not their times."""
    lists = videos.combine_chunks()
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    positions = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
    columns = {"user_id": pc.take(users, pa.array(rows)), "position": positions, "video_id": pc.list_flatten(lists)}
    return clicks(pa.table(columns), "user_id", "position")


def joined(*parts: pa.ChunkedArray | str) -> pa.ChunkedArray:
    """Joins columns and texts to one text per row; null if a part is null."""
    columns = [p if isinstance(p, str) else p.cast(pa.string()) for p in parts]
    return pc.binary_join_element_wise(*columns, "")


def facts(n: int, columns: dict[str, pa.ChunkedArray]) -> pa.Array:
    """A map column: in each row the names and texts of the columns that are not null there."""
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


def assemble(
    users: pa.Table | None, videos: pa.Table | None, interactions: pa.Table, sheets: Sequence[Sheet], notes: list[str]
) -> SourceTables:
    """Puts a source's tables together.

    Users and videos that occur only in interactions become bare records: an id and nothing else. A note counts them.

    Args:
        users: table of `records.SCHEMAS`, or None if the source has none at all.
        videos: as `users`.
        interactions: table of `records.SCHEMAS`.
        sheets: the files that were read, for the account.
        notes: what the source lacks; more are added.
    """
    notes = list(notes)
    rejects = [t for s in sheets for t in s.rejects]
    return SourceTables(
        users=_with_bare("users", "user_id", users, interactions, notes),
        videos=_with_bare("videos", "video_id", videos, interactions, notes),
        interactions=interactions,
        rejects=pa.concat_tables(rejects) if rejects else empty("rejects"),
        files={label: count for s in sheets for label, count in s.counts().items()},
        notes=notes,
    )


def _with_bare(name: str, key: str, table: pa.Table | None, interactions: pa.Table, notes: list[str]) -> pa.Table:
    ids = interactions[key].unique()
    bare = bare_records(name, key, ids, table)
    notes += bare_notes(name, bare.num_rows, table is not None)
    return bare if table is None else pa.concat_tables([table, bare])


def bare_records(name: str, key: str, ids: pa.Array, table: pa.Table | None) -> pa.Table:
    """Records of the ids that a table lacks, by id: they have nothing else."""
    if table is not None:
        ids = ids.filter(pc.invert(pc.is_in(ids, value_set=table[key].combine_chunks())))
    ids = ids.take(pc.sort_indices(ids))
    blank = {"tags": tag_lists(len(ids), [])} | ({"other": facts(len(ids), {})} if name == "users" else {})
    return build(name, len(ids), **{key: pa.chunked_array([ids], pa.string())}, **blank) if len(ids) else empty(name)


def bare_notes(name: str, bare: int, described: bool) -> list[str]:
    """How many users (videos) are known by their id alone; nothing if none is.

    Args:
        name: `users` or `videos`.
        bare: how many.
        described: whether a file describes others.
    """
    if not bare:
        return []
    if described:
        return [f"{bare} {name} occur in interactions only: they are known by their id alone."]
    return [f"No file describes the {name}: all {bare} are known by their id alone."]
