"""The passes over a log: each is a function over one item, and runs in this process or on workers.

`read` takes a file, or some row groups of one, and leaves its rows in pieces by user; `finish` puts the rows of some
users together from all pieces, and writes them. In between, `repeats` finds values that must be unique and occur twice,
maybe at different users.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import fsspec
import numpy as np
import pyarrow as pa

from gubs.artifacts import Part, part_file, write_part
from gubs.data.partition import cut, parts_of
from gubs.data.pieces import read_pieces, write_pieces
from gubs.data.settings import DataSettings
from gubs.data.sources.log import Findings, Head, Log, Tally, finish, identities, repeated
from gubs.data.work import Work
from gubs.records import empty

Source = tuple[int, range | None]
"""A file of the interactions, by its place among them, and row groups of it if not all."""


@dataclass(frozen=True)
class Item:
    """What one call of `read` reads: some row groups of a large file, or several small files."""

    number: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Read:
    """What a call of `read` found, and the pieces that it left."""

    findings: Findings
    """Without rejects."""
    pieces: list[str]
    ids: list[str]
    rejects: list[Part]


@dataclass(frozen=True)
class Finished:
    """What a call of `finish` wrote, and its counts."""

    tables: dict[str, Part]
    rejects: list[Part]
    tally: Tally
    videos: str
    """File of what `Log.with_videos` is to know."""
    filled: dict[str, frozenset[str]]
    """Columns with a value, by table."""


@dataclass(frozen=True)
class LogPasses:
    """The functions over one file, and over one part."""

    log: Log
    fs: fsspec.AbstractFileSystem
    folder: str
    """Of the unfinished artifact."""
    parts: int
    items: list[Item]
    rows: int
    """Rows of a piece."""

    @classmethod
    def of(cls, log: Log, fs: fsspec.AbstractFileSystem, folder: str, data: DataSettings) -> "LogPasses":
        """Decides how many parts there are, by the size of the log alone: nothing depends on the machine."""
        rows = max(1, data.part_rows // log.fan_out)
        parts = max(1, round(sum(head.rows for head in log.heads) / rows))
        items = [Item(n, sources) for n, sources in enumerate(_together(log.heads, rows))]
        passes = cls(log.for_workers, fs, folder, parts, items, rows)
        fs.makedirs(f"{folder}/work", exist_ok=True)
        write_pieces(fs, passes._users_file, cut(empty("users") if log.users is None else log.users, parts))
        return passes

    @property
    def _users_file(self) -> str:
        return f"{self.folder}/work/users.arrow"

    def read(self, item: Item) -> Read:
        """Reads an item's rows and leaves them in pieces by user.

        Raises:
            InputError: the file cannot be read.
        """
        findings, pieces, ids, rejects = Findings(), list[str](), list[str](), list[Part]()
        for n, (piece, piece_findings) in enumerate(self._pieces(item)):
            pieces.append(f"{self.folder}/work/piece-{item.number:06}-{n:04}.arrow")
            write_pieces(self.fs, pieces[-1], cut(piece, self.parts))
            if self.log.unique is not None:
                ids.append(f"{self.folder}/work/ids-{item.number:06}-{n:04}.arrow")
                write_pieces(self.fs, ids[-1], _by_id(identities(self.log, piece), self.parts))
            if piece_findings.rejects:
                file = f"rejects/read-{item.number:06}-{n:04}.parquet"
                rejects.append(write_part(self.fs, self.folder, file, pa.concat_tables(piece_findings.rejects)))
            findings += replace(piece_findings, rejects=())
        return Read(findings, pieces, ids, rejects)

    def _pieces(self, item: Item) -> Iterator[tuple[pa.Table, Findings]]:
        """The rows of an item in pieces of about `rows`, with what was found in each."""
        tables, findings = list[pa.Table](), Findings()
        for file, groups in item.sources:
            for sheet in self.log.read(file, groups, self.rows):
                tables.append(self.log.piece(sheet, file))
                findings += self.log.findings(sheet)
                if sum(t.num_rows for t in tables) >= self.rows:
                    yield pa.concat_tables(tables), findings
                    tables, findings = [], Findings()
        if tables:
            yield pa.concat_tables(tables), findings

    def repeats(self, workers: Work, read: Sequence[Read]) -> np.ndarray:
        """Places of the rows whose unique value an earlier row has."""
        if self.log.unique is None:
            return np.zeros(0, np.int64)
        paths = [path for r in read for path in r.ids]
        places = workers.run("compare ids", functools.partial(self._repeated, paths), range(self.parts))
        return np.concatenate(places)

    def _repeated(self, paths: Sequence[str], part: int) -> np.ndarray:
        return repeated(read_pieces(self.fs, paths, part))

    def finisher(self, decided: Log, repeats: np.ndarray, read: Sequence[Read]) -> Callable[[int], Finished]:
        """The pass that finishes and writes a part."""
        paths = [path for r in read for path in r.pieces]
        return functools.partial(replace(self, log=decided.for_workers).finish, repeats, paths)

    def finish(self, repeats: np.ndarray, paths: Sequence[str], part: int) -> Finished:
        """Finishes and writes the rows of some users, and these users.

        Raises:
            InputError: see `Log.finish`.
        """
        rows, users = read_pieces(self.fs, paths, part), read_pieces(self.fs, [self._users_file], part)
        done = finish(self.log, rows, users, repeats)
        tables = {name: t for name in ("interactions", "users") for t in cut(getattr(done, name), 1)}
        rejects = []
        if done.rejects:
            file = f"rejects/user-{part:06}.parquet"
            rejects.append(write_part(self.fs, self.folder, file, pa.concat_tables(done.rejects)))
        videos = f"{self.folder}/work/videos-{part:06}.arrow"
        write_pieces(self.fs, videos, [done.videos])
        return Finished(
            tables={name: self._write(name, part, table) for name, table in tables.items()},
            rejects=rejects,
            tally=done.tally,
            videos=videos,
            filled={
                name: frozenset(c for c in t.column_names if t[c].null_count < len(t)) for name, t in tables.items()
            },
        )

    def _write(self, name: str, part: int, table: pa.Table) -> Part:
        file = part_file(name, part, self.parts)
        return write_part(self.fs, self.folder, file, table, users=f"{part}/{self.parts}")


def _by_id(table: pa.Table, parts: int) -> Iterable[pa.Table]:
    """The identities by the hash of the id."""
    part = parts_of(table["id"].to_numpy(), parts)
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(parts + 1))
    ordered = table.take(pa.array(order))
    return (ordered.slice(a, b - a) for a, b in pairwise(ends.tolist()))


def _together(heads: Sequence[Head], rows: int) -> Iterator[tuple[Source, ...]]:
    """The sources in groups of about `rows` rows."""
    group, size = list[Source](), 0
    for file, head in enumerate(heads):
        for groups, n in _ranges(head, rows):
            group.append((file, groups))
            size += n
            if size >= rows:
                yield tuple(group)
                group, size = [], 0
    if group:
        yield tuple(group)


def _ranges(head: Head, rows: int) -> Iterator[tuple[range | None, int]]:
    """A file as a whole, a large Parquet file in ranges of row groups; and about how many rows each has."""
    if sum(head.group_rows) <= rows:
        yield None, head.rows
        return
    start, total = 0, 0
    for group, n in enumerate(head.group_rows):
        total += n
        if total >= rows or group == len(head.group_rows) - 1:
            yield range(start, group + 1), total
            start, total = group + 1, 0
