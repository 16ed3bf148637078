"""A run's folder: one artifact per stage, written atomically, with a manifest that says what it is and what made it.

An artifact's files go to `<stage>.tmp-...` (or `<stage>.partial`, if the stage can resume). When all are complete, the
folder is renamed to `<stage>`, and `manifest.json` is written last: a folder without a manifest is unfinished, whatever
it holds. A run's folder is a local path or any URI that fsspec knows (`s3://...`, `memory://...`).
"""

import datetime
import hashlib
import io
import json
import os
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

import gubs
from gubs.errors import ArtifactError, MissingArtifactError

if TYPE_CHECKING:
    from typing_extensions import Buffer

JsonObject = dict[str, Any]

SCHEMA_VERSION = 2
"""Version of tables and manifests; artifacts of another version are refused."""

MANIFEST = "manifest.json"
_RECIPE = "recipe.json"
_ROW_GROUP = 65536
_UPLOAD_MARK = "/runtime_resources/"
_MAX_CHANGES = 4
_TEMPORARY = ".tmp-"


class Part(BaseModel):
    """One file of a table that is cut into several."""

    model_config = ConfigDict(frozen=True)

    file: str
    """Path in the artifact's folder."""
    rows: int
    bytes: int
    keys: dict[str, str] = {}
    """What all its rows have in common: `task: click`."""
    digest: str = Field("", exclude=True)
    """Hash of its bytes, known when it is written."""


class TableInfo(BaseModel):
    """Size of one table of an artifact."""

    rows: int
    bytes: int
    parts: tuple[Part, ...] = ()
    """Its files, in order; empty: it is one file, named like the table."""

    def files(self, name: str) -> tuple[Part, ...]:
        """All its files, also if it is one."""
        return self.parts or (Part(file=f"{name}.parquet", rows=self.rows, bytes=self.bytes),)


class Recipe(BaseModel):
    """Everything that decides what an artifact holds. Equal recipes make equal artifacts, as far as the maker is
    deterministic (a language model need not be).
    """

    model_config = ConfigDict(frozen=True)

    inputs: dict[str, str] = {}
    """Content of each artifact it is made from, by stage."""
    settings: JsonObject = {}
    """The settings that affect it, by dotted name."""
    prompts: dict[str, str] = {}
    """Hash of each prompt template it fills."""
    outside: dict[str, str] = {}
    """Identity of each input from outside the run (source files, a model), by name."""
    version: int = 1
    """Version of the code that makes it; raised when that code gives another result for the same recipe."""

    def fingerprint(self, stage: str) -> str:
        """Hash of the recipe for a stage."""
        return fingerprint(stage, self.model_dump(mode="json"))

    def changes(self, now: "Recipe") -> list[str]:
        """What is different now, one phrase per change."""
        phrases = [f"made from another {name}" for name in _differing(self.inputs, now.inputs)]
        phrases += [
            f"{name}={_short(self.settings.get(name))}, now {_short(now.settings.get(name))}"
            for name in _differing(self.settings, now.settings)
        ]
        phrases += [f"the prompt {name} changed" for name in _differing(self.prompts, now.prompts)]
        phrases += [f"another {name}" for name in _differing(self.outside, now.outside)]
        return phrases + (["made by an earlier version of this stage"] if self.version != now.version else [])


def in_words(changes: Sequence[str]) -> str:
    """The first few changes as one text."""
    more = f" and {len(changes) - _MAX_CHANGES} more" if len(changes) > _MAX_CHANGES else ""
    return "; ".join(changes[:_MAX_CHANGES]) + more


class Manifest(BaseModel):
    """What an artifact is and what made it. An artifact with a manifest is complete."""

    model_config = ConfigDict(frozen=True)

    stage: str
    kind: str
    """Stage of the registry that made it; differs from `stage` for a training under another name."""
    schema_version: int
    fingerprint: str
    """Hash of the recipe."""
    content: str
    """Hash of what it holds. Stages that read it record this, so they stay current while the content is equal."""
    recipe: Recipe
    settings: JsonObject
    """All settings of the run, resolved."""
    code_version: str
    created: str
    """UTC, ISO 8601."""
    tables: dict[str, TableInfo]
    info: JsonObject = {}
    """The stage's report: counts, what was rejected, what could not be applied."""
    summary: str = ""
    """The report in one line, for a person."""


