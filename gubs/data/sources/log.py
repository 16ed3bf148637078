"""A log that is read in pieces and finished user by user: what all sources share whose logs may exceed the memory.

A source derives from `Log`: `read` gives the rows of a file with valid cells, and `finish` makes interactions of all
rows of some users. What must be known of the whole log adds up over pieces (`Findings`) and over users (`Tally`).
`in_memory` puts it together in one go, `log_passes` on many machines.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.partition import hashes
from gubs.data.sources import FileCount, SourceTables
from gubs.data.sources.columns import RULES
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import Blank, Parquet, TextFormat, open_part, open_table, rows_about
from gubs.data.sources.reading import (
    Account,
    Column,
    Sheet,
    bare_notes,
    bare_records,
    by_cause,
    read_blocks,
    refuse_empty,
)
from gubs.data.sources.units import UnitEvidence
from gubs.errors import InputError
from gubs.records import empty

ROWS = 1 << 20
"""Rows per sheet, unless the caller asks for another number."""


@dataclass(frozen=True)
class Head:
    """What is known of a file before its rows are read."""

    label: str
    header: tuple[str, ...] = ()
    """Names of its columns, where these are not known."""
    group_rows: tuple[int, ...] = ()
    """Rows of each row group of a Parquet file."""
    rows: int = 0
    """Approximate number of rows."""
    blank: bool = False
    """It is a text file without any text, not even a header."""

    @classmethod
    def of(cls, file: InputFile, whole: bool = True) -> "Head":
        """The head of a file whose columns are not known.

        Args:
            file: the file.
            whole: read all of it, if only that tells all columns (`JsonLines`).
        """
        raw = open_part(file, whole=whole)
        if isinstance(raw, Blank):
            return cls(file.label, blank=True)
        if isinstance(raw, Parquet):
            return cls(file.label, tuple(raw.header), tuple(raw.group_rows), sum(raw.group_rows))
        return cls(file.label, tuple(raw.header), (), rows_about(file))

    @classmethod
    def started(cls, file: InputFile) -> "Head":
        """Like `of`, from the start of the file; `Findings.late` tells what it lacked."""
        return cls.of(file, whole=False)

    @classmethod
    def sized(cls, file: InputFile) -> "Head":
        """The head of a file whose columns are known: its size."""
        return cls.of(file) if file.suffix == ".parquet" else cls(file.label, rows=rows_about(file))


@dataclass(frozen=True)
class Findings:
    """What must be known of all rows before any can be finished; adds up over sheets."""

    accounts: dict[str, Account] = field(default_factory=dict)
    """By file."""
    counts: Counter[str] = field(default_factory=Counter)
    unused: tuple[str, ...] = ()
    late: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By file: columns that its head lacks."""
    rejects: tuple[pa.Table, ...] = ()
    first: pa.Table | None = None
    """Each video_id and its first timestamp, where `finish` needs them."""

    def __add__(self, other: "Findings") -> "Findings":
        accounts = dict(self.accounts)
        for label, account in other.accounts.items():
            accounts[label] = accounts.get(label, Account()) + account
        files = dict.fromkeys([*self.late, *other.late])
        first = [f.first for f in (self, other) if f.first is not None]
        return Findings(
            accounts=accounts,
            counts=self.counts + other.counts,
            unused=_once(self.unused, other.unused),
            late={label: _once(self.late.get(label, ()), other.late.get(label, ())) for label in files},
            rejects=self.rejects + other.rejects,
            first=first_times(pa.concat_tables(first)) if first else None,
        )


def _once(names: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names + more))


@dataclass(frozen=True)
class Done:
    """What a source makes of all rows of some users."""

    interactions: pa.Table
    """Schema `interactions`, in the order of the log."""
    users: pa.Table | None = None
    """Schema `users`; None: as they were described."""
    videos: pa.Table | None = None
    """What `with_videos` is to know of the videos; None: which of them are not described."""
    rejects: Sequence[pa.Table] = ()
    """Rows of other files than the interactions'."""
    counts: Counter[str] = field(default_factory=Counter)
    evidence: UnitEvidence = field(default_factory=UnitEvidence)


