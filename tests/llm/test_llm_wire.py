"""How responses of the chat API are read."""

import json
import re
import time
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


DOWN = ("unreachable", "retry")
OPENAI_429 = b"""{"error": {"message": "Rate limit reached for gpt on requests per min. Visit
 https://platform.openai.com/account/billing to add a payment method.", "type": "requests",
 "code": "rate_limit_exceeded"}}""".replace(b"\n", b"")
GROQ_429 = b"""{"error": {"message": "Rate limit reached for model. Need more tokens? Upgrade today at
 https://console.groq.com/settings/billing", "type": "tokens", "code": "rate_limit_exceeded"}}""".replace(b"\n", b"")
GEMINI_429 = b"""[{"error": {"code": 429, "message": "You exceeded your current quota, check your plan and billing
 details.", "status": "RESOURCE_EXHAUSTED"}}]""".replace(b"\n", b"")


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
        (200, b'{"choices": [{"mess', "unreadable", "retry"),
        (200, b'{"choices": []}', "unreadable", "retry"),
        (200, b"null", "unreadable", "retry"),
        (200, b'{"error": {"message": "upstream", "code": 502}}', "unreachable", "retry"),
        (200, b'{"error": {"message": "upstream", "code": 429}}', "rate_limited", "wait"),
        (200, b'{"choices": [{"error": {"message": "x", "code": 502}, "message": {"content": "half"}}]}', *DOWN),
        (200, b'{"choices": [{"message": {"content": "half"}, "finish_reason": "network_error"}]}', *DOWN),
        (429, OPENAI_429, "rate_limited", "wait"),
        (429, GROQ_429, "rate_limited", "wait"),
        (429, GEMINI_429, "rate_limited", "wait"),
        (429, b'{"error": {"message": "x", "type": "insufficient_quota"}}', "refused", "stop"),
        (403, b'{"error": {"code": 403, "message": "x", "metadata": {"reasons": ["y"]}}}', "moderated", "give_up"),
        (403, b'{"error": {"message": "forbidden"}}', "rejected", "give_up"),
        (400, b'{"error": {"message": "x", "code": "content_policy_violation"}}', "moderated", "give_up"),
        (400, b'{"error": {"message": "x", "code": "context_length_exceeded"}}', "context", "give_up"),
        (413, b"<html>", "context", "give_up"),
        (498, b'{"error": {"message": "over capacity"}}', *DOWN),
        (400, b'{"error": {"message": ["a", {"b": 1}], "code": ["c"], "type": {}}}', "rejected", "give_up"),
        (400, b'{"error": ' + b"[" * 100_000, "rejected", "give_up"),
        (200, b'{"choices": ' + b"[" * 100_000, "unreadable", "retry"),
        (200, b'[{"choices": []}]', "unreadable", "retry"),
        (200, b'{"choices": [{"message": "text"}]}', "unreadable", "retry"),
        (200, b'{"choices": [{"message": {"content": "' + b"x" * 10_000_000 + b'"}}]}', "unreadable", "retry"),
    ],
    ids=range(31),
)
def test_faults(status, content, cause, advice):
    with pytest.raises(AttemptError) as e:
        read_response(status, {}, content)
    assert (e.value.cause, e.value.advice) == (cause, advice)


@pytest.mark.parametrize(
    ("kind", "content"), [("text/html", b"<html>busy</html>"), ("text/event-stream", b"data: {}\n\n")]
)
def test_a_response_that_is_no_answer_is_shown(kind, content):
    with pytest.raises(AttemptError, match=re.escape(f"{kind}; it begins '{content.decode().strip()}")):
        read_response(200, {"content-type": kind}, content)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [({"prompt_tokens": "3", "completion_tokens": "4"}, (3, 4)), ("many", (None, None)), ([1], (None, None))],
)
def test_odd_counts_spoil_no_answer(usage, tokens):
    message = {"content": "Yes", "reasoning_content": {"steps": ["a"]}}
    reply = read_response(200, {}, json.dumps({"choices": [{"message": message}], "usage": usage}).encode())
    assert (reply.text, reply.reasoning, reply.tokens_in, reply.tokens_out) == ("Yes", '{"steps": ["a"]}', *tokens)


def test_closing_tags_are_found_in_linear_time():
    began = time.monotonic()
    split_think("\n" * 300_000 + "x")
    assert time.monotonic() - began < 1


def test_the_servers_message_is_shown():
    with pytest.raises(AttemptError, match="HTTP 400: prompt is too long \\(context\\)"):
        read_response(400, {}, b'{"error": {"message": "prompt is\\n too long", "code": "context"}}')


def test_token_estimates():
    assert estimate_tokens("the quick brown fox jumps over it") == 9
    assert estimate_tokens("用户喜欢做饭视频") == 8
    assert estimate_tokens("") == 0
