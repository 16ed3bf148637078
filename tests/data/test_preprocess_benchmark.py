"""The benchmark of the way from logs to the data set, at a tiny size: one command, one file, whatever fails."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

benchmark = importlib.import_module("preprocess")


def test_one_command_measures_every_engine_and_size_and_records_what_fails(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "polars.py").write_text("raise MemoryError('no room')")
    paths = [str(tmp_path), str(Path(benchmark.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    out, words = tmp_path / "out.json", ["--engines", "polars", "gubs", "--rows", "3000", "4000"]
    monkeypatch.setattr(sys, "argv", ["preprocess.py", *words, "--work", str(tmp_path / "work"), "--out", str(out)])
    benchmark.main()
    report = json.loads(out.read_text())
    assert {"cores", "memory_gib", "versions"} == set(report["machine"])
    runs = {(run["rows"], run["engine"]): run for run in report["runs"]}
    assert list(runs) == [(rows, engine) for rows in (3000, 4000) for engine in ("polars", "gubs")]
    for rows in (3000, 4000):
        assert runs[rows, "polars"]["failed"] == 1
        assert runs[rows, "polars"]["error"] == "MemoryError: no room"
        assert "rows_per_s" not in runs[rows, "polars"]
        assert 0.5 * rows < runs[rows, "gubs"]["kept"] < rows
        assert runs[rows, "gubs"]["rows_per_s"] > 0


def test_a_run_that_does_not_end_is_killed_and_recorded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "_LIMIT_S", 0.5)
    _, figures = benchmark.watched([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "errors.txt")
    assert figures["failed"] == -9
    assert figures["seconds"] < 60


def test_speeds_are_compared_at_one_size_and_never_with_what_failed() -> None:
    gubs = {"engine": "gubs", "seconds": 20.0, "stages_s": 10.0}
    runs = [
        {**gubs, "rows": 1, "nodes": 0},
        {"engine": "duckdb", "rows": 1, "nodes": 0, "seconds": 10.0},
        {**gubs, "rows": 2, "nodes": 0},
        {"engine": "duckdb", "rows": 2, "nodes": 0, "seconds": 1.0, "failed": -9},
        {**gubs, "rows": 2, "nodes": 1, "stages_s": 16.0},
        {**gubs, "rows": 2, "nodes": 2},
        {"engine": "bound", "rows": 2, "nodes": 2, "speed_up": 1.8},
    ]
    benchmark.compared(runs)
    assert [run.get("of_duckdb") for run in runs] == [0.5, *[None] * 6]
    assert [run.get("speed_up") for run in runs] == [*[None] * 5, 1.6, 1.8]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores")
def test_the_bound_is_what_processes_do_that_share_nothing(monkeypatch) -> None:
    seconds = {1: [2.0], 2: [2.0, 2.5]}
    monkeypatch.setattr(benchmark, "_side_by_side", lambda cores: seconds[len(cores)])
    assert benchmark.bound(2) == {
        "engine": "bound",
        "nodes": 2,
        "alone_s": 2.0,
        "beside_s": [2.0, 2.5],
        "speed_up": 1.6,
    }
    monkeypatch.undo()
    monkeypatch.setattr(benchmark, "BOUND_ROWS", 1000)
    assert len(benchmark.bound(2)["beside_s"]) == 2
