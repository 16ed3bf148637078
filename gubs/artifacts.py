"""A run's folder: one artifact a stage, written atomically, with a manifest that says what it is and what made it.

Life of an artifact: files go to `<stage>.tmp-...` (or, where a stage can be continued, `<stage>.partial`); when all are
there the folder is renamed to `<stage>`; last of all `manifest.json` is put in. A folder without a manifest is
unfinished, whatever it holds. A run's folder is a local path or any URI that fsspec knows (`s3://...`, `memory://...`).
"""

import datetime
import hashlib
import json
import os
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

import gubs
from gubs.errors import ArtifactError

SCHEMA_VERSION = 1
"""Version of the tables' schemas; artifacts of another version are refused."""

MANIFEST = "manifest.json"
_RECIPE = "recipe.json"
_ROW_GROUP = 65536


class TableInfo(BaseModel):
    """Size of one table of an artifact."""

    rows: int
    bytes: int


class Manifest(BaseModel):
    """What an artifact is and what made it. Its presence says that the artifact is complete."""

    model_config = ConfigDict(frozen=True)

    stage: str
    schema_version: int
    fingerprint: str
    """Hash of stage, schema version, the settings that matter to the stage, and the fingerprints of its inputs."""
    inputs: dict[str, str]
    """Fingerprint of each input, by name."""
    settings: dict[str, Any]
    """All settings of the run, resolved."""
    code_version: str
    created: str
    tables: dict[str, TableInfo]
    info: dict[str, Any] = {}
    """What the stage has to report: counts, what was rejected, what could not be applied."""


def fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The identity of what a stage would make: equal fingerprints mean equal output."""
    recipe = {"stage": stage, "schema": SCHEMA_VERSION, "settings": dict(settings), "inputs": dict(inputs)}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint_files(paths: Sequence[str | Path]) -> str:
    """Hash of the contents of files, in the order of their names."""
    h = hashlib.sha256()
    for p in sorted(Path(p) for p in paths):
        h.update(p.name.encode())
        with p.open("rb") as f:
            h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()[:16]


@cache
def code_version() -> str:
    """Version of the package, with the git commit where the package runs from a checkout."""
    root = Path(gubs.__file__).parent.parent
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            done = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True)
            return f"{gubs.__version__}+{done.stdout.strip()}"
        except (OSError, subprocess.SubprocessError):
            pass  # no git, or a checkout without commits: the version alone will do
    return gubs.__version__


class Run:
    """A run's folder."""

    def __init__(self, uri: str | Path):
        self.uri = str(uri).rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.uri)
        self.name = self.root.rstrip("/").rsplit("/", 1)[-1]

    def __repr__(self) -> str:
        return f"Run({self.uri!r})"

    def path(self, *parts: str) -> str:
        """Path inside the run's file system (no scheme)."""
        return "/".join([self.root, *parts])

    def full(self, *parts: str) -> str:
        """The same with the scheme, as a person or another process would open it."""
        return "/".join([self.uri, *parts])

    def stages(self) -> list[str]:
        """Names of the finished stages; one may be a link to that of another run."""
        if not self.fs.exists(self.root):
            return []
        names = [
            p["name"].rstrip("/").rsplit("/", 1)[-1]
            for p in self.fs.ls(self.root, detail=True)
            if p["type"] == "directory" or p.get("islink")
        ]
        return sorted(n for n in names if "." not in n and self.fs.exists(self.path(n, MANIFEST)))

    def artifact(self, stage: str) -> "Artifact":
        """Opens a finished artifact.

        Raises:
            ArtifactError: there is none, it is unfinished or damaged, or of another schema version.
        """
        return Artifact(self, stage, self._manifest(stage))

    def finished(self, stage: str, fingerprint: str, force: bool = False) -> "Artifact | None":
        """The artifact, if this very one (same fingerprint) is finished; None if there is none, or `force`.

        Raises:
            ArtifactError: a finished artifact with other settings or inputs is in the way.
        """
        if force or not self.fs.exists(self.path(stage, MANIFEST)):
            return None
        found = self.artifact(stage)
        if found.manifest.fingerprint != fingerprint:
            raise ArtifactError(
                f"{self.full(stage)} was made with other settings or inputs "
                f"({found.manifest.fingerprint}, now {fingerprint}): use another --run, or --force to replace it"
            )
        return found

    def _manifest(self, stage: str) -> Manifest:
        where = self.full(stage)
        if not self.fs.exists(self.path(stage)):
            raise ArtifactError(f"{where}: there is no such artifact; run the stage {stage!r} first (`gubs --help`)")
        path = self.path(stage, MANIFEST)
        if not self.fs.exists(path):
            raise ArtifactError(f"{where} is unfinished (no {MANIFEST}): run the stage {stage!r} again")
        try:
            manifest = Manifest.model_validate_json(self.fs.cat_file(path))
        except ValidationError as e:
            raise ArtifactError(f"{where}/{MANIFEST} is not a manifest of gubs ({e.error_count()} errors)") from None
        if manifest.stage != stage:
            raise ArtifactError(f"{where} holds the artifact of another stage, {manifest.stage!r}")
        if manifest.schema_version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{where} has schema version {manifest.schema_version}, this code reads {SCHEMA_VERSION}: make it again"
            )
        for name, table in manifest.tables.items():
            file = self.path(stage, f"{name}.parquet")
            if not self.fs.exists(file) or self.fs.size(file) != table.bytes:
                raise ArtifactError(
                    f"{where} is damaged: {name}.parquet is missing or not of the recorded size; make it again"
                )
        return manifest


