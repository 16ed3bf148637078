"""First stage: a source's logs become the artifacts `raw` (typed tables) and, for simulated sources, `truth`."""

from pathlib import Path

from gubs.artifacts import Artifact, Run, fingerprint, fingerprint_files, writing
from gubs.config import Settings
from gubs.data.sources import SourceTables, account, read_source
from gubs.errors import InputError

_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", ".dat", ".data", ".item", ".user", ".gz")


def ingest_stage(run: Run, settings: Settings, *, force: bool = False) -> tuple[Artifact, bool]:
    """Reads or simulates the source.

    Returns:
        The artifact `raw` (tables users, videos, interactions, rejects) and whether it was made now.

    Raises:
        InputError: the source's files cannot be used; the message says which, where and what to do.
    """
    inputs = {"source": source_fingerprint(settings)}
    mark = fingerprint("raw", settings.source.model_dump(exclude={"path"}), inputs)
    if found := run.finished("raw", mark, force):
        return found, False
    tables = read_source(settings)
    if tables.truth:
        _write_truth(run, settings, tables, inputs)
    with writing(run, "raw", fingerprint=mark, settings=settings, inputs=inputs) as out:
        for name in ("users", "videos", "interactions", "rejects"):
            out.write_table(name, getattr(tables, name))
        out.info = {"files": account(tables.files), "notes": tables.notes, "nulls": _nulls(tables)}
    return run.artifact("raw"), True


def source_fingerprint(settings: Settings) -> str:
    """Identity of what the source would give: the simulation's settings, or the contents of its files.

    Raises:
        InputError: the path does not exist or holds no file.
    """
    if settings.source.kind == "synthetic":
        return fingerprint("simulation", {**settings.synthetic.model_dump(), "seed": settings.seed}, {})
    path = Path(settings.source.path)
    if not path.exists():
        raise InputError(f"source.path={path}: no such file or folder")
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file() and p.suffix in _TABLE_SUFFIXES]
    if not files:
        raise InputError(f"source.path={path}: no data file in it (looked for {', '.join(_TABLE_SUFFIXES)})")
    return fingerprint_files(files)


def _write_truth(run: Run, settings: Settings, tables: SourceTables, inputs: dict[str, str]) -> None:
    mark = fingerprint("truth", settings.synthetic.model_dump(), inputs)
    with writing(run, "truth", fingerprint=mark, settings=settings, inputs=inputs) as out:
        for name, table in tables.truth.items():
            out.write_table(name, table)
        out.info = {"note": "What the simulation knows and no model may see: true causes, interests, flaws."}


def _nulls(tables: SourceTables) -> dict[str, list[str]]:
    """Columns the source knows nothing about, by table."""
    found = {}
    for name in ("users", "videos", "interactions"):
        table = getattr(tables, name)
        found[name] = [c for c in table.column_names if table.num_rows and table[c].null_count == table.num_rows]
    return found
