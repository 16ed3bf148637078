"""What makes the raw tables, or the frames, stale: any file that they were made from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gubs.data.ingest import source_identity
from gubs.data.settings import SourceSettings
from gubs.errors import InputError
from gubs.video.frames import files_identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("interactions.csv", "users.csv", "videos.csv", "films/v0.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a" * 300_000)
    return tmp_path


def replace_the_middle(folder: Path) -> None:
    (folder / "films/v0.mp4").write_bytes(b"b" * 300_000)


CHANGES: dict[str, tuple[Callable[[Path], object], bool, bool]] = {
    "users": (lambda folder: (folder / "users.csv").write_text("x"), True, False),
    "videos": (lambda folder: (folder / "videos.csv").unlink(), True, False),
    "a new file": (lambda folder: (folder / "films/v1.webm").write_text("x"), True, True),
    "a file that is gone": (lambda folder: (folder / "films/v0.mp4").unlink(), True, True),
    "other contents": (replace_the_middle, False, True),
    "a longer file": (lambda folder: (folder / "films/v0.mp4").write_bytes(b"a" * 300_001), False, True),
    "no video": (lambda folder: (folder / "films/note.txt").write_text("x"), False, False),
}
"""The change, and whether it makes the tables and the frames stale."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", ["", "interactions.csv"], ids=["folder", "file"])
def test_every_file_that_counts_makes_stale(folder: Path, path: str, change: str) -> None:
    source = SourceSettings(kind="logs", path=str(folder / path), videos_dir=str(folder / "films"))
    before = source_identity(source), files_identity(source)
    do, tables, frames = CHANGES[change]
    do(folder)
    after = source_identity(source), files_identity(source)
    assert (before[0] != after[0], before[1] != after[1]) == (tables, frames)


def test_the_folder_of_videos_must_exist(folder: Path) -> None:
    source = SourceSettings(kind="logs", path=str(folder), videos_dir=str(folder / "nowhere"))
    with pytest.raises(InputError, match=r"source\.videos_dir"):
        source_identity(source)
    assert files_identity(SourceSettings(kind="logs", path=str(folder))) == ""
