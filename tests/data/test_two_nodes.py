"""Two nodes read and split a log together, and make of it what one process makes."""

import subprocess
import sys
from pathlib import Path

import pytest
from node_helpers import runs, two_nodes, wait_for
from test_scale import LIMITS, ROWS, assert_data_set, expected_raw, own_log, part_rows

from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data.sources import read_source

pytestmark = pytest.mark.slow
PARTS, PATIENCE = 7, 150


def test_two_nodes_give_the_rows_of_one_process(tmp_path: Path) -> None:
    run, source = Run(tmp_path / "r"), own_log(tmp_path / "logs")
    overrides = [*LIMITS, *source, part_rows(ROWS, PARTS), "data.ray_from_rows=0"]
    worked = set[int]()
    with two_nodes() as (address, nodes):
        command = [sys.executable, "-m", "gubs.cli", "build", "--run", run.uri, *overrides, f"ray.address={address}"]
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

        def ended() -> bool:
            worked.update(n for n, node in enumerate(nodes) if n not in worked and runs(node, "MapBatches"))
            return job.poll() is not None

        try:
            wait_for(ended, PATIENCE, "the command")
            errors = job.communicate()[1].decode()
        finally:
            job.kill()
    assert job.returncode == 0, errors
    assert worked == {0, 1}, "both nodes had calls of Ray Data"
    settings = load_settings("tiny", overrides)
    for name, table in expected_raw(settings).items():
        assert run.artifact("raw").table(name).equals(table), name
    assert_data_set(run, settings, read_source(settings.source).interactions)
