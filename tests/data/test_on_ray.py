"""What a cluster makes of a log is what the plain functions make of it in memory, row for row, from `raw` to `ifvr`."""

import functools
from pathlib import Path

import pyarrow as pa
import pytest
from test_scale import LIMITS, SMALL, assert_data_set, cut_once, expected_raw, part_rows

from gubs import stages
from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.data import work as working
from gubs.data.sources import open_source
from gubs.data.sources.log import Log
from gubs.simulator.behaviour import simulate

PARTS = [1, 3, 17]


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each phase made on the cluster."""
    calls, real = list[int](), working._on_ray

    def counted(jobs, numbers):
        calls.append(len(jobs))
        return real(jobs, numbers)

    monkeypatch.setattr(working, "_on_ray", counted)
    return calls


def made_on_ray(folder: Path, *overrides: str) -> tuple[Run, Settings]:
    run, settings = Run(folder), load_settings("tiny", [*LIMITS, *overrides, "data.ray_from_rows=0"])
    stages.make(["ifvr"], run, settings)
    return run, settings


@functools.cache
def simulated() -> pa.Table:
    settings = load_settings("tiny", SMALL)
    return simulate(settings.synthetic, settings.seed).interactions


@pytest.mark.parametrize("parts", PARTS)
def test_the_simulated_app(tmp_path: Path, parts: int, ray_local: None, phases: list[int]) -> None:
    log = simulated()
    run, settings = made_on_ray(tmp_path, *SMALL, part_rows(log.num_rows, parts))
    raw = run.artifact("raw")
    assert len(raw.parts("interactions")) == parts
    assert raw.table("interactions").equals(cut_once(log))
    assert_data_set(run, settings, log)
    assert max(phases) == parts


@functools.cache
def real(kind: str, folder: Path) -> tuple[dict[str, pa.Table], int]:
    """The tables of a real log in one go, and about how many rows its parts are made of."""
    settings = load_settings("tiny", [f"source.kind={kind}", f"source.path={folder}"])
    log = open_source(settings.source)
    assert isinstance(log, Log)
    return expected_raw(settings), log.fan_out * sum(head.rows for head in log.heads)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("kind", "folder"), [("kuairand", "kuairand"), ("movielens", "ml-100k")])
def test_real_logs(
    tmp_path: Path, kind: str, folder: str, parts: int, real_data: Path, ray_local: None, phases: list[int]
) -> None:
    tables, rows = real(kind, real_data / folder)
    run, settings = made_on_ray(
        tmp_path, f"source.kind={kind}", f"source.path={real_data / folder}", part_rows(rows, parts)
    )
    raw = run.artifact("raw")
    assert abs(len(raw.parts("interactions")) - parts) <= parts // 4, "the rows of text are an estimate"
    for name, table in tables.items():
        assert raw.table(name).equals(table), name
    assert_data_set(run, settings, tables["interactions"])
    assert max(phases) >= len(raw.parts("interactions"))
