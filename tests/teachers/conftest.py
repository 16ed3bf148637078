"""Fixtures of the teachers' tests: the stand-in endpoint of the LLM client's tests, and small data sets."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "llm"))

from llm_helpers import server, settings_for  # noqa: F401
from teach_helpers import synthetic_settings

from gubs.artifacts import Run
from gubs.stages import make_stage


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Run:
    """A simulated data set with its truth (not to be written to)."""
    run = Run(tmp_path_factory.mktemp("teachers") / "run")
    for stage in ("raw", "truth", "ifvr"):
        make_stage(stage, run, synthetic_settings())
    return run
