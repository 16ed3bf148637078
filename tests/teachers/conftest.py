"""Fixtures of the teachers' tests: the stand-in endpoint of the LLM client's tests, and small data sets."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "llm"))

from llm_helpers import server, settings_for  # noqa: F401
from teach_helpers import synthetic_settings

from gubs.artifacts import Run
from gubs.data.build import build_stage
from gubs.data.ingest import ingest_stage


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Run:
    """A simulated data set with its truth (not to be written to)."""
    run = Run(tmp_path_factory.mktemp("teachers") / "run")
    ingest_stage(run, synthetic_settings())
    build_stage(run, synthetic_settings())
    return run
