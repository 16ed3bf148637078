"""Fixtures of the UGM's tests: the stand-in endpoint of the LLM client's tests, scripted answers, made-up people."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "llm"))

import pytest
from llm_helpers import server, settings_for  # noqa: F401
from ugm_helpers import cooks_and_fans


@pytest.fixture(scope="session")
def records():
    """See `cooks_and_fans`."""
    return cooks_and_fans()
