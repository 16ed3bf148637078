"""Fixtures of the evaluation's tests: the stand-in endpoint of the LLM client's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "llm"))

from llm_helpers import server, settings_for  # noqa: F401
