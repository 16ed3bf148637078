"""Opens a table file - delimited text, JSON lines or Parquet, gzipped or not - as batches of raw columns.

Delimited text is read by Arrow as bytes, block by block, so that one bad byte or value cannot spoil a whole file; lines
are numbered exactly, also where quoted values span several lines. Rows that are torn (too few or too many values, a
quote that is never closed, no JSON) are kept apart with their line and their text.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from gubs.errors import InputError

BLOCK_BYTES = 8 << 20
"""Bytes read at once; a single row must be shorter."""

_SEPARATOR = "\x1f"
"""Stands for a delimiter of several characters (`::`), which Arrow does not know. No text file has it."""


@dataclass(frozen=True)
class TextFormat:
    """How a delimited file is written."""

    delimiter: str = ","
    header: tuple[str, ...] = ()
    """Names of the columns where the file has no header line."""
    quoted: bool = True
    encoding: str = "utf-8"
    """`utf-8` (checked cell by cell), or an 8-bit encoding such as `latin-1`."""


@dataclass(frozen=True)
class Torn:
    """A row that could not be split into columns."""

    line: int
    cause: str
    text: str


Batch = tuple[pa.RecordBatch, dict[str, np.ndarray]]
"""Raw columns, and masks of rows that are no good as a whole, by cause."""


@dataclass
class RawFile:
    """An open table file: its columns' names, its batches, and what was torn (complete after the batches)."""

    path: Path
    label: str
    """How messages and accounts call the file."""
    header: list[str] = field(default_factory=list)
    torn: list[Torn] = field(default_factory=list)

    def batches(self, wanted: list[str]) -> Iterator[Batch]:
        """Yields the rows as raw columns, in order; columns that are not wanted may be missing."""
        raise NotImplementedError

    def torn_rows(self) -> list[Torn]:
        """The rows that were kept apart, with their lines; call it after the last batch."""
        return self.torn

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """1-based line (Parquet: row) of each of the yielded rows with these positions (from 0)."""
        return rows + 1


def open_table(path: Path, label: str, text: TextFormat | None = None) -> RawFile:
    """Opens a file by its suffix (`text` given: as delimited text, whatever the suffix).

    Raises:
        InputError: the file is missing, empty, of an unknown type, or unreadable.
    """
    if not path.is_file():
        raise InputError(f"{label}: no such file; put it there, or point source.path at the folder that has it")
    if path.stat().st_size == 0:
        raise InputError(f"{label}: the file is empty; copy it again from its origin")
    kind = [s for s in path.suffixes if s != ".gz"][-1:]
    if text is not None or kind in ([".csv"], [".tsv"]):
        return Delimited(path, label, text=text or TextFormat("\t" if kind == [".tsv"] else ","))
    if kind == [".jsonl"]:
        return JsonLines(path, label)
    if kind == [".parquet"]:
        return Parquet(path, label)
    raise InputError(f"{label}: unknown file type; give .csv, .tsv, .jsonl or .parquet (the first three also as .gz)")


def guess_encoding(path: Path) -> str:
    """`utf-8` if the whole (small) file is, else `latin-1`."""
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


class _Bytes:
    """A readable stream over a file, unzipped, transcoded, with one-character delimiters; remembers how it ends."""

    def __init__(self, path: Path, text: TextFormat) -> None:
        self.stream: BinaryIO = pa.input_stream(str(path), compression="detect")
        self.text = text
        self.tail = b""
        self.held = b""
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        """The next bytes; empty at the end only."""
        while True:
            raw = bytes(self.stream.read(size if size > 0 else BLOCK_BYTES))
            block = self._ready(raw)
            if block or not raw:
                self.tail = (self.tail + block)[-2 * BLOCK_BYTES :]
                return block

    def _ready(self, raw: bytes) -> bytes:
        """Transcodes; what only the next bytes can tell (half a delimiter, a CR whose LF Arrow would drop) waits."""
        block = raw if self.text.encoding == "utf-8" else raw.decode(self.text.encoding).encode()
        block = self.held + block
        waits = [b"\r"]
        if len(self.text.delimiter) > 1:
            block = block.replace(self.text.delimiter.encode(), _SEPARATOR.encode())
            waits.append(self.text.delimiter[:1].encode())
        cut = 1 if raw and block.endswith(tuple(waits)) else 0
        self.held = block[len(block) - cut :]
        return block[: len(block) - cut]

    def close(self) -> None:
        """Closes the file."""
        self.stream.close()
        self.closed = True


