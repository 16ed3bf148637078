"""How responses of the chat API are read."""

import json
from datetime import UTC, datetime

import pytest

from gubs.llm.calls import estimate_tokens
from gubs.llm.wire import AttemptError, read_response, retry_after_s, split_think

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def body(**message):
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers, seconds):
    assert retry_after_s(headers, NOW) == seconds


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>a\nb</think>\n\nYes", "a\nb", "Yes"),
        ("\n<thinking>a</thinking>Yes", "a", "Yes"),
        ("so it goes\n</think>\nYes", "so it goes", "Yes"),
        ("<think>never closed", "never closed", ""),
        ('{"title": "how to </think> fast"}', "", '{"title": "how to </think> fast"}'),
        ("Yes, <think> is a tag", "", "Yes, <think> is a tag"),
        ("Yes", "", "Yes"),
    ],
)
def test_think_parts_are_separated(text, reasoning, answer):
    assert split_think(text) == (reasoning, answer)


def test_reasoning_fields_win_over_tags_in_the_text():
    for name in ("reasoning_content", "reasoning"):
        reply = read_response(200, {}, body(**{"content": "<think>quoted</think>Yes", name: "because"}))
        assert (reply.reasoning, reply.text) == ("because", "<think>quoted</think>Yes")


def test_reasoning_can_be_left_in_the_text():
    assert read_response(200, {}, body(content="<think>a</think>b"), split_reasoning=False).text == "<think>a</think>b"


def test_content_parts_and_lone_surrogates():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "\ud83d!"}]
    assert read_response(200, {}, body(content=parts)).text == "a?!"


@pytest.mark.parametrize(
    ("status", "content", "cause", "advice"),
    [
        (429, b'{"error": {"message": "slow down"}}', "rate_limited", "wait"),
        (429, b'{"error": {"message": "no", "code": "insufficient_quota"}}', "refused", "stop"),
        (401, b'{"error": {"message": "bad key"}}', "refused", "stop"),
        (404, b'{"detail": "no such model"}', "refused", "stop"),
        (400, b'{"error": {"message": "too long"}}', "rejected", "give_up"),
        (422, b"nonsense", "rejected", "give_up"),
        (500, b"", "unreachable", "retry"),
        (503, b"<html>", "unreachable", "retry"),
        (200, b'{"choices": [{"mess', "cut_off", "retry"),
        (200, b'{"choices": []}', "cut_off", "retry"),
        (200, b"null", "cut_off", "retry"),
        (200, b'{"error": {"message": "upstream", "code": 502}}', "unreachable", "retry"),
        (200, b'{"error": {"message": "upstream", "code": 429}}', "rate_limited", "wait"),
    ],
)
def test_faults(status, content, cause, advice):
    with pytest.raises(AttemptError) as e:
        read_response(status, {}, content)
    assert (e.value.cause, e.value.advice) == (cause, advice)


def test_the_servers_message_is_shown():
    with pytest.raises(AttemptError, match="HTTP 400: prompt is too long \\(context\\)"):
        read_response(400, {}, b'{"error": {"message": "prompt is\\n too long", "code": "context"}}')


def test_token_estimates():
    assert estimate_tokens("the quick brown fox jumps over it") == 9
    assert estimate_tokens("用户喜欢做饭视频") == 8
    assert estimate_tokens("") == 0
