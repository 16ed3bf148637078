"""One client actor against a real HTTP server that misbehaves in every way we know."""

import itertools
import time

import pytest
from llm_helpers import run_actor, simple
from pydantic import SecretStr

from gubs.llm.errors import EndpointDownError, EndpointRefusedError
from gubs.llm.redact import Redactor

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def gaps(server):
    return [b - a for a, b in itertools.pairwise(server.stats()["arrivals"])]


@pytest.mark.parametrize(("form", "least"), [("1", 1.0), ("date:3", 1.5)])
def test_retry_after_is_obeyed(server, settings_for, tmp_path, form, least):
    server.configure(rules=[{"nth": 1, "fault": "429"}], retry_after=form)
    out = run_actor(settings_for(), tmp_path, [simple("a")])
    assert out.entries[0].attempts == 2
    assert gaps(server)[0] >= least, "a date has a resolution of one second"


@pytest.mark.parametrize("fault", ["500", "cut", "reset"])
def test_temporary_faults_are_tried_again(server, settings_for, tmp_path, fault):
    server.configure(rules=[{"nth": 1, "fault": fault}, {"nth": 2, "fault": fault}])
    out = run_actor(settings_for(), tmp_path, [simple("a")])
    assert out.entries[0].text.startswith("answer to")
    assert out.entries[0].attempts == 3
    assert out.report.retried == 2


@pytest.mark.parametrize(
    "raw", ['{"choices": [{"message": {"content": "ha', "", '{"choices": []}', "<html>busy</html>"]
)
def test_malformed_responses_are_tried_again(server, settings_for, tmp_path, raw):
    server.configure(rules=[{"nth": 1, "raw": raw}])
    assert run_actor(settings_for(), tmp_path, [simple("a")]).entries[0].attempts == 2


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_call_without_an_end_is_ended_at_the_timeout(server, settings_for, tmp_path, fault):
    """Also if bytes keep coming."""
    server.configure(rules=[{"nth": 1, "fault": fault}])
    began = time.monotonic()
    out = run_actor(settings_for(timeout_s=1.0, hedge=False), tmp_path, [simple("a")])
    assert out.entries[0].attempts == 2
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_hung_call_among_healthy_ones_is_overtaken_long_before_the_timeout(server, settings_for, tmp_path, fault):
    server.configure(rules=[{"match": "hung", "nth": 1, "fault": fault}])
    began = time.monotonic()
    out = run_actor(settings_for(timeout_s=60.0), tmp_path, [simple("hung"), *(simple(f"ok {i}") for i in range(20))])
    assert time.monotonic() - began < 15
    assert out.report.copies == 1
    assert all(e.text for e in out.entries)
    assert server.calls("hung") == 2


def test_a_slow_answer_wins_over_its_hung_copy(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "slow", "nth": 1, "latency_s": 3.0}, {"match": "slow", "fault": "hang"}])
    out = run_actor(settings_for(timeout_s=60.0), tmp_path, [simple("slow"), *(simple(f"ok {i}") for i in range(20))])
    assert out.entries[0].text
    assert out.entries[0].latency_s >= 3.0
    assert out.report.copies >= 1


def test_a_rejected_request_fails_alone_with_the_servers_message(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "bad", "status": 400, "body": {"error": {"message": "prompt is too long"}}}])
    out = run_actor(settings_for(), tmp_path, [simple("bad"), simple("good")])
    bad, good = out.entries
    assert (bad.failure, bad.attempts, bad.billed) == ("rejected", 1, False)
    assert "prompt is too long" in bad.error
    assert good.text
    assert out.report.stop is None


@pytest.mark.parametrize("status", [401, 402, 404])
def test_an_endpoint_that_refuses_everything_stops_the_run(server, settings_for, tmp_path, status):
    server.configure(rules=[{"status": status, "body": {"error": {"message": "not with me"}}}])
    out = run_actor(settings_for(), tmp_path, [simple("a")])
    assert isinstance(out.report.stop, EndpointRefusedError)
    assert f"HTTP {status}: not with me" in str(out.report.stop)
    assert server.stats()["total"] == 1


def test_attempts_end_as_a_failure_where_others_succeed(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "bad", "fault": "500"}, {"latency_s": 0.01}])
    requests = [simple("bad"), *(simple(f"good {i}") for i in range(300))]
    out = run_actor(settings_for(retries={"attempts": 3}, max_concurrency=4), tmp_path, requests)
    assert (out.entries[0].failure, out.entries[0].attempts) == ("unreachable", 3)
    assert "HTTP 500" in out.entries[0].error
    assert out.report.stop is None


def test_an_endpoint_that_stays_down_stops_the_run(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "ok"}, {"fault": "500"}])
    settings = settings_for(retries={"down_after_s": 1.0, "attempts": 50})
    run_actor(settings, tmp_path, [simple("ok 1")])
    began = time.monotonic()
    out = run_actor(settings, tmp_path, [simple("ok 2"), *(simple(f"x{i}") for i in range(20))])
    assert isinstance(out.report.stop, EndpointDownError)
    assert "is down" in str(out.report.stop)
    assert "HTTP 500" in str(out.report.stop)
    assert out.entries[0].text, "what was finished is kept"
    assert 1.0 <= time.monotonic() - began < 10


def test_an_address_without_a_server_is_down(server, settings_for, tmp_path):
    settings = settings_for(base_url="http://127.0.0.1:9/v1", retries={"down_after_s": 0.5})
    out = run_actor(settings, tmp_path, [simple("a")])
    assert isinstance(out.report.stop, EndpointDownError)
    assert "connection" in str(out.report.stop)


