"""The first stage: reads a source's logs into the artifact `raw`, typed tables that account for every row."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from gubs.artifacts import StageJob, TableInfo, fingerprint, fingerprint_files
from gubs.console import say
from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables, read_source
from gubs.data.sources.logs import companions
from gubs.data.sources.media import videos_identity
from gubs.errors import InputError

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".dat", ".data", ".item", ".user", ".gz")


def make(job: StageJob, source: SourceSettings) -> str:
    """Reads the source; returns a summary.

    Raises:
        InputError: a file of the source cannot be used; the message says which one, where and what to do.
    """
    return write_raw(job, read_source(source))


def source_identity(source: SourceSettings) -> str:
    """Hash of the contents of the source's tables, and of the names in `source.videos_dir`.

    Raises:
        InputError: the path does not exist or holds no data file, or the folder of videos does not exist.
    """
    path = Path(source.path)
    if not path.exists():
        raise InputError(f"source.path={path}: no such file or folder")
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file() and p.suffix in _TABLE_SUFFIXES]
    if path.is_file() and source.kind == "logs":
        files += companions(path)
    if not files:
        raise InputError(f"source.path={path}: no data file in it (looked for {', '.join(_TABLE_SUFFIXES)})")
    tables = fingerprint_files(files)
    if not source.videos_dir:
        return tables
    return fingerprint("source", [tables, videos_identity(source.videos_dir, contents=False)])


def write_raw(job: StageJob, tables: SourceTables) -> str:
    """Writes the artifact (tables users, videos, interactions, rejects); returns its summary."""
    with job.writing() as out:
        for name in ("users", "videos", "interactions", "rejects"):
            out.write_table(name, getattr(tables, name))
        if tables.parts is not None:
            out.write_table("parts", tables.parts)
        out.info = {
            "files": {name: asdict(c) for name, c in tables.files.items()},
            "notes": tables.notes,
            "nulls": _nulls(tables),
        }
        out.summary = row_counts(out.tables)
        if rejected := tables.rejects.num_rows:
            out.summary += f"; {rejected:,} rows rejected, see {job.run.full(job.stage, 'rejects.parquet')}"
    for note in tables.notes:
        say(f"         note: {note}")
    return out.summary


def row_counts(tables: Mapping[str, TableInfo]) -> str:
    """The numbers of users, videos and interactions, as text."""
    return ", ".join(f"{tables[t].rows:,} {t}" for t in ("users", "videos", "interactions"))


def _nulls(tables: SourceTables) -> dict[str, list[str]]:
    """Columns without any value, by table."""
    named = {"users": tables.users, "videos": tables.videos, "interactions": tables.interactions}
    return {name: [c for c in t.column_names if t.num_rows == t[c].null_count > 0] for name, t in named.items()}