@dataclass(frozen=True)
class Tally:
    """Counts of finished rows; those of different users add up."""

    kept: Counter[str]
    """Rows that stay, by file."""
    rejected: dict[str, Counter[str]]
    """Rows that were rejected since they were read: by file, by cause."""
    counts: Counter[str]
    evidence: UnitEvidence
    bare_users: int
    """Users who are known by their id alone."""
    first_rejected: int | None
    """A row that was rejected."""

    def __add__(self, other: "Tally") -> "Tally":
        labels = self.rejected | other.rejected
        none = Counter[str]()
        return Tally(
            kept=self.kept + other.kept,
            rejected={n: self.rejected.get(n, none) + other.rejected.get(n, none) for n in labels},
            counts=self.counts + other.counts,
            evidence=self.evidence + other.evidence,
            bare_users=self.bare_users + other.bare_users,
            first_rejected=min((r for r in (self.first_rejected, other.first_rejected) if r is not None), default=None),
        )


@dataclass(frozen=True)
class Finished:
    """All that is left of some users' rows."""

    interactions: pa.Table
    users: pa.Table
    videos: pa.Table
    rejects: list[pa.Table]
    tally: Tally


@dataclass(frozen=True)
class Log:
    """A log, and what other files say about its users and videos, which are few compared with its rows."""

    files: Sequence[InputFile]
    """Of the interactions, in their order."""
    heads: Sequence[Head]
    """Of each of them."""
    max_bad: float
    """Share of malformed rows above which a file is refused."""
    users: pa.Table | None = None
    """Users who are described: the schema `users`, maybe with more columns for `finish`."""
    videos: pa.Table | None = None
    """Videos that are described, schema `videos`."""
    sheets: Sequence[Sheet] = ()
    """Of the files that describe them."""
    notes: tuple[str, ...] = ()
    """What the source lacks."""
    text: TextFormat | None = None
    """How the files are written, if their suffix does not tell."""
    unique: str | None = None
    """A column in which each value belongs to one row, whichever user it is of: later rows with it are duplicates."""

    columns: ClassVar[Sequence[Column]]
    """The columns to read."""
    fan_out: ClassVar[int] = 1
    """About how many interactions a row becomes."""
    in_parts: ClassVar[bool] = False
    """Whether a file is only a part, which may have no rows; for other sources such a file is a failed copy."""
    broadcast: ClassVar[tuple[str, ...]] = ("video_id",)
    """Columns of the described videos that `finish` needs."""

    @property
    def label(self) -> str:
        """What the log is called in messages."""
        return self.files[0].label if len(self.files) == 1 else f"interactions ({len(self.files)} files)"

    @property
    def for_workers(self) -> Self:
        """The log as workers need it."""
        videos = None if self.videos is None else self.videos.select(self.broadcast)
        return replace(self, users=None, videos=videos, sheets=(), notes=())

    def read(self, number: int, groups: range | None = None, rows: int = ROWS) -> Iterator[Sheet]:
        """A file of the interactions in sheets of about `rows` rows, at least one; each row has a user.

        Args:
            number: the file's place.
            groups: only these row groups.
            rows: of a sheet.

        Raises:
            InputError: a column cannot be read at all.
        """
        for sheet in read_blocks(open_table(self.files[number], self.text, groups), self.columns, RULES, rows):
            self.check(sheet)
            yield sheet

    def check(self, sheet: Sheet) -> None:
        """Rejects the rows of a sheet that are wrong in themselves."""

    def piece(self, sheet: Sheet, number: int) -> pa.Table:
        """The rows of a sheet with their file and line; all pieces have one schema."""
        file = pa.nulls(len(sheet.lines), pa.int32()).fill_null(number)
        own = pa.table({"file": file, "line": pa.array(sheet.lines, pa.int64())})
        for name in sheet.table.column_names:
            own = own.append_column(name, sheet.table[name])
        return own

    def findings(self, sheet: Sheet) -> Findings:
        """The findings of a sheet."""
        return Findings({sheet.label: sheet.account()}, rejects=tuple(sheet.rejects))

    def again(self, findings: Findings) -> Self | None:
        """The log as it must be read once more, if its heads lacked columns that it uses; else None."""
        del findings
        return None

    def decided(self, findings: Findings) -> Self:
        """The log, once it is known what its rows mean.

        Raises:
            InputError: too many malformed rows, or no rows.
        """
        for label, account in findings.accounts.items():
            if not self.in_parts:
                refuse_empty(label, account.rows_in)
            account.check_quality(label, self.max_bad)
        refuse_empty(self.label, sum(a.rows_in for a in findings.accounts.values()), len(self.files))
        return self

    def ids(self, rows: pa.Table) -> pa.Array:
        """What is unique (see `unique`), for rows of pieces."""
        return rows[self.unique].combine_chunks()

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """Makes interactions of all rows of some users.

        Args:
            rows: of pieces, in the order of the log; what is rejected is left to its rejects.
            users: what is described of these users.

        Raises:
            InputError: what was declared of the log is not true.
        """
        raise NotImplementedError

    def conclude(self, findings: Findings, tally: Tally) -> list[str]:
        """Notes on the whole log.

        Raises:
            InputError: the rows cannot mean what they seem to mean, or none is left.
        """
        del findings, tally
        return list(self.notes)

    def with_videos(self, seen: pa.Table) -> tuple[Self, list[str]]:
        """The log with all its videos, those that occur in interactions only after the others; and notes.

        Args:
            seen: the `videos` of `finish`.
        """
        bare = bare_records("videos", "video_id", seen["video_id"].combine_chunks().unique(), self.videos)
        videos = bare if self.videos is None else pa.concat_tables([self.videos, bare])
        return replace(self, videos=videos), bare_notes("videos", bare.num_rows, self.videos is not None)


