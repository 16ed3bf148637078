"""What makes the raw tables, or the frames, stale: any file that they were made from."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from gubs.config import load_settings
from gubs.data.ingest import source_identity
from gubs.data.settings import SourceSettings
from gubs.data.sources import read_source
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


def test_large_files_are_told_apart_by_size_stamp_and_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gubs.data.sources.files._SMALL_BYTES", 1000)
    path = folder / "interactions.csv"
    source = SourceSettings(kind="logs", path=str(folder))
    before, stamp = source_identity(source), path.stat().st_mtime_ns
    seen = {before}
    for change, when in [
        (b"b" + b"a" * 299_999, 0),
        (b"a" * 299_999 + b"b", 0),
        (b"a" * 300_001, 0),
        (b"a" * 300_000, 1),
    ]:
        path.write_bytes(change)
        os.utime(path, ns=(stamp + 10**9 * when, stamp + 10**9 * when))
        seen.add(source_identity(source))
    assert len(seen) == 5
    path.write_bytes(b"a" * 300_000)
    os.utime(path, ns=(stamp, stamp))
    assert source_identity(source) == before


def test_parts_globs_and_uris_have_an_identity(folder: Path) -> None:
    (folder / "interactions.csv").rename(folder / "log.csv")
    (folder / "interactions").mkdir()
    part = folder / "interactions" / "part-0.csv"
    part.write_text("x")
    parts, pattern = (SourceSettings(kind="logs", path=p) for p in (str(folder), f"{folder}/interactions/*.csv"))
    before = source_identity(parts), source_identity(pattern)
    (folder / "interactions" / "_SUCCESS").write_text("")
    assert before == (source_identity(parts), source_identity(pattern))
    part.write_text("y")
    assert before[0] != source_identity(parts)
    assert before[1] != source_identity(pattern)
    with pytest.raises(InputError, match="no file matches"):
        source_identity(SourceSettings(kind="logs", path=f"{folder}/nothing-*.csv"))
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/identity", recursive=True)
    remote = SourceSettings(kind="logs", path="memory://identity")
    before = source_identity(remote)
    fs.pipe_file("/identity/users.csv", b"z")
    assert before != source_identity(remote)
    fs.rm("/identity", recursive=True)


def test_the_folder_of_videos_must_exist(folder: Path) -> None:
    source = SourceSettings(kind="logs", path=str(folder), videos_dir=str(folder / "nowhere"))
    with pytest.raises(InputError, match=r"source\.videos_dir"):
        source_identity(source)
    assert files_identity(SourceSettings(kind="logs", path=str(folder))) == ""


@pytest.mark.parametrize("path", ["nosuch://bucket/log", "s3://bucket/log"])
def test_a_place_that_cannot_be_opened_is_refused_by_name(path, monkeypatch):
    """An unknown scheme, and one whose package is missing."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=f"{path} cannot be opened: .*(nosuch|s3fs)"):
        source_identity(SourceSettings(kind="logs", path=path))


def test_public_data_at_a_uri_are_refused():
    with pytest.raises(ValidationError, match="reads a local folder, not memory://x"):
        SourceSettings(kind="movielens", path="memory://x")


ROWS = "user_id,video_id,play_rate\nann,v1,0.5\n"


def put(path: Path, text: str = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["logs[1]", "[a", "b]", "what?", "all*", "[a-z]*"])
def test_a_folder_or_file_with_a_globs_characters_in_its_name_is_a_path(tmp_path, name):
    """Beside it is what the name would match as a glob."""
    folder = tmp_path / name
    file = put(folder / "interactions.csv")
    put(tmp_path / "logs1" / "interactions.csv", "wrong\n")
    put(folder / "users.csv", "user_id,age\nann,30\n")
    for path in (folder, file):
        settings = load_settings("tiny", ["source.kind=logs", f"source.path={path}"]).source
        source_identity(settings)
        tables = read_source(settings)
        assert tables.users["age"].to_pylist() == [30]
        assert list(tables.files) == ["interactions.csv", "users.csv"]
    file.rename(folder / f"{name}.csv")
    tables = read_source(SourceSettings(kind="logs", path=str(folder / f"{name}.csv")))
    assert tables.interactions["video_id"].to_pylist() == ["v1"]


def test_a_glob_below_such_a_folder_is_a_glob(tmp_path):
    folder = tmp_path / "logs[1]"
    for n in (1, 2, 3):
        put(folder / "interactions" / f"part-{n}.csv")
    put(tmp_path / "logs1" / "interactions" / "part-1.csv", "wrong\n")
    put(folder / "users.csv", "user_id,age\nann,30\n")
    tables = read_source(SourceSettings(kind="logs", path=f"{folder}/interactions/part-[12].csv"))
    assert list(tables.files) == ["part-1.csv", "part-2.csv", "users.csv"]
    assert tables.users["age"].to_pylist() == [30]
    with pytest.raises(InputError, match="no file matches"):
        source_identity(SourceSettings(kind="logs", path=f"{folder}/interactions/part-[45].csv"))


def test_a_public_data_set_in_such_a_folder_is_read(tmp_path):
    put(tmp_path / "[x]" / "u.data", "1\t2\t5\t900000000\n")
    put(tmp_path / "[x]" / "u.item", "|".join(["2", "Film", "", "", "", *["0"] * 19]) + "\n")
    settings = SourceSettings(kind="movielens", path=str(tmp_path / "[x]"))
    source_identity(settings)
    assert read_source(settings).interactions["video_id"].to_pylist() == ["2"]


def test_a_uri_with_a_globs_characters_is_a_path_too():
    fs = fsspec.filesystem("memory")
    fs.pipe("/wild[1]/interactions.csv", ROWS.encode())
    try:
        for path in ("memory://wild[1]", "memory://wild[1]/interactions.csv", "memory://wild[1]/*.csv"):
            assert read_source(SourceSettings(kind="logs", path=path)).interactions.num_rows == 1
    finally:
        fs.rm_file("/wild[1]/interactions.csv")
