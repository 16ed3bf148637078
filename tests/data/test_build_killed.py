"""`gubs build` whose driver is killed at one blow while the cluster works: the same command goes on."""

import signal
import subprocess
import sys
from pathlib import Path

from node_helpers import wait_for
from test_scale import LIMITS, ROWS, assert_data_set, expected_raw, own_log, part_rows

from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data.sources import read_source

PARTS, PATIENCE = 24, 120


def build(run: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    """Starts the command as a user does, in a process group of its own."""
    command = [sys.executable, "-m", "gubs.cli", "build", "--run", str(run), *overrides]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def killed_in(run: Path, stage: str, phase: str, overrides: list[str]) -> list[int]:
    """Kills the command once a phase of a stage has some results; returns their numbers."""

    def kept() -> list[int]:
        files = (run / f"{stage}.partial" / "work").glob(f"{phase}-*.pickle")
        return [int(file.stem.rpartition("-")[2]) for file in files]

    driver = build(run, overrides)
    try:
        wait_for(lambda: kept() or driver.poll() is not None, PATIENCE, f"results of {phase!r}")
        driver.send_signal(signal.SIGKILL)
        _, errors = driver.communicate(timeout=PATIENCE)
    finally:
        driver.kill()
    assert driver.returncode == -signal.SIGKILL, errors.decode()
    return kept()


def written(folder: Path, numbers: list[int]) -> dict[str, int]:
    """When each file of these parts was written."""
    files = [f for n in numbers for f in folder.rglob(f"*{n:06}.parquet") if "rejects" not in f.parts]
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in files}


def test_a_killed_driver_costs_only_what_was_not_finished(tmp_path: Path, ray_local: None) -> None:
    import ray

    address = f"ray.address={ray.get_runtime_context().gcs_address}"
    run, source = tmp_path / "r", own_log(tmp_path / "logs")
    overrides = [*LIMITS, *source, part_rows(ROWS, PARTS), "data.ray_from_rows=0", address]
    first = killed_in(run, "raw", "regroup-by-user", overrides)
    assert 0 < len(first) < PARTS, "in the middle"
    raw = written(run / "raw.partial", first)
    second = killed_in(run, "ifvr", "write", overrides)
    assert 0 < len(second) < PARTS
    ifvr = written(run / "ifvr.partial", second)
    assert not (run / "ifvr").exists()
    driver = build(run, overrides)
    _, errors = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, errors.decode()
    for stage, before, numbers in (("raw", raw, first), ("ifvr", ifvr, second)):
        now = written(run / stage, numbers)
        assert len(before) > len(numbers), "users and interactions"
        assert {file: now[file] for file in before} == before, "what was finished is not written again"
        assert not (run / f"{stage}.partial").exists()
    settings = load_settings("tiny", [o for o in overrides if o != address])
    for name, table in expected_raw(settings).items():
        assert Run(run).artifact("raw").table(name).equals(table), name
    assert_data_set(Run(run), settings, read_source(settings.source).interactions)
