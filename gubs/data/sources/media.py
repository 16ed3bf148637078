"""Finds video files and covers by the stem of their names: `covers/17.jpg` belongs to the video `17`."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from gubs.errors import InputError

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".flv", ".ts", ".gif"})
COVER_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


def media_by_stem(folders: Iterable[Path], suffixes: frozenset[str], setting: str) -> dict[str, str]:
    """Absolute paths of the files with these suffixes, at any depth, by stem.

    Raises:
        InputError: a folder is missing, or two files have the same stem.
    """
    found: dict[str, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; mend the setting {setting}")
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes):
            if path.stem in found:
                raise InputError(f"{path}: {found[path.stem]} has the same stem; keep one file for a video")
            found[path.stem] = str(path.resolve())
    return found


def paths_of(ids: pa.ChunkedArray, found: dict[str, str]) -> pa.ChunkedArray:
    """The path of each id's file; null where there is none."""
    return pa.chunked_array([pa.array([found.get(i) for i in ids.to_pylist()], pa.string())])