def finish(log: Log, rows: pa.Table, users: pa.Table, repeats: np.ndarray) -> Finished:
    """Finishes all rows of some users.

    Args:
        log: decided.
        rows: pieces, in the order of the log.
        users: what is described of these users.
        repeats: places of the rows that repeat the unique value of an earlier one (`repeated`).

    Raises:
        InputError: see `Log.finish`.
    """
    sheet = Sheet(log.label, rows, rows["line"].to_numpy(), rows.num_rows)
    labels = pa.array([f.label for f in log.files])
    sheet.labels = pa.DictionaryArray.from_arrays(rows["file"].combine_chunks(), labels)
    if log.unique is not None:
        sheet.reject(np.isin(places(rows), repeats), "duplicate", log.unique)
    done = log.finish(sheet, users)
    users = users if done.users is None else done.users
    bare = bare_records("users", "user_id", done.interactions["user_id"].unique(), users)
    rejects = [*sheet.rejects, *done.rejects]
    kept = {v["values"]: v["counts"] for v in pc.value_counts(sheet.labels.cast(pa.string())).to_pylist()}
    first = sheet.rejects[0]["row"][0].as_py() if sheet.rejects else None
    return Finished(
        interactions=done.interactions,
        users=pa.concat_tables([users, bare]),
        videos=_not_described(log, done.interactions) if done.videos is None else done.videos,
        rejects=rejects,
        tally=Tally(Counter(kept), by_cause(rejects), done.counts, done.evidence, bare.num_rows, first),
    )


def _not_described(log: Log, interactions: pa.Table) -> pa.Table:
    ids = interactions["video_id"].combine_chunks().unique()
    if log.videos is not None:
        ids = ids.filter(pc.invert(pc.is_in(ids, value_set=log.videos["video_id"].combine_chunks())))
    return pa.table({"video_id": ids})