@dataclass
class Delimited(RawFile):
    """Text with delimiters, read by Arrow as bytes."""

    text: TextFormat = field(default_factory=TextFormat)

    def __post_init__(self) -> None:
        self._ordinals: list[int] = []  # of torn rows, from 0 after the header
        self._spans: list[tuple[int, int]] = []  # (ordinal of row, line breaks inside it)
        self._delimiter = self.text.delimiter if len(self.text.delimiter) == 1 else _SEPARATOR
        self._named = not self.text.header
        start = self._start()
        self.header = self._read_header(start) if self._named else list(self.text.header)

    def _start(self) -> bytes:
        try:
            with pa.input_stream(str(self.path), compression="detect") as stream:
                start = bytes(stream.read(1 << 16))
        except (pa.ArrowInvalid, OSError) as e:
            raise InputError(f"{self.label}: cannot be unzipped ({e}); copy it again from its origin") from None
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{self.label}: row 1: the file is in UTF-16; save it as UTF-8")
        if b"\0" in start:
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
        twice = sorted({n for n in names if n and names.count(n) > 1})
        if twice:
            raise InputError(f"{self.label}: row 1: the header names column {twice[0]!r} twice; rename one of them")
        return [n or f"(unnamed {i})" for i, n in enumerate(names)]

    def batches(self, wanted: list[str]) -> Iterator[Batch]:  # noqa: ARG002
        """Yields the rows as columns of bytes."""
        source = _Bytes(self.path, self.text)
        try:
            held: Batch | None = None
            base = 0
            for batch in self._arrow(source):
                if held is not None:
                    yield held
                held = batch, self._flag(batch, base)
                base += batch.num_rows
            if held is not None:
                self._flag_open_end(held, source.tail)
                yield held
        except (pa.ArrowInvalid, OSError) as e:
            raise InputError(f"{self.label}: {self._explain(str(e))}") from None
        finally:
            source.close()

    def _arrow(self, source: _Bytes) -> Iterator[pa.RecordBatch]:
        read = pa_csv.ReadOptions(
            use_threads=False, block_size=BLOCK_BYTES, column_names=self.header, skip_rows=int(self._named)
        )
        parse = pa_csv.ParseOptions(
            delimiter=self._delimiter,
            quote_char='"' if self.text.quoted else False,
            newlines_in_values=self.text.quoted,
            ignore_empty_lines=False,
            invalid_row_handler=self._tear,
        )
        raw = pa_csv.ConvertOptions(column_types=dict.fromkeys(self.header, pa.binary()))
        try:
            reader = pa_csv.open_csv(pa.PythonFile(source, mode="r"), read, parse, raw)
        except pa.ArrowInvalid as e:
            if "Empty CSV" in str(e) or "Could not skip" in str(e):  # a header and nothing else
                return
            raise
        for batch in reader:
            if batch.num_rows:
                yield batch

    def _tear(self, row: pa_csv.InvalidRow) -> str:
        ordinal = row.number - 1 - int(self._named)
        cause = "too few values" if row.actual_columns < row.expected_columns else "too many values"
        self._ordinals.append(ordinal)
        self._note_span(ordinal, row.text.count("\n"))
        self.torn.append(Torn(ordinal, cause, row.text[:1000]))
        return "skip"

    def _note_span(self, ordinal: int, breaks: int) -> None:
        if breaks:
            self._spans.append((ordinal, breaks))

    def _flag(self, batch: pa.RecordBatch, base: int) -> dict[str, np.ndarray]:
        flags: dict[str, np.ndarray] = {}
        first = np.asarray(pc.binary_length(batch.column(0)).to_numpy(zero_copy_only=False)) == 0
        if first.any() and batch.num_columns > 1:
            sizes = [pc.binary_length(c).to_numpy(zero_copy_only=False) for c in batch.columns]
            flags["blank line"] = np.sum(sizes, axis=0) == 0
        breaks = sum((_count(c, 10) for c in batch.columns), np.zeros(1, np.int64))
        rows = np.flatnonzero(breaks)
        if len(rows):
            for k, ordinal in zip(rows, self._ordinal(base + rows), strict=True):
                self._note_span(int(ordinal), int(breaks[k]))
            # A stray quote swallows lines up to the next one, and leaves that one's partner at the end of the value.
            lone = [
                (_count(c, 34) % 2 == 1) & (_count(c, 10) > 0) & np.asarray(pc.ends_with(c, b'"').fill_null(False))
                for c in batch.columns
            ]
            flags["quote left open"] = np.any([np.broadcast_to(m, batch.num_rows) for m in lone], axis=0)
        return flags

    def _flag_open_end(self, last: Batch, tail: bytes) -> None:
        """Flags the file's last row if its last value's quote is open, which Arrow takes for a value."""
        batch, flags = last
        value = batch.column(batch.num_columns - 1)[-1].as_py() or b""
        for before in (self._delimiter.encode(), b"\n", b"\r"):
            if self.text.quoted and tail.endswith(before + b'"' + value.replace(b'"', b'""')):
                mask = flags.get("quote left open", np.zeros(batch.num_rows, bool)).copy()
                mask[-1] = True
                flags["quote left open"] = mask

    def _ordinal(self, rows: np.ndarray) -> np.ndarray:
        """Place in the file, from 0 after the header and counting torn rows, of the yielded rows."""
        if not self._ordinals:
            return rows
        torn = np.sort(np.array(self._ordinals, np.int64))
        return rows + np.searchsorted(torn - np.arange(len(torn)), rows, side="right")

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """1-based line on which each of the yielded rows begins."""
        return self._line_of(self._ordinal(rows))

    def _line_of(self, ordinals: np.ndarray) -> np.ndarray:
        first = 1 + int(self._named)
        if not self._spans:
            return ordinals + first
        spans = np.array(sorted(self._spans), np.int64).reshape(-1, 2)
        extra = np.concatenate([[0], np.cumsum(spans[:, 1])])[np.searchsorted(spans[:, 0], ordinals, side="left")]
        lines: np.ndarray = ordinals + first + extra
        return lines

    def torn_rows(self) -> list[Torn]:
        """The torn rows with their lines; `self.torn` only has their places in the file."""
        lines = self._line_of(np.array([t.line for t in self.torn], np.int64))
        return [Torn(int(n), t.cause, t.text) for n, t in zip(lines, self.torn, strict=True)]

    def _explain(self, message: str) -> str:
        if "straddl" in message:
            return f"a row is longer than {BLOCK_BYTES >> 20} MB: look for a quote that is never closed ({message})"
        return f"cannot be read ({message}); copy it again from its origin"


