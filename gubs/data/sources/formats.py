"""Opens a table file - delimited text, JSON lines or Parquet, gzipped or not - as batches of raw columns.

Arrow reads delimited text as bytes, block by block, so that one bad byte or value cannot spoil a whole file; line
numbers are exact, even if quoted values span several lines. Broken rows (too few or too many values, a quote that is
never closed, invalid JSON) are kept apart with their line and text.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from gubs.data.sources.columns import EXACT
from gubs.data.sources.files import InputFile
from gubs.errors import InputError

BLOCK_BYTES = 8 << 20
"""Bytes read at once; a single row must be shorter."""

_JSON_BYTES = 64 << 20
"""Bytes of a block of JSON lines."""
_JSON_HEAD_BYTES = 4 << 20
"""Bytes of JSON lines that tell the names of the columns, until all rows are read."""

_SAMPLE_BYTES = 1 << 16
"""Bytes at the start of a text file that say how long its lines are."""
_PACKED = 4
"""About how many times smaller packed text is."""

_BROKEN_CHARS = 1000
_NUL_SHARE = 0.01
"""A file with a larger share of NUL bytes is not a text file; a few cost only their rows."""
_OPEN_QUOTE = "quote left open"
_SEPARATOR = "\x1f"
"""Replaces a delimiter of several characters (`::`), which Arrow does not support. Text files do not contain it."""


@dataclass(frozen=True)
class TextFormat:
    """How a delimited file is written."""

    delimiter: str = ","
    header: tuple[str, ...] = ()
    """Names of the columns, if the file has no header line."""
    quoted: bool = True
    encoding: str = "utf-8"
    """`utf-8` (checked cell by cell), or an 8-bit encoding such as `latin-1`."""


@dataclass(frozen=True)
class BrokenRow:
    """A row that could not be split into columns."""

    line: int
    cause: str
    text: str


Batch = tuple[pa.RecordBatch, dict[str, np.ndarray]]
"""Raw columns, and masks of the rows that are unusable as a whole, by cause."""


@dataclass
class RawFile:
    """An open table file: its column names, its batches, and its broken rows (complete after the last batch)."""

    file: InputFile
    header: list[str] = field(default_factory=list)
    broken: list[BrokenRow] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    """Names that occur in the batches so far but not in the header (JSON lines only)."""

    @property
    def label(self) -> str:
        """Name of the file in messages and accounts."""
        return self.file.label

    def batches(self, names: list[str]) -> Iterator[Batch]:
        """Yields the rows as raw columns, in order; columns that are not in `names` may be missing."""
        raise NotImplementedError

    def broken_rows(self) -> list[BrokenRow]:
        """The broken rows with their lines; call it after the last batch."""
        return self.broken

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """1-based line (Parquet: row) of the yielded rows at these positions (from 0)."""
        return rows + 1


@dataclass
class Blank(RawFile):
    """A text file without any text: it has no header and no rows."""

    def batches(self, names: list[str]) -> Iterator[Batch]:  # noqa: ARG002
        """Yields nothing."""
        yield from ()


def open_table(
    file: Path | InputFile,
    text: TextFormat | None = None,
    groups: range | None = None,
    names: Sequence[str] = (),
    whole: bool = True,
) -> RawFile:
    """Opens a file according to its suffix, or as delimited text if `text` is given.

    Args:
        file: the file.
        text: how it is written, if the suffix does not tell.
        groups: only these row groups of a Parquet file.
        names: the header of JSON lines, if it is known.
        whole: see `JsonLines`.

    Raises:
        InputError: the file is missing, empty, of an unknown type, or unreadable.
    """
    file = InputFile.at(file) if isinstance(file, Path) else file
    _refuse_missing(file)
    if file.size() == 0:
        raise InputError(f"{file.label}: the file is empty; copy it again from its origin")
    if text is not None or file.suffix in (".csv", ".tsv"):
        return Delimited(file, text=text or TextFormat("\t" if file.suffix == ".tsv" else ","))
    if file.suffix == ".jsonl":
        return JsonLines(file, list(names), whole=whole)
    if file.suffix == ".parquet":
        return Parquet(file, groups=groups)
    raise InputError(
        f"{file.label}: unknown file type; give .csv, .tsv, .jsonl or .parquet (the first three also as .gz or .zst)"
    )


def open_part(file: InputFile, groups: range | None = None, names: Sequence[str] = (), whole: bool = True) -> RawFile:
    """As `open_table`, for a file of a table in parts: a text file without any text is a part without rows. Writers
    leave such files where a partition is empty.

    Args:
        file: the file.
        groups: only these row groups of a Parquet file.
        names: the header of JSON lines, if it is known.
        whole: see `JsonLines`.

    Raises:
        InputError: see `open_table`; an empty file is not a Parquet file.
    """
    return Blank(file) if _is_blank(file) else open_table(file, groups=groups, names=names, whole=whole)


def _is_blank(file: InputFile) -> bool:
    """Whether a text file has nothing but white space."""
    _refuse_missing(file)
    if file.suffix == ".parquet":
        return False
    if not file.size():
        return True
    with _readable(file.label, "cannot be unzipped"), file.stream() as stream:
        start = bytes(stream.read(_SAMPLE_BYTES)).removeprefix(b"\xef\xbb\xbf")
        return not start.strip() and not any(
            part.strip() for part in iter(lambda: bytes(stream.read(BLOCK_BYTES)), b"")
        )


def _refuse_missing(file: InputFile) -> None:
    if not file.exists():
        raise InputError(f"{file.label}: no such file; put it there, or point source.path at the folder that has it")


def rows_about(file: InputFile) -> int:
    """About how many rows a text file has, judging by the lines at its start.

    Raises:
        InputError: it is missing, or cannot be unzipped.
    """
    _refuse_missing(file)
    with _readable(file.label, "cannot be unzipped"), file.stream() as stream:
        start = bytes(stream.read(_SAMPLE_BYTES))
    lines = max(1, start.count(b"\n"), start.count(b"\r"))
    return math.ceil(file.size() * (_PACKED if file.zipped else 1) * lines / max(1, len(start)))


def guess_encoding(path: Path) -> str:
    """`utf-8` if the whole (small) file is valid UTF-8, else `latin-1`."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _refuse_repeated(where: str, names: list[str]) -> None:
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(f"{where}: the header names column {repeated[0]!r} twice; rename one of them")