def first_seen(seen: pa.Table) -> pa.Table:
    """Each record of `Done.videos` once: its first `place`, if they have one."""
    names = [n for n in seen.column_names if n != "place"]
    groups = seen.group_by(names, use_threads=False)
    if "place" not in seen.column_names:
        return groups.aggregate([])
    return groups.aggregate([("place", "min")]).rename_columns([*names, "place"])


def first_times(rows: pa.Table) -> pa.Table:
    """Each video_id and its first timestamp; rows without a time do not count."""
    timed = rows.select(["video_id", "timestamp"]).filter(pc.is_valid(rows["timestamp"]))
    first = timed.group_by("video_id", use_threads=False).aggregate([("timestamp", "min")])
    return first.rename_columns(["video_id", "timestamp"])


def places(rows: pa.Table) -> np.ndarray:
    """(n,) a number for each row of a piece, in the order of the log."""
    return (rows["file"].to_numpy().astype(np.int64) << 40) + rows["line"].to_numpy()


def identities(log: Log, rows: pa.Table) -> pa.Table:
    """What tells whether two rows have the same unique value: two hashes of it, and the row's place in the log."""
    ids = log.ids(rows)
    return pa.table({"id": hashes(ids), "more": hashes(ids, "gubs interaction"), "row": places(rows)})


def repeated(rows: pa.Table) -> np.ndarray:
    """Places of the rows whose unique value an earlier row has; see `identities`."""
    hashed, more, place = (rows[c].to_numpy() for c in ("id", "more", "row"))
    order = np.lexsort((place, more, hashed))
    same = (np.diff(hashed[order]) == 0) & (np.diff(more[order]) == 0)
    return place[order[1:][same]]


def account(log: Log, findings: Findings, tally: Tally) -> dict[str, FileCount]:
    """The account of each file.

    Raises:
        InputError: rows are unaccounted for.
    """
    accounts: Mapping[str, Account] = findings.accounts
    none = Counter[str]()
    counts = {
        f.label: FileCount(
            accounts[f.label].rows_in,
            tally.kept[f.label],
            dict(accounts[f.label].rejected + tally.rejected.get(f.label, none)),
        )
        for f in log.files
    }
    for label, count in (item for sheet in log.sheets for item in sheet.counts().items()):
        later = tally.rejected.get(label, none)
        counts[label] = FileCount(count.rows_in, count.rows_out - later.total(), dict(Counter(count.rejected) + later))
    for file, count in counts.items():
        if count.rows_in != count.rows_out + sum(count.rejected.values()):
            raise InputError(f"{file}: rows in and rows out do not add up: {count}")
    return counts


def in_memory(log: Log) -> SourceTables:
    """Reads a log in one go.

    Raises:
        InputError: a file cannot be used.
    """
    pieces, findings = _read(log)
    if (again := log.again(findings)) is not None:
        log = again
        pieces, findings = _read(log)
    log, rows = log.decided(findings), pa.concat_tables(pieces)
    repeats = np.zeros(0, np.int64) if log.unique is None else repeated(identities(log, rows))
    done = finish(log, rows, empty("users") if log.users is None else log.users, repeats)
    notes = log.conclude(findings, done.tally)
    notes += bare_notes("users", done.tally.bare_users, log.users is not None)
    log, more = log.with_videos(done.videos)
    rejects = [*findings.rejects, *done.rejects, *(t for sheet in log.sheets for t in sheet.rejects)]
    return SourceTables(
        users=done.users,
        videos=log.videos,
        interactions=done.interactions,
        rejects=pa.concat_tables([empty("rejects"), *rejects]),
        files=account(log, findings, done.tally),
        notes=notes + more,
    )


def _read(log: Log) -> tuple[list[pa.Table], Findings]:
    pieces, findings = list[pa.Table](), Findings()
    for number in range(len(log.files)):
        for sheet in log.read(number):
            pieces.append(log.piece(sheet, number))
            findings += log.findings(sheet)
    return pieces, findings
