"""The first stage: reads a source's logs into the artifact `raw`, typed tables that account for every row.

Your own logs (`logs`) are read block by block, on Ray if they are large; other sources, whose size is known, in memory.
The tables users and interactions are cut by user into parts, in the order of `partition.Users`; a user's rows are in
the order of the log.
"""

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import ArtifactWriter, Part, StageJob, TableInfo, code_version, fingerprint, part_file, write_part
from gubs.console import say
from gubs.data.log_passes import Finished, LogPasses
from gubs.data.partition import cut
from gubs.data.pieces import read_pieces
from gubs.data.settings import DataSettings, SourceSettings
from gubs.data.sources import FileCount, SourceTables, log_plan, log_rows, named_files, read_source
from gubs.data.sources.files import InputFile, identity, refuse_missing
from gubs.data.sources.logs import Described, attach
from gubs.data.sources.media import videos_identity
from gubs.data.sources.reading import bare_notes, bare_records
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
    if source.kind != "logs":
        return write_raw(job, read_source(source), data)
    files, folder = log_plan.find_files(source.path)
    on_ray = _is_large(files["interactions"], data.ray_from_rows)
    key = attempt_key(job.recipe.fingerprint(job.kind), code_version(), str(data.part_rows)) if on_ray else None
    with job.writing(resume_key=key) as out, work(out.run.fs, out.path("work"), on_ray, ray) as workers:
        notes = _read_logs(source, files, folder, data, workers, out)
        out.summary = row_counts(out.tables) + _rejected(job, out)
        out.remove("work")
    _say_all(notes)
    return out.summary


def _is_large(files: Sequence[InputFile], rows: int) -> bool:
    """Whether the files have at least so many rows, about; opens no more of them than it needs."""
    sizes = itertools.accumulate((log_plan.Head.of(f).rows for f in files), initial=0)
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


def _read_logs(
    source: SourceSettings, files: log_plan.Files, folder: str, data: DataSettings, workers: Work, out: ArtifactWriter
) -> list[str]:
    """Reads your logs in two passes: block by block, then user by user; returns notes."""
    heads = {table: workers.run(f"look at {table}", log_plan.Head.of, parts) for table, parts in files.items()}
    log = log_plan.plan(source, files, folder, heads)
    described = Described.read(log)
    passes = LogPasses.of(log, described, out.run.fs, out.folder, data)
    read = workers.run("read", passes.read, passes.items)
    findings = _total(r.findings for r in read)
    decided = log_rows.decide(log, findings)
    finish = passes.finisher(decided, passes.repeats(workers, read), read)
    finished = workers.run("regroup by user", finish, range(passes.parts))
    log_rows.check_units(log, _total(f.evidence for f in finished), described.video_sheet)
    accounts = _accounts(log, findings, finished)
    notes = log_rows.log_notes(log, findings, decided, _total(f.counts for f in finished)) + described.notes
    notes += bare_notes("users", sum(f.bare_users for f in finished), described.users is not None)
    videos, more = _videos(described.videos, finished, source, out.run.fs)
    notes += more
    for name in ("users", "interactions"):
        out.add_table(name, [f.tables[name] for f in finished])
    out.write_table("videos", videos)
    rejects = [part for r in read for part in r.rejects] + [part for f in finished for part in f.rejects]
    _write_rejects(out, [sheet.rejects for sheet in described.sheets], rejects)
    counts = accounts | {label: c for sheet in described.sheets for label, c in sheet.counts().items()}
    out.info = _info(counts, notes, _empty_columns(finished, videos, out.tables))
    return notes


T = TypeVar("T")


def _total(values: Iterable[T]) -> T:
    return functools.reduce(operator.add, values)


def _accounts(log: log_plan.Plan, findings: log_rows.Findings, finished: Sequence[Finished]) -> dict[str, FileCount]:
    """The account of each file of the interactions.

    Raises:
        InputError: every row was rejected.
    """
    kept = _total(f.kept for f in finished)
    rejected: dict[str, Counter[str]] = {}
    for label, causes in (item for f in finished for item in f.rejected.items()):
        rejected[label] = rejected.get(label, Counter[str]()) + causes
    rows = [f.first_rejected for f in finished if f.first_rejected is not None]
    if not kept.total() and rows:
        log_rows.refuse_unlabelled(log, _total(rejected.values()), min(rows))
    accounts = log_rows.file_counts(log, findings.accounts, kept, rejected)
    for file, count in accounts.items():
        if count.rows_in != count.rows_out + sum(count.rejected.values()):
            raise InputError(f"{file}: rows in and rows out do not add up: {count}")
    return accounts


def _videos(
    described: pa.Table | None, finished: Sequence[Finished], source: SourceSettings, fs: fsspec.AbstractFileSystem
) -> tuple[pa.Table, list[str]]:
    """All videos, with those that occur in interactions only, and notes."""
    ids = pa.array([], pa.string())
    for one in finished:
        more = read_pieces(fs, [one.unknown_videos], 0)["video_id"].combine_chunks()
        ids = pa.concat_arrays([ids, more]).unique()
    bare = bare_records("videos", "video_id", ids, None)
    notes = bare_notes("videos", bare.num_rows, described is not None)
    videos = bare if described is None else pa.concat_tables([described, bare])
    return attach(videos, source.videos_dir, notes), notes


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
