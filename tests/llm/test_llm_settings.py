"""Settings of a role: which model answers, what decides its answers, and whether a form is enforced."""

import pytest

from gubs.llm.settings import EMBEDDED_MODEL, LLMSettings

URL = "http://nowhere/v1"


def settings(roles=None, **endpoints):
    return LLMSettings(
        endpoints={name: {"base_url": URL, "model": "m", **e} for name, e in endpoints.items()}, roles=roles or {}
    )


def test_parameters_of_a_role_do_not_depend_on_the_endpoint():
    """Otherwise groups would be stale when the same model gets another address, name or limit.

    And a role with another endpoint keeps its own temperature and length of answers.
    """
    first = settings(default={})
    role = {"endpoint": "other", "max_tokens_field": "max_completion_tokens"}
    moved = settings({"matcher": role}, default={}, other={"base_url": "http://x/v1", "max_concurrency": 3})
    assert first.parameters_of("matcher") == moved.parameters_of("matcher")
    assert first.parameters_of("matcher")["model"] == "m"


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"seed": 3}, {"max_tokens": 99}, {"extra": {"top_k": 3}}])
def test_parameters_of_a_role_decide_its_answers_and_no_others(change):
    before, after = settings(default={}), settings({"matcher": change}, default={})
    assert before.parameters_of("matcher") != after.parameters_of("matcher")
    assert before.parameters_of("profiler") == after.parameters_of("profiler")


def test_the_model_of_a_role_is_that_of_its_endpoint():
    mixed = settings({"matcher": {"endpoint": "embedded"}}, default={"model": "large"})
    assert (mixed.model_of("profiler"), mixed.model_of("matcher")) == ("large", EMBEDDED_MODEL)
    assert LLMSettings().model_of("profiler") == EMBEDDED_MODEL


@pytest.mark.parametrize(
    ("structured", "guided"),
    [("auto", False), ("json_schema", False), ("none", False), ("structured_outputs", True), ("guided", True)],
)
def test_a_role_is_guided_if_its_endpoint_takes_regular_expressions(structured, guided):
    both = settings({"matcher": {"endpoint": "local"}}, default={}, local={"structured": structured})
    assert both.guided("matcher") is guided
    assert not both.guided("summarizer")
    assert LLMSettings().guided("summarizer"), "the small local model needs the guide"
