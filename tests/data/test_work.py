"""Work on many machines is lost neither with a worker nor with the command itself."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from test_scale import ROWS, assert_data_set, expected_raw, own_log, part_rows

from gubs import stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data import work as working
from gubs.data.sources import log_rows, read_source
from gubs.data.work import Work
from gubs.errors import InputError


def squares(folder: Path, fault: str = "") -> Callable[[int], int]:
    """Squares an item and notes the attempt; the first attempt at 2 has a fault. A closure, since workers cannot import
    this file.
    """

    def square(item: int) -> int:
        attempt = len(list(folder.glob(f"{item}-*")))
        (folder / f"{item}-{attempt}").touch()
        if item == 2 and attempt == 0 and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 2 and attempt == 0 and fault:
            raise InputError("line 2 is bad")
        return item * item

    return square


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "attempts").mkdir()
    return tmp_path / "attempts"


def test_a_worker_that_dies_costs_an_attempt(folder: Path, ray_local: None) -> None:
    work = Work(LocalFileSystem(), str(folder.parent / "kept"), on_ray=True)
    assert work.run("square", squares(folder, "killed"), range(4)) == [0, 1, 4, 9]
    assert len(list(folder.glob("2-*"))) == 2
    assert work.total("add", squares(folder), range(4)) == 14


def meeting(folder: Path) -> Callable[[int], bool]:
    """Whether another call runs at the same time, or within half a second."""

    def meet(item: int) -> bool:
        folder.mkdir(exist_ok=True)
        (folder / f"{item}").touch()
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends and len(list(folder.iterdir())) < 2:
            time.sleep(0.01)
        return len(list(folder.iterdir())) == 2

    return meet


def test_no_call_waits_for_the_end_of_the_first(tmp_path: Path, ray_local: None) -> None:
    """See `_on_ray`: with reserved resources, each of the six passes makes one call after the other. On a busy machine
    some may anyway.
    """
    work = Work(LocalFileSystem(), str(tmp_path / "kept"), on_ray=True)
    assert any(all(work.run(f"meet {n}", meeting(tmp_path / f"met-{n}"), range(2))) for n in range(6))


def test_an_error_with_a_remedy_ends_a_quick_pass(folder: Path, ray_local: None) -> None:
    work = Work(LocalFileSystem(), str(folder.parent / "kept"), on_ray=True)
    with pytest.raises(InputError, match="line 2 is bad"):
        work.total("add", squares(folder, "error"), range(4))


def test_what_ended_is_kept_and_an_error_with_a_remedy_arrives(folder: Path, ray_local: None) -> None:
    work = Work(LocalFileSystem(), str(folder.parent / "kept"), on_ray=True)
    with pytest.raises(InputError, match="line 2 is bad"):
        work.run("square", squares(folder, "error"), range(4))
    results = work.run("square", squares(folder, "error"), range(4))
    assert results == [0, 1, 4, 9]
    assert len(list((folder.parent / "kept").iterdir())) == 4
    assert work.run("square", squares(folder, "error"), range(4)) == results
    assert all(len(list(folder.glob(f"{item}-*"))) <= 2 for item in range(4))


def test_a_command_that_was_killed_goes_on(tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = own_log(tmp_path / "logs")
    settings = load_settings("tiny", [*source, part_rows(ROWS, 3), "data.ray_from_rows=0", "filters.min_video_views=2"])
    run, calls = Run(tmp_path / "r"), Counter[str]()
    real, decide = working._on_ray, log_rows.decide

    def counted(jobs, numbers):
        for job in jobs:
            calls[str(job.args[0]) if len(job.args) == 4 else "total"] += 1
        return real(jobs, numbers)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(working, "_on_ray", counted)
    monkeypatch.setattr(log_rows, "decide", killed)
    with pytest.raises(KeyboardInterrupt):
        stages.make(["raw"], run, settings)
    read = calls["read"]
    assert read
    (tmp_path / "r" / "raw.partial" / "interactions").mkdir()
    (tmp_path / "r" / "raw.partial" / "interactions" / "part-000000.parquet.tmp-other-1-x").touch()
    monkeypatch.setattr(log_rows, "decide", decide)
    stages.make(["ifvr"], run, settings)
    assert calls["read"] == read, "nothing is read again"
    assert not list((tmp_path / "r").rglob("*.tmp-*"))
    for name, table in expected_raw(settings).items():
        assert run.artifact("raw").table(name).equals(table), name
    assert_data_set(run, settings, read_source(settings.source).interactions)
