"""Finds video files and covers by the stem of their names: `covers/17.jpg` belongs to the video `17`."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from gubs.errors import InputError

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".flv", ".ts", ".gif"})
COVER_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


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
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; correct the setting {setting}")
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes):
            if path.stem in paths:
                raise InputError(f"{path}: {paths[path.stem]} has the same stem; keep one file per video")
            paths[path.stem] = str(path.resolve())
    return pa.chunked_array([pa.array([paths.get(i) for i in ids.to_pylist()], pa.string())])