def test_calls_in_flight_stay_within_the_limit(server, settings_for, tmp_path):
    server.configure(rules=[{"latency_s": 0.1}])
    run_actor(settings_for(max_concurrency=7), tmp_path, [simple(f"{i}") for i in range(60)])
    assert server.stats()["peak"] == 7


def test_a_pause_does_not_take_up_a_slot(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "busy", "nth": 1, "fault": "429"}], retry_after="3")
    began = time.monotonic()
    out = run_actor(settings_for(max_concurrency=1), tmp_path, [simple("busy"), *(simple(f"{i}") for i in range(10))])
    assert all(e.text for e in out.entries)
    assert server.stats()["arrivals"][-2] - server.stats()["arrivals"][0] < 2.5, "the others are answered meanwhile"
    assert time.monotonic() - began >= 3


def test_the_limit_of_requests_per_minute_is_kept(server, settings_for, tmp_path):
    run_actor(settings_for(requests_per_minute=600), tmp_path, [simple(f"{i}") for i in range(40)])
    arrivals = server.stats()["arrivals"]
    assert arrivals[-1] - arrivals[0] >= 2.4, "10 per second, after the first 10"


def test_the_limit_of_tokens_per_minute_is_kept(server, settings_for, tmp_path):
    requests = [simple(f"{i} " + "x" * 400) for i in range(12)]
    run_actor(settings_for(tokens_per_minute=60 * 300), tmp_path, requests)
    arrivals = server.stats()["arrivals"]
    assert arrivals[-1] - arrivals[0] >= 2.5, "about 110 tokens each (more while the output is unknown), 300 per second"


def test_reasoning_is_separated_from_the_answer(server, settings_for, tmp_path):
    tagged = {"match": "tag", "text": "<think>hm</think>\nYes"}
    server.configure(rules=[tagged, {"text": "Yes", "message": {"reasoning_content": "hm"}}])
    for e in run_actor(settings_for(), tmp_path, [simple("tag"), simple("field")]).entries:
        assert (e.reasoning, e.text) == ("hm", "Yes")


def test_text_in_any_language_comes_back_unchanged(server, settings_for, tmp_path):
    text = "用户喜欢做饭视频。Ünïcödé 🍲\u2028\u0000\r\n\t«да»"
    server.configure(rules=[{"text": text}])
    assert run_actor(settings_for(), tmp_path, [simple("做饭 🍲")]).entries[0].text == text
    assert server.calls("做饭 🍲") == 1


def test_missing_usage_is_estimated_and_marked(server, settings_for, tmp_path):
    server.configure(rules=[{"body": {"choices": [{"message": {"content": "x" * 40}}]}}])
    e = run_actor(settings_for(input_price=1e6), tmp_path, [simple("a")]).entries[0]
    assert (e.tokens_estimated, e.tokens_out, e.price) == (True, 10, e.tokens_in)


def test_structure_modes_are_tried_until_one_is_supported(server, settings_for, tmp_path):
    server.configure(refuses=["response_format", "structured_outputs"], rules=[{"text": '{"n": 1}'}])
    settings = settings_for(max_concurrency=1)
    out = run_actor(settings, tmp_path, [simple(f"{i}", schema=SCHEMA) for i in range(3)])
    assert [e.text for e in out.entries] == ['{"n": 1}'] * 3
    assert server.stats()["total"] == 5, "two rejections, once: then the mode is known"
    assert server.stats()["bodies"][-1]["guided_json"] == SCHEMA


def test_roles_and_extra_fields_reach_the_endpoint(server, settings_for, tmp_path):
    role = {"temperature": 0.5, "seed": 7, "max_tokens_field": "max_completion_tokens", "max_tokens": 99}
    settings = settings_for(rest={"roles": {"matcher": {**role, "extra": {"top_k": 3}}}})
    run_actor(settings, tmp_path, [simple("a")])
    body = server.stats()["bodies"][0]
    sent = {"model": "m", "temperature": 0.5, "seed": 7, "max_completion_tokens": 99, "top_k": 3}
    assert sent.items() <= body.items()
    assert "max_tokens" not in body


KEY = 'sk-Very"Secret\\Key-1234567890'


def test_keys_reach_the_server_and_nothing_else(server, settings_for, tmp_path, caplog):
    caplog.set_level("DEBUG")
    echo = {"match": "echo", "text": f"your key is {KEY}"}
    server.configure(key=KEY, rules=[echo, {"status": 400, "body": {"error": {"message": f"Bearer {KEY} is odd"}}}])
    out = run_actor(settings_for(), tmp_path, [simple("echo"), simple(f"x {KEY}")], keys={"default": SecretStr(KEY)})
    assert out.entries[0].text == "your key is [hidden]"
    assert "[hidden]" in out.entries[1].error
    written = "".join(p.read_text() for p in tmp_path.iterdir())
    for place in (written, repr(out.entries), caplog.text):
        assert "Very" not in place


def test_a_refused_key_is_not_shown(server, settings_for, tmp_path):
    server.configure(key="another-key-entirely")
    out = run_actor(settings_for(), tmp_path, [simple("a")], keys={"default": SecretStr(KEY)})
    assert isinstance(out.report.stop, EndpointRefusedError)
    assert "Incorrect API key provided: Bearer [hidden]" in str(out.report.stop)
    assert "Very" not in str(out.report.stop)


def test_anything_like_a_key_is_hidden_in_messages_only():
    r = Redactor([SecretStr("short")])
    header = "Authorization: Bearer abc.def, sk-abcdefghijklmnop1234 short"
    assert r.hide_all(header) == "Authorization: Bearer [hidden], [hidden] short"
    assert r.hide_keys("Bearer abc.def") == "Bearer abc.def"
    assert "short" not in repr(SecretStr("short"))
