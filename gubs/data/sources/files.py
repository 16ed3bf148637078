"""Where a source's files are: local paths, globs, folders of parts, and any URI that fsspec knows (`s3://...`)."""

import glob
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import fsspec
import pyarrow as pa

from gubs.artifacts import fingerprint
from gubs.errors import InputError

_ZIPPED = {".gz": "gzip", ".zst": "zstd"}
_WILD = frozenset("*?[")
_SMALL_BYTES = 8 << 20
"""Files up to this size are hashed whole; of larger ones the ends, the size and what the store says."""
_END_BYTES = 1 << 16
_STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "checksum", "mtime", "LastModified", "last_modified")
"""What file systems call the stamp of a file's contents, best first."""


@dataclass(frozen=True)
class InputFile:
    """A file of a source."""

    uri: str
    """Local path, or URI."""
    label: str
    """Its name in messages and accounts."""

    @classmethod
    def at(cls, path: Path) -> "InputFile":
        """A local file, called by its name."""
        return cls(str(path), path.name)

    @property
    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return located(self.uri)

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return "://" not in self.uri

    def exists(self) -> bool:
        """Whether it is there."""
        fs, path = self._place
        return bool(fs.isfile(path))

    def size(self) -> int:
        """Its size in bytes."""
        fs, path = self._place
        return int(fs.size(path))

    @property
    def suffix(self) -> str:
        """Its kind, without what it is packed with: `.csv` of `log.csv.gz`."""
        return next((s for s in reversed(PurePosixPath(self.label).suffixes) if s not in _ZIPPED), "")

    @property
    def zipped(self) -> str | None:
        """How it is packed, by its suffix."""
        return _ZIPPED.get(PurePosixPath(self.label).suffix)

    def open(self) -> BinaryIO:
        """Its bytes, as they are."""
        fs, path = self._place
        return fs.open(path, "rb")

    def stream(self) -> pa.NativeFile:
        """Its bytes, unpacked, from front to back."""
        if self.is_local:
            return pa.input_stream(self.uri, compression=self.zipped)
        raw = pa.PythonFile(self.open(), mode="r")
        return pa.CompressedInputStream(raw, self.zipped) if self.zipped else raw

    def identity(self) -> tuple[str, ...]:
        """What tells whether it is the same file: its bytes if it is small; else its size, its stamp and its ends."""
        fs, path = self._place
        info = fs.info(path)
        size = int(info["size"])
        with fs.open(path, "rb") as f:
            if size <= _SMALL_BYTES:
                return self.label, str(size), hashlib.sha256(f.read()).hexdigest()
            ends = f.read(_END_BYTES)
            f.seek(size - _END_BYTES)
            ends += f.read()
        stamp = next((str(info[s]) for s in _STAMPS if info.get(s)), "")
        return self.label, str(size), stamp, hashlib.sha256(ends).hexdigest()


def is_wild(path: str) -> bool:
    """Whether a path or URI is a glob; one that exists literally is not."""
    return bool(_WILD & set(path)) and not _exists(path)


def _exists(place: str) -> bool:
    fs, path = located(place)
    return bool(fs.exists(path))


def located(place: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URI, and the path in it.

    Raises:
        InputError: its scheme is unknown, or needs a package that is not installed.
    """
    try:
        return fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as e:
        raise InputError(f"{place} cannot be opened: {e}") from None


def identity(files: Iterable[InputFile]) -> str:
    """Hash of what tells whether these are the same files, in any order."""
    return fingerprint("files", sorted(f.identity() for f in files))


def matching(pattern: str) -> list[InputFile]:
    """The files that match a glob, by name; labels are relative to its fixed part."""
    fs, path = located(pattern)
    fixed = _fixed(path, fs.exists)
    paths = sorted(p for p in fs.glob(glob.escape(fixed) + path.removeprefix(fixed)) if fs.isfile(p))
    return [InputFile(_full(pattern, fs, p), p.removeprefix(fixed).lstrip("/")) for p in paths]


def listed(folder: str, suffixes: Sequence[str]) -> list[InputFile]:
    """The files of a folder of parts and its subfolders, by name, with these suffixes; hidden ones and markers (names
    that begin with `_` or `.`) are left out. Labels begin with the folder's own name.
    """
    fs, path = located(folder)
    root = path.rstrip("/")
    paths = [p for p in sorted(fs.find(root)) if p.endswith(tuple(suffixes)) and not _hidden(p.removeprefix(root))]
    parent = root.rpartition("/")[0]
    return [InputFile(_full(folder, fs, p), p.removeprefix(parent).lstrip("/")) for p in paths]


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def fixed_folder(pattern: str) -> str:
    """The folder (path or URI) that a glob's matches have in common; folders that exist literally belong to it,
    whatever characters their names have.
    """
    return _fixed(pattern, _exists)


def _fixed(pattern: str, exists: Callable[[str], bool]) -> str:
    names = pattern.split("/")[:-1]
    for n, name in enumerate(names):
        if _WILD & set(name) and not exists("/".join(names[: n + 1])):
            return "/".join(names[:n])
    return "/".join(names)


def _full(like: str, fs: fsspec.AbstractFileSystem, path: str) -> str:
    return str(fs.unstrip_protocol(path)) if "://" in like else path


def in_folder(folder: str, name: str) -> InputFile:
    """A file of a folder (path or URI)."""
    return InputFile(f"{folder.rstrip('/')}/{name}", name)


def refuse_missing(path: str) -> None:
    """Refuses a path or URI where there is nothing.

    Raises:
        InputError: nothing is there, or no file matches the glob.
    """
    if is_wild(path):
        if not matching(path):
            raise InputError(f"source.path={path}: no file matches")
        return
    fs, place = located(path)
    if not fs.exists(place):
        raise InputError(f"source.path={path}: no such file or folder")