def _count(column: pa.Array, byte: int) -> np.ndarray:
    """How often a byte occurs in each value; one zero if in none (the usual case, found without looking at values)."""
    data = column.buffers()[2]
    if data is None or not (np.frombuffer(data, np.uint8) == byte).any():
        return np.zeros(1, np.int64)
    counts: np.ndarray = pc.count_substring(column, bytes([byte])).fill_null(0).to_numpy(zero_copy_only=False)
    return counts.astype(np.int64)


@dataclass
class JsonLines(RawFile):
    """One JSON object a line. Read by Arrow; where Arrow refuses a file, line by line, to find the bad lines."""

    def __post_init__(self) -> None:
        self._lines: np.ndarray | None = None
        fast = self._fast()
        self._table: pa.Table = self._slow() if fast is None else fast
        self.header = self._table.column_names

    def _fast(self) -> pa.Table | None:
        try:
            with pa.input_stream(str(self.path), compression="detect") as stream:
                table = pa_json.read_json(stream, pa_json.ReadOptions(use_threads=False, block_size=BLOCK_BYTES))
            with pa.input_stream(str(self.path), compression="detect") as stream:
                breaks, last = 0, b"\n"
                while block := stream.read(BLOCK_BYTES):
                    breaks, last = breaks + block.count(b"\n"), block[-1:]
        except (pa.ArrowInvalid, OSError):
            return None
        whole = table.num_rows == breaks + (last != b"\n")  # else blank lines would shift the numbers
        return table if whole and table.num_columns else None

    def _slow(self) -> pa.Table:
        rows, lines = [], []
        for n, raw in enumerate(self._raw_lines(), 1):
            row = self._object(n, raw)
            if row is not None:
                rows.append(row)
                lines.append(n)
        if not rows:
            example = f", e.g. row {self.torn[0].line}: {self.torn[0].text!r}" if self.torn else ""
            raise InputError(f"{self.label}: no row holds a JSON object{example}; write one object a line, in UTF-8")
        names = list(dict.fromkeys(k for row in rows for k in row))
        self._lines = np.array(lines, np.int64)
        return pa.table({name: _texts([row.get(name) for row in rows]) for name in names})

    def _raw_lines(self) -> Iterator[bytes]:
        try:
            with pa.input_stream(str(self.path), compression="detect") as stream:
                yield from bytes(stream.read()).removeprefix(b"\xef\xbb\xbf").splitlines()
        except (pa.ArrowInvalid, OSError) as e:
            raise InputError(f"{self.label}: cannot be unzipped ({e}); copy it again from its origin") from None

    def _object(self, n: int, raw: bytes) -> dict[str, Any] | None:
        shown = raw.decode("utf-8", "replace")[:1000]
        if not raw.strip():
            self.torn.append(Torn(n, "blank line", ""))
            return None
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self.torn.append(Torn(n, "not UTF-8 text", shown))
        except json.JSONDecodeError:
            self.torn.append(Torn(n, "not JSON", shown))
        else:
            if isinstance(row, dict):
                return row
            self.torn.append(Torn(n, "not a JSON object", shown))
        return None

    def batches(self, wanted: list[str]) -> Iterator[Batch]:  # noqa: ARG002
        """Yields the rows as typed columns, or as text where lines had to be read one by one."""
        for batch in self._table.to_batches():
            yield batch, {}

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """1-based line of each row."""
        return rows + 1 if self._lines is None else self._lines[rows]


def _texts(values: list[Any]) -> pa.Array:
    def text(v: Any) -> str | None:
        if v is None or isinstance(v, str):
            return v
        return json.dumps(v, ensure_ascii=False)

    return pa.array([text(v) for v in values], pa.string())


@dataclass
class Parquet(RawFile):
    """A Parquet file."""

    def __post_init__(self) -> None:
        try:
            self._file = pq.ParquetFile(self.path)
        except (pa.ArrowInvalid, OSError) as e:
            raise InputError(f"{self.label}: not a Parquet file ({e}); copy it again from its origin") from None
        self.header = self._file.schema_arrow.names

    def batches(self, wanted: list[str]) -> Iterator[Batch]:
        """Yields the wanted columns as they are typed."""
        try:
            for batch in self._file.iter_batches(1 << 18, columns=wanted):
                yield batch, {}
        except (pa.ArrowInvalid, OSError) as e:
            raise InputError(f"{self.label}: damaged Parquet file ({e}); copy it again from its origin") from None