@contextmanager
def _readable(label: str, problem: str) -> Iterator[None]:
    """Turns errors of reading into an InputError that names the file."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as e:
        raise InputError(f"{label}: {problem} ({e}); copy it again from its origin") from None


class _Bytes:
    """A readable stream: the file unzipped, transcoded, with one-character delimiters; remembers how it ends."""

    def __init__(self, file: InputFile, text: TextFormat) -> None:
        self.stream = file.stream()
        self.text = text
        self.tail = b""
        self.pending = b""
        self.has_nul = False
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        """The next bytes; empty only at the end."""
        while True:
            raw = bytes(self.stream.read(size if size > 0 else BLOCK_BYTES))
            block = self._transcoded(raw)
            if block or not raw:
                self.tail = (self.tail + block)[-2 * BLOCK_BYTES :]
                return block

    def _transcoded(self, raw: bytes) -> bytes:
        """Holds back what depends on the next bytes: half a delimiter, or a CR whose LF Arrow would drop."""
        block = self.pending + (raw if self.text.encoding == "utf-8" else raw.decode(self.text.encoding).encode())
        self.has_nul = self.has_nul or b"\0" in block
        ambiguous = [b"\r"]
        if len(self.text.delimiter) > 1:
            block = block.replace(self.text.delimiter.encode(), _SEPARATOR.encode())
            ambiguous.append(self.text.delimiter[:1].encode())
        end = len(block) - int(bool(raw) and block.endswith(tuple(ambiguous)))
        self.pending = block[end:]
        return block[:end]

    def close(self) -> None:
        self.stream.close()
        self.closed = True


@dataclass
class Delimited(RawFile):
    """Delimited text, read by Arrow as bytes."""

    text: TextFormat = field(default_factory=TextFormat)

    def __post_init__(self) -> None:
        self._broken_ordinals: list[int] = []  # from 0 after the header
        self._spans: list[tuple[int, int]] = []  # (ordinal of a row, line breaks inside it)
        self._delimiter = self.text.delimiter if len(self.text.delimiter) == 1 else _SEPARATOR
        self._header_lines = 0 if self.text.header else 1
        start = self._start()
        self.header = list(self.text.header) or self._read_header(start)

    def _start(self) -> bytes:
        with (
            _readable(self.label, "cannot be unzipped"),
            self.file.stream() as stream,
        ):
            start = bytes(stream.read(_SAMPLE_BYTES))
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{self.label}: row 1: the file is in UTF-16; save it as UTF-8")
        if b"\0" in start.split(b"\n", 1)[0] or start.count(b"\0") > len(start) * _NUL_SHARE:
            raise InputError(
                f"{self.label}: row 1: not a text file; give .csv, .tsv or .jsonl text, or a .parquet file"
            )
        if not start.strip():
            raise InputError(f"{self.label}: the file is empty; copy it again from its origin")
        return start

    def _read_header(self, start: bytes) -> list[str]:
        try:
            line = start.replace(b"\r", b"\n").split(b"\n", 1)[0].decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise InputError(
                f"{self.label}: row 1: the header is not UTF-8 ({e.reason}); save the file as UTF-8"
            ) from None
        names = [n.strip() for n in next(csv.reader([line], delimiter=self._delimiter), [])]
        _refuse_repeated(f"{self.label}: row 1", [n for n in names if n])
        return [n or f"(unnamed {i})" for i, n in enumerate(names)]

    def batches(self, names: list[str]) -> Iterator[Batch]:  # noqa: ARG002
        """Yields the rows as columns of bytes."""
        source = _Bytes(self.file, self.text)
        try:
            last: Batch | None = None
            base = 0
            for batch in self._arrow_batches(source):
                if last is not None:
                    yield last
                last = batch, self._flag(batch, base)
                if source.has_nul:
                    nuls = sum((_count(c, b"\0") for c in batch.columns), np.zeros(1, np.int64))
                    last[1]["NUL byte"] = np.broadcast_to(nuls > 0, batch.num_rows)
                base += batch.num_rows
            if last is not None:
                self._flag_open_end(last, source.tail)
                yield last
        except (pa.ArrowInvalid, OSError) as e:
            raise InputError(f"{self.label}: {_explanation(str(e))}") from None
        finally:
            source.close()

    def _arrow_batches(self, source: _Bytes) -> Iterator[pa.RecordBatch]:
        read = pa_csv.ReadOptions(
            use_threads=False, block_size=BLOCK_BYTES, column_names=self.header, skip_rows=self._header_lines
        )
        parse = pa_csv.ParseOptions(
            delimiter=self._delimiter,
            quote_char='"' if self.text.quoted else False,
            newlines_in_values=self.text.quoted,
            ignore_empty_lines=False,
            invalid_row_handler=self._set_aside,
        )
        convert = pa_csv.ConvertOptions(column_types=dict.fromkeys(self.header, pa.binary()))
        try:
            reader = pa_csv.open_csv(pa.PythonFile(source, mode="r"), read, parse, convert)
        except pa.ArrowInvalid as e:
            if "Empty CSV" in str(e) or "Could not skip" in str(e):  # nothing but a header
                return
            raise
        yield from (batch for batch in reader if batch.num_rows)

    def _set_aside(self, row: pa_csv.InvalidRow) -> str:
        ordinal = row.number - 1 - self._header_lines
        cause = "too few values" if row.actual_columns < row.expected_columns else "too many values"
        self._broken_ordinals.append(ordinal)
        if breaks := row.text.count("\n"):
            self._spans.append((ordinal, breaks))
        self.broken.append(BrokenRow(ordinal, cause, row.text[:_BROKEN_CHARS]))
        return "skip"

    def _flag(self, batch: pa.RecordBatch, base: int) -> dict[str, np.ndarray]:
        flags: dict[str, np.ndarray] = {}
        sizes = (pc.binary_length(c).to_numpy(zero_copy_only=False) for c in batch.columns)
        empty = next(sizes) == 0
        if empty.any() and batch.num_columns > 1:
            flags["blank line"] = empty & (np.sum(list(sizes), axis=0) == 0)
        breaks = sum((_count(c, b"\n") for c in batch.columns), np.zeros(1, np.int64))
        rows = np.flatnonzero(breaks)
        if len(rows):
            self._spans += zip(self._ordinals(base + rows).tolist(), breaks[rows].tolist(), strict=True)
            # A stray quote swallows lines up to the next one, and leaves that one's partner at the end of the value.
            stray = [
                (_count(c, b'"') % 2 == 1) & (_count(c, b"\n") > 0) & np.asarray(pc.ends_with(c, b'"').fill_null(False))
                for c in batch.columns
            ]
            flags[_OPEN_QUOTE] = np.any([np.broadcast_to(m, batch.num_rows) for m in stray], axis=0)
        return flags

    def _flag_open_end(self, last: Batch, tail: bytes) -> None:
        """Flags the file's last row if its last value's quote is open; Arrow takes it for a value."""
        batch, flags = last
        value = batch.column(batch.num_columns - 1)[-1].as_py() or b""
        ending = b'"' + value.replace(b'"', b'""')
        if self.text.quoted and tail.endswith((self._delimiter.encode() + ending, b"\n" + ending, b"\r" + ending)):
            mask = flags.setdefault(_OPEN_QUOTE, np.zeros(batch.num_rows, bool))
            mask[-1] = True

    def _ordinals(self, rows: np.ndarray) -> np.ndarray:
        """Positions in the file, from 0 after the header and counting broken rows, of the yielded rows."""
        broken = np.sort(np.array(self._broken_ordinals, np.int64))
        return rows + np.searchsorted(broken - np.arange(len(broken)), rows, side="right")

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """1-based line on which each of the yielded rows begins."""
        return self._lines_of(self._ordinals(rows))

    def _lines_of(self, ordinals: np.ndarray) -> np.ndarray:
        spans = np.array(sorted(self._spans), np.int64).reshape(-1, 2)
        extra = np.concatenate([[0], np.cumsum(spans[:, 1])])[np.searchsorted(spans[:, 0], ordinals, side="left")]
        lines: np.ndarray = ordinals + 1 + self._header_lines + extra
        return lines

    def broken_rows(self) -> list[BrokenRow]:
        """The broken rows with their lines; those in `self.broken` have ordinals instead."""
        lines = self._lines_of(np.array([b.line for b in self.broken], np.int64))
        return [BrokenRow(int(line), b.cause, b.text) for line, b in zip(lines, self.broken, strict=True)]


def _explanation(message: str) -> str:
    if "straddl" in message:
        return f"a row is longer than {BLOCK_BYTES >> 20} MB: look for a quote that is never closed ({message})"
    return f"cannot be read ({message}); copy it again from its origin"


def _count(column: pa.Array, byte: bytes) -> np.ndarray:
    """Occurrences of a byte in each value; a single zero if it is in none (usual, and found without splitting)."""
    data = column.buffers()[2]
    if data is None or not (np.frombuffer(data, np.uint8) == byte[0]).any():
        return np.zeros(1, np.int64)
    counts: np.ndarray = pc.count_substring(column, byte).fill_null(0).to_numpy(zero_copy_only=False)
    return counts.astype(np.int64)


@dataclass
class JsonLines(RawFile):
    """One JSON object per line, in blocks of whole lines. Arrow reads a block; if Arrow refuses it, or cannot hold a
    number exactly, it is read line by line, which finds the bad lines.

    Any line may name new columns, so only a pass over the whole file tells all of them. Callers that can do without
    them until the rows are read open the file by its start, and look at `late` afterwards.
    """

    whole: bool = True
    """Whether the header, if it is not given, has the names of all lines, or of the first ones."""

    def __post_init__(self) -> None:
        self._numbers: list[np.ndarray] = []
        self._dates: pa.Schema | None = None  # as text, once a block had them: so the next one is parsed once
        self.header = self.header or self._names()

    def _names(self) -> list[str]:
        names = dict[str, None]()
        for block in self._blocks(_JSON_BYTES if self.whole else _JSON_HEAD_BYTES):
            names |= dict.fromkeys(block.column_names)
            if names and not self.whole:
                break
        if not names:
            example = (
                f", e.g. row {self.broken[0].line} ({self.broken[0].cause}): {self.broken[0].text!r}"
                if self.broken
                else ""
            )
            raise InputError(f"{self.label}: no row holds a JSON object{example}; write one object per line, in UTF-8")
        return list(names)

    def _blocks(self, size: int) -> Iterator[pa.Table]:
        """The rows of each block, at least one; notes their lines, and what is broken."""
        self._numbers, self.broken, first = [], [], 1
        for raw in self._raw_blocks(size):
            table = self._read_at_once(raw)
            if table is None:
                table, lines = self._read_line_by_line(raw, first)
            else:
                lines = table.num_rows
                self._numbers.append(np.arange(first, first + lines))
            first += lines
            yield table

    def _raw_blocks(self, size: int) -> Iterator[bytes]:
        rest, yielded = b"", False
        with _readable(self.label, "cannot be unzipped"), self.file.stream() as stream:
            while part := bytes(stream.read(size)):
                whole, newline, rest = (rest + part).rpartition(b"\n")
                if whole or newline:
                    yielded = True
                    yield whole + newline
        if rest or not yielded:
            yield rest

    def _read_at_once(self, raw: bytes) -> pa.Table | None:
        try:
            table = self._read_typed(raw, self._dates)
            if (as_text := _dates_as_text(table.schema)) != table.schema:
                self._dates = pa.schema([f for f in as_text if f.type != table.schema.field(f.name).type])
                table = self._read_typed(raw, as_text)
        except pa.ArrowInvalid:
            return None
        one_per_line = table.num_rows == raw.count(b"\n") + (not raw.endswith(b"\n"))  # blank lines shift the numbers
        return table if one_per_line and table.num_columns and not _has_rounded(table) else None

    def _read_typed(self, raw: bytes, schema: pa.Schema | None) -> pa.Table:
        options = pa_json.ReadOptions(use_threads=False, block_size=BLOCK_BYTES)
        return pa_json.read_json(pa.BufferReader(raw), options, pa_json.ParseOptions(explicit_schema=schema))

    def _read_line_by_line(self, raw: bytes, first: int) -> tuple[pa.Table, int]:
        lines = (raw.removeprefix(b"\xef\xbb\xbf") if first == 1 else raw).splitlines()
        rows = {n: row for n, line in enumerate(lines, first) if (row := self._parse(n, line)) is not None}
        names = dict.fromkeys(name for row in rows.values() for name in row)
        self._numbers.append(np.array(list(rows), np.int64))
        return pa.table({name: _texts([row.get(name) for row in rows.values()]) for name in names}), len(lines)

    def _parse(self, line: int, raw: bytes) -> dict[str, Any] | None:
        """The object on this line; anything else is a broken row."""
        if not raw.strip():
            self.broken.append(BrokenRow(line, "blank line", ""))
            return None
        try:
            row = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        except UnicodeDecodeError:
            cause = "not UTF-8 text"
        except _RepeatedNameError as e:
            cause = f"names {e.args[0]!r} twice"
        except json.JSONDecodeError:
            cause = "not JSON"
        else:
            if not isinstance(row, dict):
                cause = "not a JSON object"
            elif _has_half_characters(raw, row):
                cause = "not UTF-8 text"
            else:
                return row
        self.broken.append(BrokenRow(line, cause, raw.decode("utf-8", "replace")[:_BROKEN_CHARS]))
        return None

    def batches(self, names: list[str]) -> Iterator[Batch]:
        """Yields the rows as typed columns, or as text if the lines had to be read one by one."""
        for table in self._blocks(_JSON_BYTES):
            self.late += [n for n in table.column_names if n not in self.header and n not in self.late]
            for name in names:
                if name not in table.column_names and table.num_rows:
                    table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
            for batch in table.to_batches():
                yield batch, {}

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """1-based line of each row."""
        return np.concatenate(self._numbers)[rows]


def _has_half_characters(raw: bytes, row: dict[str, Any]) -> bool:
    """Whether an escape stands for half of a character (a surrogate alone), which no text may hold."""
    if b"\\ud" not in raw.lower():
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


class _RepeatedNameError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _RepeatedNameError(name)
    return dict(pairs)


def _dates_as_text(schema: pa.Schema) -> pa.Schema:
    """The schema with text in place of times, which Arrow makes of texts that look like dates."""
    return pa.schema([f.with_type(_date_as_text(f.type)) for f in schema])


def _date_as_text(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_date_as_text(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_date_as_text(f.type)) for f in kind])
    return kind


def _has_rounded(table: pa.Table) -> bool:
    """Whether a number has digits that a float cannot hold, such as an id of more than 64 bits."""
    return any(_rounded(chunk) for column in table.columns for chunk in column.chunks)


def _rounded(values: pa.Array) -> bool:
    if pa.types.is_list(values.type) or pa.types.is_struct(values.type):
        return any(_rounded(part) for part in ([values.values] if pa.types.is_list(values.type) else values.flatten()))
    if not pa.types.is_floating(values.type):
        return False
    return bool((pc.max(pc.abs(values)).as_py() or 0) > EXACT)


def _texts(values: list[Any]) -> pa.Array:
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return pa.array(texts, pa.string())


@dataclass
class Parquet(RawFile):
    """A Parquet file, or some of its row groups."""

    groups: range | None = None

    def __post_init__(self) -> None:
        with _readable(self.label, "not a Parquet file"):
            # Arrow's own threads must not hold a Python file; see docs/notes.md
            self._file = (
                pq.ParquetFile(self.file.uri)
                if self.file.is_local
                else pq.ParquetFile(self.file.open(), pre_buffer=False)
            )
        self.header = self._file.schema_arrow.names
        _refuse_repeated(self.label, self.header)

    @property
    def group_rows(self) -> list[int]:
        """Rows of each row group of the file."""
        metadata = self._file.metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def batches(self, names: list[str]) -> Iterator[Batch]:
        """Yields the columns `names` with the types that they have in the file."""
        groups = None if self.groups is None else list(self.groups)
        with _readable(self.label, "damaged Parquet file"):
            for batch in self._file.iter_batches(1 << 18, groups, names, use_threads=self.file.is_local):
                yield batch, {}

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """1-based row of the file."""
        return rows + 1 + (sum(self.group_rows[: self.groups.start]) if self.groups else 0)
