"""The passes over your own logs: each is a function over one item, and runs in this process or on workers.

`read` takes a file, or some row groups of one, and leaves its rows in pieces by user; `finish` puts the rows of some
users together from all pieces, and writes them. In between, `repeats` finds ids that occur twice, which may belong to
different users.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Part, part_file, write_part
from gubs.data.partition import cut, parts_of
from gubs.data.pieces import read_pieces, write_pieces
from gubs.data.settings import DataSettings
from gubs.data.sources import log_plan, log_rows
from gubs.data.sources.logs import Described
from gubs.data.sources.reading import bare_records, by_cause
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

    findings: log_rows.Findings
    """Without rejects."""
    pieces: list[str]
    ids: list[str]
    rejects: list[Part]


@dataclass(frozen=True)
class Finished:
    """What a call of `finish` wrote, and its counts."""

    tables: dict[str, Part]
    rejects: list[Part]
    kept: Counter[str]
    rejected: dict[str, Counter[str]]
    counts: log_rows.Counts
    evidence: log_rows.UnitEvidence
    bare_users: int
    unknown_videos: str
    """File of the ids that the table of videos lacks."""
    filled: dict[str, frozenset[str]]
    """Columns with a value, by table."""
    first_rejected: int | None
    """A row that was rejected."""


@dataclass(frozen=True)
class LogPasses:
    """The functions over one file, and over one part."""

    log: log_plan.Plan
    described: Described
    fs: fsspec.AbstractFileSystem
    folder: str
    """Of the unfinished artifact."""
    parts: int
    items: list[Item]
    rows: int
    """Rows of a piece."""

    @classmethod
    def of(
        cls, log: log_plan.Plan, described: Described, fs: fsspec.AbstractFileSystem, folder: str, data: DataSettings
    ) -> "LogPasses":
        """Decides how many parts there are, by the size of the log alone: nothing depends on the machine."""
        parts = max(1, round(sum(head.rows for head in log.heads["interactions"]) / data.part_rows))
        items = [Item(n, sources) for n, sources in enumerate(_together(log, data.part_rows))]
        videos = described.videos if described.videos is None else described.videos.select(["video_id", "duration_s"])
        lean = replace(described, users=None, videos=videos, sheets=[], video_sheet=None)  # it goes to every worker
        passes = cls(log, lean, fs, folder, parts, items, data.part_rows)
        fs.makedirs(f"{folder}/work", exist_ok=True)
        write_pieces(fs, passes._users_file, cut(described.users or empty("users"), parts))
        return passes

    @property
    def _users_file(self) -> str:
        return f"{self.folder}/work/users.arrow"

    def read(self, item: Item) -> Read:
        """Reads an item's rows and leaves them in pieces by user.

        Raises:
            InputError: the file cannot be read.
        """
        findings, pieces, ids, rejects = log_rows.Findings(), list[str](), list[str](), list[Part]()
        for n, (piece, found) in enumerate(self._pieces(item)):
            pieces.append(f"{self.folder}/work/piece-{item.number:06}-{n:04}.arrow")
            write_pieces(self.fs, pieces[-1], cut(piece, self.parts))
            if "interaction_id" in self.log.names:
                ids.append(f"{self.folder}/work/ids-{item.number:06}-{n:04}.arrow")
                write_pieces(self.fs, ids[-1], _by_id(log_rows.identities(piece), self.parts))
            if found.rejects:
                file = f"rejects/read-{item.number:06}-{n:04}.parquet"
                rejects.append(write_part(self.fs, self.folder, file, pa.concat_tables(found.rejects)))
            findings += replace(found, rejects=())
        return Read(findings, pieces, ids, rejects)

    def _pieces(self, item: Item) -> Iterator[tuple[pa.Table, log_rows.Findings]]:
        """The rows of an item in pieces of about `rows`, with what was found in each."""
        tables, found = list[pa.Table](), log_rows.Findings()
        for file, groups in item.sources:
            for sheet in log_rows.read_pieces(self.log, file, groups, self.rows):
                tables.append(log_rows.as_piece(self.log, sheet, file))
                found += log_rows.Findings.of(self.log, sheet)
                if sum(t.num_rows for t in tables) >= self.rows:
                    yield pa.concat_tables(tables), found
                    tables, found = [], log_rows.Findings()
        if tables:
            yield pa.concat_tables(tables), found

    def repeats(self, workers: Work, read: Sequence[Read]) -> np.ndarray:
        """Places of the rows whose `interaction_id` an earlier row has."""
        if "interaction_id" not in self.log.names:
            return np.zeros(0, np.int64)
        paths = [path for r in read for path in r.ids]
        found = workers.run("compare ids", functools.partial(self._repeated, paths), range(self.parts))
        return np.concatenate(found)

    def _repeated(self, paths: Sequence[str], part: int) -> np.ndarray:
        return log_rows.repeated_ids(read_pieces(self.fs, paths, part))

    def finisher(
        self, decided: log_rows.Decided, repeats: np.ndarray, read: Sequence[Read]
    ) -> Callable[[int], Finished]:
        """The pass that finishes and writes a part."""
        paths = [path for r in read for path in r.pieces]
        return functools.partial(self.finish, decided, repeats, paths)

    def finish(self, decided: log_rows.Decided, repeats: np.ndarray, paths: Sequence[str], part: int) -> Finished:
        """Finishes and writes the rows of some users, and these users.

        Raises:
            InputError: see `logs.finish`.
        """
        rows = read_pieces(self.fs, paths, part)
        done = log_rows.finish(self.log, decided, rows, repeats, self.described.durations(rows["video_id"]))
        (interactions,) = cut(done.interactions, 1)
        known = read_pieces(self.fs, [self._users_file], part)
        bare = bare_records("users", "user_id", interactions["user_id"].unique(), known)
        (users,) = cut(pa.concat_tables([known, bare]), 1)
        tables = {"interactions": interactions, "users": users}
        rejects = []
        if done.rejects:
            file = f"rejects/user-{part:06}.parquet"
            rejects.append(write_part(self.fs, self.folder, file, pa.concat_tables(done.rejects)))
        return Finished(
            tables={name: self._write(name, part, table) for name, table in tables.items()},
            rejects=rejects,
            kept=done.kept,
            rejected=by_cause(done.rejects),
            counts=done.counts,
            evidence=done.evidence,
            bare_users=bare.num_rows,
            unknown_videos=self._leave_unknown(part, interactions["video_id"].unique()),
            filled={
                name: frozenset(c for c in t.column_names if t[c].null_count < len(t)) for name, t in tables.items()
            },
            first_rejected=done.rejects[0]["row"][0].as_py() if done.rejects else None,
        )

    def _write(self, name: str, part: int, table: pa.Table) -> Part:
        file = part_file(name, part, self.parts)
        return write_part(self.fs, self.folder, file, table, users=f"{part}/{self.parts}")

    def _leave_unknown(self, part: int, ids: pa.Array) -> str:
        if self.described.videos is not None:
            known = self.described.videos["video_id"].combine_chunks()
            ids = ids.filter(pc.invert(pc.is_in(ids, value_set=known)))
        path = f"{self.folder}/work/videos-{part:06}.arrow"
        write_pieces(self.fs, path, [pa.table({"video_id": ids})])
        return path


def _by_id(found: pa.Table, parts: int) -> Iterable[pa.Table]:
    """The identities by the hash of the id."""
    part = parts_of(found["id"].to_numpy(), parts)
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(parts + 1))
    ordered = found.take(pa.array(order))
    return (ordered.slice(a, b - a) for a, b in pairwise(ends.tolist()))


def _together(log: log_plan.Plan, rows: int) -> Iterator[tuple[Source, ...]]:
    """The sources in groups of about so many rows."""
    group, size = list[Source](), 0
    for file, head in enumerate(log.heads["interactions"]):
        for groups, n in _ranges(head, rows):
            group.append((file, groups))
            size += n
            if size >= rows:
                yield tuple(group)
                group, size = [], 0
    if group:
        yield tuple(group)


def _ranges(head: log_plan.Head, rows: int) -> Iterator[tuple[range | None, int]]:
    """A file as a whole, a large Parquet file in ranges of row groups; and about how many rows that is."""
    if sum(head.group_rows) <= rows:
        yield None, head.rows
        return
    start, total = 0, 0
    for group, n in enumerate(head.group_rows):
        total += n
        if total >= rows or group == len(head.group_rows) - 1:
            yield range(start, group + 1), total
            start, total = group + 1, 0