def fingerprint(name: str, values: object) -> str:
    """Hash of a name and JSON values: 16 hexadecimal digits."""
    text = json.dumps({"name": name, "schema": SCHEMA_VERSION, "values": values}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_files(paths: Sequence[str | Path]) -> str:
    """Hash of the names and contents of files, in any order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(map(Path, paths)):
        digest.update(path.name.encode())
        with path.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]


@cache
def code_version() -> str:
    """Version of the package, with the git commit if it runs from a checkout."""
    root = Path(gubs.__file__).parent.parent
    if (root / ".git").exists():
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            done = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True)
            return f"{gubs.__version__}+{done.stdout.strip()}"
        except (OSError, subprocess.SubprocessError):
            pass  # no git, or a checkout without commits: the version alone has to do
    return gubs.__version__


class Run:
    """A run's folder."""

    def __init__(self, uri: str | Path):
        self.uri = str(uri).rstrip("/")
        self.fs, self.root = fsspec.core.url_to_fs(self.uri)
        self.name = PurePosixPath(self.root).name

    def __repr__(self) -> str:
        return f"Run({self.uri!r})"

    def path(self, *parts: str) -> str:
        """Path inside the run's file system (no scheme)."""
        return "/".join([self.root, *parts])

    def full(self, *parts: str) -> str:
        """The same with the scheme, as a person or another process would open it."""
        return "/".join([self.uri, *parts])

    def stages(self) -> list[str]:
        """Names of the finished stages; one may be a link to a stage of another run."""
        if not self.fs.exists(self.root):
            return []
        folders = [p for p in self.fs.ls(self.root, detail=True) if p["type"] == "directory" or p.get("islink")]
        names = (PurePosixPath(p["name"]).name for p in folders)
        return sorted(n for n in names if "." not in n and self.has(n))

    def has(self, stage: str) -> bool:
        """Whether the run has the finished artifact."""
        return bool(self.fs.exists(self.path(stage, MANIFEST)))

    def artifact(self, stage: str) -> "Artifact":
        """Opens a finished artifact.

        Raises:
            MissingArtifactError: there is none, or it is unfinished. ArtifactError: it is damaged, or of another schema
                version.
        """
        where = self.full(stage)
        if not self.fs.exists(self.path(stage)):
            raise MissingArtifactError(stage, f"{where} does not exist")
        if not self.has(stage):
            raise MissingArtifactError(stage, f"{where} is unfinished (it has no {MANIFEST})")
        manifest = _read_manifest(self.fs.cat_file(self.path(stage, MANIFEST)), where)
        if manifest.stage != stage:
            raise ArtifactError(f"{where} holds the artifact of another stage, {manifest.stage!r}")
        for name, table in manifest.tables.items():
            if damaged := self._damaged(stage, name, table):
                raise ArtifactError(
                    f"{where} is damaged: {damaged} is missing or has another size than recorded; delete the folder "
                    "and run the command again"
                )
        return Artifact(self, stage, manifest)

    def _damaged(self, stage: str, name: str, table: TableInfo) -> str | None:
        """A file of the table that is not as it was written; the sizes of many files come from one listing."""
        sizes: dict[str, int] = {}
        folder = self.path(stage, name)
        if table.parts and self.fs.exists(folder):
            sizes = {PurePosixPath(e["name"]).name: e["size"] for e in self.fs.ls(folder, detail=True)}
        elif not table.parts and self.fs.exists(f"{folder}.parquet"):
            sizes = {f"{name}.parquet": self.fs.size(f"{folder}.parquet")}
        parts = table.files(name)
        return next((p.file for p in parts if sizes.get(PurePosixPath(p.file).name) != p.bytes), None)


def open_run(uri: str) -> Run:
    """The run at a path or URI.

    A relative path is relative to GUBS_HOME if that is set, else to the current folder. Inside a Ray job the current
    folder is a copy that Ray deletes; there it is relative to `~/gubs`, where results outlive the job.
    """
    if "://" in uri or Path(uri).is_absolute():
        return Run(uri)
    here = Path.home() / "gubs" if _UPLOAD_MARK in str(Path.cwd()) else Path.cwd()
    return Run(Path(os.environ.get("GUBS_HOME") or here) / uri)


def _read_manifest(data: bytes, where: str) -> Manifest:
    """Parses a manifest; checks the version first, since other versions have other fields."""
    try:
        version = json.loads(data)["schema_version"]
        if version == SCHEMA_VERSION:
            return Manifest.model_validate_json(data)
    except (ValueError, TypeError, KeyError) as e:
        raise ArtifactError(f"{where}/{MANIFEST} is not a manifest of gubs ({str(e).splitlines()[0]})") from None
    raise ArtifactError(
        f"{where} was written by another version of gubs (format {version}, this one reads {SCHEMA_VERSION}): use "
        "another --run, or delete that folder to make it again"
    )


class Artifact:
    """A finished artifact: tables and a manifest."""

    def __init__(self, run: Run, stage: str, manifest: Manifest):
        self.run, self.stage, self.manifest = run, stage, manifest

    @property
    def content(self) -> str:
        """Hash of what it holds."""
        return self.manifest.content

    @property
    def uri(self) -> str:
        """Its folder, with the scheme."""
        return self.run.full(self.stage)

    def remade_inputs(self) -> list[str]:
        """Stages that it was made from and that have been made again since, with other content."""
        inputs = self.manifest.recipe.inputs
        return [n for n, content in inputs.items() if self.run.has(n) and self.run.artifact(n).content != content]

    def path(self, name: str) -> str:
        """Path of a file of the artifact, with the scheme."""
        return self.run.full(self.stage, name)

    def table(self, name: str, columns: Sequence[str] | None = None, **keys: str) -> pa.Table:
        """Reads a table.

        Args:
            name: of the table.
            columns: what to read; None = all.
            keys: leaves out the parts that have another value for a key (`task="click"`).

        Raises:
            ArtifactError: the artifact has no such table.
        """
        read = [self.part(p, columns) for p in self._chosen(name, lambda p: _has_keys(p, keys))]
        return pa.concat_tables(read) if len(read) > 1 else read[0]

    def part(self, part: Part, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads one file of a table."""
        with self._open(part) as file:
            return file.read(columns=None if columns is None else list(columns), use_threads=False)

    def parts(self, name: str) -> tuple[Part, ...]:
        """The files of a table, in order. Errors: see `table`."""
        if name not in self.manifest.tables:
            raise ArtifactError(
                f"{self.uri} has no table {name!r} (it has: {', '.join(self.manifest.tables) or 'none'})"
            )
        return self.manifest.tables[name].files(name)

    def batches(
        self, name: str, columns: Sequence[str] | None = None, wanted: Callable[[Part], bool] = lambda _: True
    ) -> Iterator[pa.Table]:
        """Reads a table piece by piece (at most 65,536 rows), for tables that do not fit the memory; leaves out the
        parts that are not wanted. Errors: see `table`.
        """
        for part in self._chosen(name, wanted):
            with self._open(part) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(
                        group, columns=None if columns is None else list(columns), use_threads=False
                    )

    def _chosen(self, name: str, wanted: Callable[[Part], bool]) -> list[Part]:
        """The wanted parts; if there is none, an empty one."""
        parts = self.parts(name)
        return [p for p in parts if wanted(p)] or [min(parts, key=lambda p: p.rows)]

    @contextmanager
    def _open(self, part: Part) -> Iterator[pq.ParquetFile]:
        with self.run.fs.open(self.run.path(self.stage, part.file), "rb") as f:
            # No thread of Arrow may hold a Python file: one that lets go of it while the interpreter ends aborts the
            # process.
            yield pq.ParquetFile(f, pre_buffer=False)


def _has_keys(part: Part, keys: Mapping[str, str]) -> bool:
    return all(part.keys.get(k, v) == v for k, v in keys.items())


class ArtifactWriter:
    """Writes the files of an unfinished artifact. Made by `writing`."""

    def __init__(self, run: Run, stage: str, folder: str):
        self.run, self.stage, self.folder = run, stage, folder
        self.content = ""
        """Identity of what it holds; empty = the hash of its tables."""
        self.tables: dict[str, TableInfo] = {}
        self.info: JsonObject = {}
        self.summary = ""
        self.hashes: dict[str, str] = {}
        """Of the tables' bytes, by name."""

    def path(self, *parts: str) -> str:
        """Path inside the unfinished folder (no scheme)."""
        return "/".join([self.folder, *parts])

    def remove(self, *parts: str) -> None:
        """Deletes a file or folder of the unfinished folder, if it is there."""
        if self.run.fs.exists(path := self.path(*parts)):
            self.run.fs.rm(path, recursive=True)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Writes a table as one Parquet file. Equal rows give equal bytes, in however many chunks they are."""
        self.add_table(name, [write_part(self.run.fs, self.folder, f"{name}.parquet", table)])

    def add_table(self, name: str, parts: Sequence[Part]) -> None:
        """Adds a table whose files have been written (`write_part`), in their order: one `NAME.parquet`, or several in
        the folder NAME.
        """
        single = len(parts) == 1 and parts[0].file == f"{name}.parquet"
        rows, size = sum(p.rows for p in parts), sum(p.bytes for p in parts)
        self.tables[name] = TableInfo(rows=rows, bytes=size, parts=() if single else tuple(parts))
        self.hashes[name] = parts[0].digest if single else fingerprint(name, [(p.file, p.digest) for p in parts])


def part_file(name: str, number: int, parts: int, **keys: str) -> str:
    """The file of a table's part: `NAME.parquet` if it is the only one."""
    kind = "-".join(keys.values()) or "part"
    return f"{name}.parquet" if parts == 1 else f"{name}/{kind}-{number:06}.parquet"


def write_part(fs: fsspec.AbstractFileSystem, folder: str, file: str, table: pa.Table, **keys: str) -> Part:
    """Writes one file of a table, whole or not at all, so that several processes may try.

    Args:
        fs: the run's file system.
        folder: of the unfinished artifact (no scheme).
        file: path in that folder.
        table: the rows.
        keys: see `Part`.
    """
    path = f"{folder}/{file}"
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    temporary = _temporary(path)
    with fs.open(temporary, "wb") as f:
        hashing = _HashingFile(f)
        with pq.ParquetWriter(hashing, table.schema, compression="zstd") as writer:
            for batch in table.combine_chunks().to_batches(max_chunksize=_ROW_GROUP):
                writer.write_batch(batch, row_group_size=_ROW_GROUP)
    size = fs.size(temporary)
    fs.mv(temporary, path)
    return Part(file=file, rows=table.num_rows, bytes=size, keys=keys, digest=hashing.digest.hexdigest())


class _HashingFile(io.RawIOBase):
    """Hashes what is written through it; Parquet files are written from front to back."""

    def __init__(self, file: IO[bytes]):
        self._file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: "Buffer") -> int:
        self.digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def writing(
    run: Run, stage: str, *, recipe: Recipe, settings: Mapping[str, Any], kind: str = "", resume_key: str | None = None
) -> Iterator[ArtifactWriter]:
    """Context in which an artifact is written; leaving it without an error publishes the artifact.

    Args:
        run: the run that gets the artifact.
        stage: name of the artifact.
        recipe: what decides its content.
        settings: all settings of the run, for the record.
        kind: see `Manifest`; empty = `stage`.
        resume_key: if given, an interrupted attempt is kept, and a later one with the same key finds its files; else it
            is deleted.
    """
    _delete_leftovers(run, stage)
    if resume_key is None:
        folder = _temporary(run.path(stage))
        run.fs.makedirs(folder, exist_ok=True)
    else:
        folder = _open_partial(run, stage, resume_key)
    writer = ArtifactWriter(run, stage, folder)
    try:
        yield writer
    except BaseException:
        if resume_key is None:
            run.fs.rm(folder, recursive=True)
        raise
    if resume_key is not None:
        _delete_half_written(run, folder)
    manifest = Manifest(
        stage=stage,
        kind=kind or stage,
        schema_version=SCHEMA_VERSION,
        fingerprint=recipe.fingerprint(kind or stage),
        content=writer.content or fingerprint(stage, writer.hashes),
        recipe=recipe,
        settings=dict(settings),
        code_version=code_version(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        tables=writer.tables,
        info=writer.info,
        summary=writer.summary,
    )
    _publish(run, stage, folder, manifest)


@dataclass(frozen=True)
class StageJob:
    """One stage to make: where it goes, what decides it, how its artifact is written."""

    run: Run
    stage: str
    kind: str
    recipe: Recipe
    settings: Mapping[str, Any]
    """All settings, for the manifest; a maker reads only the sections it gets."""
    force: bool = False
    """Make it again even if it is current."""

    def input(self, name: str) -> Artifact:
        """An artifact that the stage reads. Errors: see `Run.artifact`."""
        return self.run.artifact(name)

    def reads(self, name: str) -> bool:
        """Whether the stage is made from that artifact."""
        return name in self.recipe.inputs

    def writing(self, resume_key: str | None = None) -> AbstractContextManager[ArtifactWriter]:
        """See `writing`."""
        return writing(
            self.run, self.stage, recipe=self.recipe, settings=self.settings, kind=self.kind, resume_key=resume_key
        )


def write_atomically(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Writes a file under a temporary name and renames it: readers see the whole file or none."""
    temporary = _temporary(path)
    fs.pipe_file(temporary, data)
    fs.mv(temporary, path)


def _publish(run: Run, stage: str, folder: str, manifest: Manifest) -> None:
    final = run.path(stage)
    if run.fs.exists(final):  # its manifest goes first, so that a half-deleted folder does not look finished
        if run.has(stage):
            run.fs.rm_file(f"{final}/{MANIFEST}")
        run.fs.rm(final, recursive=True)
    if run.fs.exists(f"{folder}/{_RECIPE}"):
        run.fs.rm_file(f"{folder}/{_RECIPE}")
    run.fs.mv(folder, final, recursive=True)
    write_atomically(run.fs, f"{final}/{MANIFEST}", manifest.model_dump_json(indent=1).encode())


def _open_partial(run: Run, stage: str, key: str) -> str:
    folder = run.path(f"{stage}.partial")
    key_file = f"{folder}/{_RECIPE}"
    if run.fs.exists(folder) and (not run.fs.exists(key_file) or run.fs.cat_file(key_file).decode() != key):
        run.fs.rm(folder, recursive=True)  # made with other settings
    run.fs.makedirs(folder, exist_ok=True)
    if not run.fs.exists(key_file):
        write_atomically(run.fs, key_file, key.encode())
    return folder


def _delete_half_written(run: Run, folder: str) -> None:
    """Deletes the files that killed writers of an attempt left under temporary names."""
    for path in run.fs.find(folder):
        if _TEMPORARY in PurePosixPath(path).name:
            run.fs.rm_file(path)


def _differing(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _temporary(path: str) -> str:
    """A name beside `path` that says which process owns it."""
    return f"{path}{_TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def _delete_leftovers(run: Run, stage: str) -> None:
    """Deletes what killed processes of this machine left behind for this stage."""
    if not run.fs.exists(run.root):
        return
    prefix = f"{stage}{_TEMPORARY}{socket.gethostname()}-"
    for entry in run.fs.ls(run.root, detail=True):
        name = PurePosixPath(entry["name"]).name
        if name.startswith(prefix):
            pid = name.removeprefix(prefix).split("-")[0]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                run.fs.rm(entry["name"], recursive=True)