class Artifact:
    """A finished artifact: tables and a manifest."""

    def __init__(self, run: Run, stage: str, manifest: Manifest):
        self.run, self.stage, self.manifest = run, stage, manifest

    @property
    def fingerprint(self) -> str:
        """Identity of the content, to be used as an input's fingerprint by the next stage."""
        return self.manifest.fingerprint

    @property
    def uri(self) -> str:
        """Where it is."""
        return self.run.full(self.stage)

    def path(self, name: str) -> str:
        """Path of a file of the artifact, with the scheme."""
        return self.run.full(self.stage, name)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads a table.

        Raises:
            ArtifactError: the artifact has no such table.
        """
        if name not in self.manifest.tables:
            known = ", ".join(self.manifest.tables) or "none"
            raise ArtifactError(f"{self.uri} has no table {name!r} (it has: {known})")
        with self.run.fs.open(self.run.path(self.stage, f"{name}.parquet"), "rb") as f:
            return pq.read_table(f, columns=None if columns is None else list(columns))


class ArtifactWriter:
    """Writes the files of an artifact that is not finished yet. Made by `writing`."""

    def __init__(self, run: Run, stage: str, folder: str):
        self.run, self.stage, self.folder = run, stage, folder
        self.fingerprint = ""
        """Identity of what is published, where it becomes known only now; empty = the one `writing` was given."""
        self.tables: dict[str, TableInfo] = {}
        self.info: dict[str, Any] = {}

    def path(self, *parts: str) -> str:
        """Path inside the unfinished folder (no scheme)."""
        return "/".join([self.folder, *parts])

    def write_table(self, name: str, table: pa.Table) -> None:
        """Writes a table as one Parquet file. The same rows give the same bytes."""
        self.write_batches(name, table.schema, table.to_batches(max_chunksize=_ROW_GROUP))

    def write_batches(
        self, name: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch] | Sequence[pa.RecordBatch]
    ) -> None:
        """Writes a table batch by batch, without holding all of it."""
        rows, path = 0, self.path(f"{name}.parquet")
        with self.run.fs.open(path, "wb") as f, pq.ParquetWriter(f, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch, row_group_size=_ROW_GROUP)
                rows += batch.num_rows
        self.tables[name] = TableInfo(rows=rows, bytes=self.run.fs.size(path))

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file (an HTML page, a JSON report)."""
        self.run.fs.pipe_file(self.path(name), text.encode())


@contextmanager
def writing(
    run: Run,
    stage: str,
    *,
    fingerprint: str,
    settings: BaseModel,
    inputs: Mapping[str, str],
    resumable: bool = False,
) -> Iterator[ArtifactWriter]:
    """Context in which an artifact is written; leaving it without an error publishes the artifact.

    With `resumable`, the unfinished folder keeps its name, and what an interrupted attempt with the same fingerprint
    left there is found again; else an interrupted attempt is cleared away.
    """
    _clear_dead(run, stage)
    folder = (
        _open_partial(run, stage, fingerprint)
        if resumable
        else run.path(f"{stage}.tmp-{_owner()}-{uuid.uuid4().hex[:6]}")
    )
    run.fs.makedirs(folder, exist_ok=True)
    writer = ArtifactWriter(run, stage, folder)
    try:
        yield writer
    except BaseException:
        if not resumable:
            run.fs.rm(folder, recursive=True)
        raise
    manifest = Manifest(
        stage=stage,
        schema_version=SCHEMA_VERSION,
        fingerprint=writer.fingerprint or fingerprint,
        inputs=dict(inputs),
        settings=settings.model_dump(mode="json"),
        code_version=code_version(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tables=writer.tables,
        info=writer.info,
    )
    _publish(run, stage, folder, manifest)


def write_atomically(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a file under a temporary name and renames it: readers see the whole file or none."""
    temporary = f"{path}.tmp-{_owner()}-{uuid.uuid4().hex[:6]}"
    fs.pipe_file(temporary, data)
    fs.mv(temporary, path)


def _publish(run: Run, stage: str, folder: str, manifest: Manifest) -> None:
    final = run.path(stage)
    if run.fs.exists(final):  # unfinished, or to be replaced: first it loses its manifest, then its place
        if run.fs.exists(f"{final}/{MANIFEST}"):
            run.fs.rm_file(f"{final}/{MANIFEST}")
        run.fs.rm(final, recursive=True)
    if run.fs.exists(f"{folder}/{_RECIPE}"):
        run.fs.rm_file(f"{folder}/{_RECIPE}")
    run.fs.mv(folder, final, recursive=True)
    write_atomically(run.fs, f"{final}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())


def _open_partial(run: Run, stage: str, fingerprint: str) -> str:
    folder = run.path(f"{stage}.partial")
    recipe = f"{folder}/{_RECIPE}"
    if run.fs.exists(folder) and (not run.fs.exists(recipe) or run.fs.cat_file(recipe).decode() != fingerprint):
        run.fs.rm(folder, recursive=True)  # of other settings: of no use
    run.fs.makedirs(folder, exist_ok=True)
    if not run.fs.exists(recipe):
        write_atomically(run.fs, recipe, fingerprint.encode())
    return folder


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _clear_dead(run: Run, stage: str) -> None:
    """Removes what killed processes of this machine left behind for this stage."""
    if not run.fs.exists(run.root):
        return
    mine = f"{stage}.tmp-{socket.gethostname()}-"
    for entry in run.fs.ls(run.root, detail=True):
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        if name.startswith(mine):
            pid = name.removeprefix(mine).split("-")[0]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                run.fs.rm(entry["name"], recursive=True)
