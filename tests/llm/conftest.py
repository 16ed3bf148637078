"""Fixtures of the LLM client's tests."""

from llm_helpers import server, settings_for  # noqa: F401
