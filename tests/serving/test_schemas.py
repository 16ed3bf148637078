"""What a client can send: bounded, typed, and never a number that is none."""

import json

import pytest
from pydantic import ValidationError

from gubs.serving.schemas import FilterRequest

GOOD = {"user": {"id": "u1"}, "candidates": [{"id": "v1"}]}


def read(**changes):
    return FilterRequest.model_validate_json(json.dumps({**GOOD, **changes}))


def test_the_least_that_is_needed():
    asked = read()
    assert (asked.task, asked.mode, asked.threshold, asked.explain) == ("sequential", None, None, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": []},
        {"candidates": [{"id": f"v{i}"} for i in range(101)]},
        {"candidates": [{"id": "v1", "frames": ["x"] * 17}]},
        {"candidates": [{"id": "v1", "frames": ["x" * (2**20 + 1)]}]},
        {"candidates": [{"id": "v1", "title": "x" * 2001}]},
        {"candidates": [{"id": ""}]},
        {"candidates": [{"id": "a\nb"}]},
        {"candidates": [{"id": 7}]},
        {"candidates": [{"id": "v1", "unknown": 1}]},
        {"threshold": 1.5},
        {"threshold": "0.5"},
        {"timeout_ms": 0},
        {"task": "reading"},
        {"mode": "guess"},
        {"user": {}},
        {"user": {"id": "u1", "profile": {}}},
        {"user": {"id": "u1", "history": [{"title": "x"}]}},
        {"user": {"profile": {"age": -1}}},
        {"user": {"profile": {}, "history": [{"play_rate": 2}]}},
        {"user": {"profile": {}, "history": [{}] * 201}},
        {"request_id": "x" * 257},
    ],
)
def test_anything_out_of_bounds_is_refused(changes):
    with pytest.raises(ValidationError):
        read(**changes)


@pytest.mark.parametrize(
    "body",
    [
        '{"user": {"id": "u1"}, "candidates": [{"id": "v1", "duration_s": NaN}]}',
        '{"user": {"id": "u1"}, "candidates": [{"id": "v1", "duration_s": 1e999}]}',
        '{"user": {"id": "\\ud800"}, "candidates": [{"id": "v1"}]}',
        '{"user": {"id": "u1"}, "candidates": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"user": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}",
        "",
        "null",
        "[]",
        "{",
        '{"user": {"id": "u1"}, "candidates": [{"id": "v1"}]} trailing',
    ],
)
def test_what_is_no_json_of_ours_is_refused(body):
    with pytest.raises(ValidationError):
        FilterRequest.model_validate_json(body.encode("utf-8", "surrogatepass"))


def test_errors_do_not_repeat_the_input():
    with pytest.raises(ValidationError) as e:
        read(candidates=[{"id": "secret-value\n"}])
    assert "secret-value" not in str(e.value.errors(include_input=False, include_url=False, include_context=False))
