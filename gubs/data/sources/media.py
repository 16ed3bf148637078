"""Finds video files and covers by the stem of their names: `covers/17.jpg` belongs to the video `17`."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from gubs.artifacts import fingerprint
from gubs.errors import InputError

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".flv", ".ts", ".gif"})
COVER_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

_END_BYTES = 1 << 16
"""Bytes at each end of a video file that tell whether it is another one."""


def media_paths(
    ids: pa.ChunkedArray, folders: Iterable[Path], suffixes: frozenset[str], setting: str
) -> pa.ChunkedArray:
    """Absolute path of each id's file, at any depth of the folders; null if it has none.

    Args:
        ids: ids of videos.
        folders: where to look.
        suffixes: suffixes of the files, in lower case.
        setting: name of the setting that gives the folders.

    Raises:
        InputError: a folder is missing, or two files have the same stem.
    """
    paths: dict[str, str] = {}
    for folder in folders:
        for path in _media(folder, suffixes, setting):
            if path.stem in paths:
                raise InputError(f"{path}: {paths[path.stem]} has the same stem; keep one file per video")
            paths[path.stem] = str(path.resolve())
    return pa.chunked_array([pa.array([paths.get(i) for i in ids.to_pylist()], pa.string())])


def videos_identity(videos_dir: str, contents: bool) -> str:
    """Identity of the video files in a folder, by their names, and with `contents` also by their sizes and ends, since
    whole videos are too much to read each time.

    Raises:
        InputError: the folder is missing.
    """
    folder = Path(videos_dir)
    files = _media(folder, VIDEO_SUFFIXES, "source.videos_dir")
    return fingerprint("videos", [(str(f.relative_to(folder)), *(_ends(f) if contents else ())) for f in files])


def _media(folder: Path, suffixes: frozenset[str], setting: str) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; correct the setting {setting}")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)


def _ends(file: Path) -> tuple[int, str]:
    """A file's size, and a hash of its first and last bytes."""
    with file.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        ends = f.read(_END_BYTES)
        f.seek(max(0, size - _END_BYTES))
        return size, hashlib.sha256(ends + f.read()).hexdigest()
