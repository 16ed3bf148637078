"""The first stage: reads a source's logs into the artifact `raw`, typed tables that account for every row.

A log is read piece by piece, on Ray if it is large; a source that has tables only is small, and read in memory. The
tables users and interactions are cut by user into parts, in the order of `partition.Users`; a user's rows are in
the order of the log.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import ArtifactWriter, Part, StageJob, TableInfo, code_version, fingerprint, part_file, write_part
from gubs.console import say
from gubs.data.log_passes import Finished, LogPasses, Read
from gubs.data.partition import cut
from gubs.data.pieces import read_pieces
from gubs.data.settings import DataSettings, SourceSettings
from gubs.data.sources import FileCount, SourceTables, log_plan, logs, named_files, open_source
from gubs.data.sources.files import InputFile, identity, refuse_missing
from gubs.data.sources.log import Findings, Head, Log, account, first_seen
from gubs.data.sources.media import videos_identity
from gubs.data.sources.reading import bare_notes
from gubs.data.work import Work, attempt_key, work
from gubs.errors import InputError
from gubs.ray_runtime import RaySettings
from gubs.records import SCHEMAS, empty

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".dat", ".data", ".item", ".user", ".gz")
_SORTED_REJECTS = 1_000_000
"""Rejected rows up to which they are one sorted table."""


def make(job: StageJob, source: SourceSettings, data: DataSettings, ray: RaySettings) -> str:
    """Reads the source; returns a summary.

    Raises:
        InputError: a file of the source cannot be used; the message says which one, where and what to do.
    """
    opened = None if source.kind == "logs" else open_source(source)
    if isinstance(opened, SourceTables):
        opened.check()
        return write_raw(job, opened, data)
    on_ray = _is_large(opened, source, data.ray_from_rows)
    key = attempt_key(job.recipe.fingerprint(job.kind), code_version(), str(data.part_rows)) if on_ray else None
    with job.writing(resume_key=key) as out, work(out.run.fs, out.path("work"), on_ray, ray) as workers:
        log = opened or logs.open_source(source, workers.run)
        notes = _read_log(log, data, workers, out)
        out.summary = row_counts(out.tables) + _rejected(job, out)
        out.remove("work")
    _say_all(notes)
    return out.summary


def _is_large(log: Log | None, source: SourceSettings, rows: int) -> bool:
    """Whether a log (None: one of your own) has at least about `rows` rows; opens no more files than it needs."""
    heads = map(Head.sized, log_plan.find_files(source.path)[0]["interactions"]) if log is None else log.heads
    each = 1 if log is None else log.fan_out
    sizes = itertools.accumulate((each * head.rows for head in heads), initial=0)
    return any(size >= rows for size in sizes)


def source_identity(source: SourceSettings, **_: object) -> str:
    """Hash of what tells whether the source's tables, and the names in `source.videos_dir`, are the same.

    Raises:
        InputError: the path does not exist or holds no data file, or the folder of videos does not exist.
    """
    refuse_missing(source.path)
    tables = identity(_files(source))
    if not source.videos_dir:
        return tables
    return fingerprint("source", [tables, videos_identity(source.videos_dir, contents=False)])


def _files(source: SourceSettings) -> list[InputFile]:
    """Every file that decides the tables."""
    if source.kind == "logs":
        return [f for parts in log_plan.find_files(source.path)[0].values() for f in parts]
    path = Path(source.path)
    if (named := named_files(source)) is not None:
        return [InputFile(str(p), p.relative_to(path).as_posix()) for p in named if p.is_file()]
    files = (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _TABLE_SUFFIXES and p.is_file())
    )
    if not files:
        raise InputError(f"source.path={path}: no data file in it (looked for {', '.join(_TABLE_SUFFIXES)})")
    return [InputFile.at(p) for p in files]


def _read_log(log: Log, data: DataSettings, workers: Work, out: ArtifactWriter) -> list[str]:
    """Reads a log in two passes: piece by piece, then user by user; returns notes."""
    passes, read, findings = _read_pieces(log, data, workers, out, "read")
    if (again := log.again(findings)) is not None:
        log, before = again, read
        passes, read, findings = _read_pieces(log, data, workers, out, "read again")
        kept = {part.file for r in read for part in r.rejects}
        for file in (part.file for r in before for part in r.rejects if part.file not in kept):
            out.remove(file)
    log = log.decided(findings)
    finish = passes.finisher(log, passes.repeats(workers, read), read)
    finished = workers.run("regroup by user", finish, range(passes.parts))
    tally = _total(f.tally for f in finished)
    notes = log.conclude(findings, tally) + bare_notes("users", tally.bare_users, log.users is not None)
    log, more = log.with_videos(_seen(finished, out.run.fs))
    notes += more
    assert log.videos is not None
    for name in ("users", "interactions"):
        out.add_table(name, [f.tables[name] for f in finished])
    out.write_table("videos", log.videos)
    rejects = [part for r in read for part in r.rejects] + [part for f in finished for part in f.rejects]
    _write_rejects(out, [sheet.rejects for sheet in log.sheets], rejects)
    out.info = _info(account(log, findings, tally), notes, _empty_columns(finished, log.videos, out.tables))
    return notes


def _read_pieces(
    log: Log, data: DataSettings, workers: Work, out: ArtifactWriter, phase: str
) -> tuple[LogPasses, list[Read], Findings]:
    """The first pass; run again under another name, it overwrites what it left."""
    passes = LogPasses.of(log, out.run.fs, out.folder, data)
    read = workers.run(phase, passes.read, passes.items)
    return passes, read, _total(r.findings for r in read)


T = TypeVar("T")


def _total(values: Iterable[T]) -> T:
    return functools.reduce(operator.add, values)


def _seen(finished: Sequence[Finished], fs: fsspec.AbstractFileSystem) -> pa.Table:
    """What the parts say about videos, each thing once."""
    seen = read_pieces(fs, [finished[0].videos], 0)
    for one in finished[1:]:
        seen = first_seen(pa.concat_tables([seen, read_pieces(fs, [one.videos], 0)]))
    return seen


def _write_rejects(out: ArtifactWriter, described: Sequence[Sequence[pa.Table]], parts: Sequence[Part]) -> None:
    """Writes the rejected rows as one table by file and row; many of them stay in the files that workers wrote."""
    tables = [empty("rejects"), *(t for tables in described for t in tables)]
    if sum(p.rows for p in parts) <= _SORTED_REJECTS:
        for part in parts:
            with out.run.fs.open(out.path(part.file), "rb") as f:
                tables.append(pq.ParquetFile(f, pre_buffer=False).read(use_threads=False))
        out.remove("rejects")
        out.write_table("rejects", in_file_order(pa.concat_tables(tables)))
        return
    others = write_part(out.run.fs, out.folder, "rejects/other.parquet", pa.concat_tables(tables))
    out.add_table("rejects", [*parts, others])


def _empty_columns(
    finished: Sequence[Finished], videos: pa.Table, written: Mapping[str, TableInfo]
) -> dict[str, list[str]]:
    """Columns without any value, by table."""
    nulls = {"videos": [c for c in videos.column_names if videos.num_rows == videos[c].null_count > 0]}
    for name in ("users", "interactions"):
        filled = frozenset[str]().union(*(f.filled[name] for f in finished))
        nulls[name] = [c for c in SCHEMAS[name].names if c not in filled] if written[name].rows else []
    return nulls


def write_raw(job: StageJob, tables: SourceTables, data: DataSettings) -> str:
    """Writes the artifact (tables users, videos, interactions, rejects); returns its summary."""
    parts = max(1, round(tables.interactions.num_rows / data.part_rows))
    with job.writing() as out:
        for name in ("users", "interactions"):
            pieces = enumerate(cut(getattr(tables, name), parts))
            written = [
                write_part(out.run.fs, out.folder, part_file(name, i, parts), t, users=f"{i}/{parts}")
                for i, t in pieces
            ]
            out.add_table(name, written)
        out.write_table("videos", tables.videos)
        out.write_table("rejects", in_file_order(tables.rejects))
        if tables.parts is not None:
            out.write_table("parts", tables.parts)
        out.info = _info(tables.files, tables.notes, _nulls(tables))
        out.summary = row_counts(out.tables) + _rejected(job, out)
    _say_all(tables.notes)
    return out.summary


def in_file_order(rejects: pa.Table) -> pa.Table:
    """Rejected rows by file and row."""
    return rejects.sort_by([("file", "ascending"), ("row", "ascending")])


def _info(files: Mapping[str, FileCount], notes: Sequence[str], nulls: Mapping[str, list[str]]) -> dict[str, object]:
    return {"files": {name: asdict(c) for name, c in files.items()}, "notes": list(notes), "nulls": dict(nulls)}


def _say_all(notes: Sequence[str]) -> None:
    for note in notes:
        say(f"         note: {note}")


def _rejected(job: StageJob, out: ArtifactWriter) -> str:
    table = out.tables["rejects"]
    where = "rejects" if table.parts else "rejects.parquet"
    return f"; {table.rows:,} rows rejected, see {job.run.full(job.stage, where)}" if table.rows else ""


def row_counts(tables: Mapping[str, TableInfo]) -> str:
    """The numbers of users, videos and interactions, as text."""
    return ", ".join(f"{tables[t].rows:,} {t}" for t in ("users", "videos", "interactions"))


def _nulls(tables: SourceTables) -> dict[str, list[str]]:
    """Columns without any value, by table."""
    named = {"users": tables.users, "videos": tables.videos, "interactions": tables.interactions}
    return {name: [c for c in t.column_names if t.num_rows == t[c].null_count > 0] for name, t in named.items()}
