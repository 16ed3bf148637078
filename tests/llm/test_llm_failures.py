"""Failures are no data: what an endpoint refuses, breaks off or does not answer is tried again, counted, and said."""

import asyncio
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from llm_helpers import opened_actor, run_actor, simple, works_of

from gubs.llm.client import LLMClient
from gubs.llm.errors import BudgetReachedError, EndpointRefusedError, StoppedError
from gubs.llm.journal import JournalWriter
from gubs.llm.settings import EMBEDDED

MODERATED = {"status": 403, "body": {"error": {"code": 403, "message": "x", "metadata": {"reasons": ["violence"]}}}}


def gaps(server):
    return [b - a for a, b in itertools.pairwise(server.stats()["arrivals"])]


def many(n, text="ask"):
    return [simple(f"{text} {i}") for i in range(n)]


def test_parameters_that_are_not_taken_are_found_out_by_one_call_ahead_of_the_crowd(server, settings_for, tmp_path):
    server.configure(refuses=["temperature", "max_tokens"], rules=[{"latency_s": 0.1}])
    out = run_actor(settings_for(), tmp_path, many(30))
    assert all(e.text for e in out.entries)
    assert server.stats()["total"] == 32
    body = server.stats()["bodies"][-1]
    assert body["max_completion_tokens"] == 256
    assert not {"temperature", "max_tokens"} & set(body)
    assert "max_completion_tokens for max_tokens" in str(out.notes)
    assert [(e.failure, e.billed) for e in out.attempts if e.retried] == [("rejected", False)] * 2


def test_what_is_sent_again_without_a_parameter_keeps_the_limit_of_requests(server, settings_for, tmp_path):
    server.configure(refuses=["max_tokens"])
    out = run_actor(settings_for(requests_per_minute=60), tmp_path, [simple("a")])
    assert out.entries[0].text
    assert len(gaps(server)) == 1
    assert gaps(server)[0] >= 0.9, "one per second"


def test_a_handful_of_equal_refusals_stops_the_run_and_says_what_to_drop(server, settings_for, tmp_path):
    server.configure(refuses=["reasoning_effort"])
    settings = settings_for(rest={"roles": {"matcher": {"extra": {"reasoning_effort": "low"}}}})
    out = run_actor(settings, tmp_path, many(60))
    assert isinstance(out.report.stop, EndpointRefusedError)
    assert "Unrecognized request argument supplied: reasoning_effort" in str(out.report.stop)
    assert "take reasoning_effort out of llm.roles.matcher.extra" in str(out.report.stop)
    assert server.stats()["total"] == 5


def test_a_key_that_may_do_nothing_stops_the_run(server, settings_for, tmp_path):
    server.configure(rules=[{"status": 403, "body": {"error": {"message": "not with me"}}}])
    out = run_actor(settings_for(), tmp_path, many(60))
    assert isinstance(out.report.stop, EndpointRefusedError)
    assert "HTTP 403: not with me" in str(out.report.stop)
    assert server.stats()["total"] == 5


def test_a_moderated_prompt_fails_alone(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "bad", **MODERATED}])
    out = run_actor(settings_for(), tmp_path, [*many(8, "bad"), simple("good")])
    assert [e.failure for e in out.entries] == ["moderated"] * 8 + [""]
    assert out.report.stop is None


def test_a_few_prompts_that_always_fail_are_no_outage(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "bad", "fault": "500"}])
    settings = settings_for(retries={"attempts": 5, "down_after_s": 0.2})
    out = run_actor(settings, tmp_path, [*many(50), *many(6, "bad")])
    assert [e.failure for e in out.entries] == [""] * 50 + ["unreachable"] * 6
    assert out.report.stop is None


def test_an_endpoint_is_down_no_sooner_than_the_setting_says(server, settings_for, tmp_path):
    server.configure(rules=[{"fault": "500"}])
    began = time.monotonic()
    out = run_actor(settings_for(retries={"attempts": 9, "down_after_s": 2.0}), tmp_path, many(20))
    assert "is down" in str(out.report.stop)
    assert 2.0 <= time.monotonic() - began < 5


def test_a_narrow_rate_limit_costs_few_requests_and_no_call(server, settings_for, tmp_path):
    server.configure(per_s=12)
    out = run_actor(settings_for(retries={"patience_s": 3.0}), tmp_path, many(50))
    assert all(e.text for e in out.entries)
    assert server.stats()["total"] < 2.5 * 50, "the first crowd, and a few later"
    assert {e.failure for e in out.attempts if e.retried} == {"rate_limited"}
    assert not any(e.billed for e in out.attempts if e.retried)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed_up_to_a_cap(server, settings_for, tmp_path, status):
    busy = {"status": status, "headers": {"Retry-After": "3600"}, "body": {"error": {"message": "busy"}}}
    server.configure(rules=[{"nth": 1, **busy}])
    settings = settings_for(retries={"longest_retry_after_s": 0.7})
    assert run_actor(settings, tmp_path, [simple("a")]).entries[0].attempts == 2
    assert 0.7 <= gaps(server)[0] < 2


def test_a_hung_call_is_overtaken_as_soon_as_one_answer_is_known(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "hung", "nth": 1, "fault": "hang"}])
    began = time.monotonic()
    out = run_actor(settings_for(timeout_s=60.0), tmp_path, [simple("hung"), simple("ok")])
    assert all(e.text for e in out.entries)
    assert time.monotonic() - began < 10
    lost = [e for e in out.attempts if e.retried]
    assert [(e.failure, e.billed) for e in lost] == [("overtaken", True)]
    assert lost[0].tokens_in > 0, "the server may bill it"


def test_a_hung_call_whose_second_copy_fails_begins_anew(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "hung", "nth": 1, "fault": "hang"}, {"match": "hung", "nth": 2, "fault": "500"}])
    began = time.monotonic()
    out = run_actor(settings_for(timeout_s=60.0), tmp_path, [simple("hung"), simple("ok")])
    assert out.entries[0].attempts == 3
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "broken",
    [
        {"text": "half an ans", "finish_reason": "network_error"},
        {"body": {"choices": [{"message": {"content": "half"}, "error": {"code": 502, "message": "upstream"}}]}},
        {"raw": "data: {}"},
        {"raw": '{"choices": ' + "[" * 5000},
        {"body": {"choices": [{"message": {"content": {"a": 1}}}]}},
    ],
)
def test_broken_answers_are_tried_again(server, settings_for, tmp_path, broken):
    server.configure(rules=[{"nth": 1, **broken}])
    out = run_actor(settings_for(), tmp_path, [simple("a")])
    assert (out.entries[0].attempts, out.entries[0].failure) == (2, "")


def test_a_body_that_stays_odd_is_a_failure_that_shows_it(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "odd", "raw": "<html>busy</html>"}])
    out = run_actor(settings_for(retries={"attempts": 2}), tmp_path, [simple("odd"), simple("good")])
    assert out.entries[0].failure == "unreadable"
    assert "application/json" in out.entries[0].error
    assert "<html>busy" in out.entries[0].error
    assert out.report.stop is None


def test_an_error_names_the_settings_of_the_embedded_server(server, settings_for, tmp_path):
    server.configure(rules=[{"status": 404, "body": {"error": {"message": "no such model"}}}])
    for name, place in ((EMBEDDED, "llm.embedded"), ("default", "llm.endpoints.default")):
        stop = run_actor(settings_for(), tmp_path, [simple("a")], name=name).report.stop
        assert str(stop).endswith(f"Check {place}")


def metered(settings_for, **endpoint):
    return settings_for(rest={"budget": {"calls": 100}}, retries={"attempts": 2}, **endpoint)


def test_a_stop_waits_for_the_answer_of_a_call_that_has_asked_for_a_second_copy(server, settings_for, tmp_path):
    """Nobody grants it any more, and a call that waited for that would lose its answer, which is paid for."""
    server.configure(rules=[{"match": "slow", "latency_s": 2.5}])
    settings = metered(settings_for)

    async def main():
        actor = await opened_actor(settings, tmp_path)
        await actor.submit(works_of(settings, [simple("quick"), simple("slow")]))
        asking, done = [], []
        async with asyncio.timeout(20):
            while not asking:
                report = await actor.collect(1.0)
                asking, done = asking + report.asking, done + report.done
        began = time.monotonic()
        done += (await actor.drain(8.0)).done
        seconds = time.monotonic() - began
        await actor.close()
        return [e.text for e, _ in done], seconds

    texts, seconds = asyncio.run(main())
    assert len(texts) == 2
    assert all(texts)
    assert seconds < 5, "the answer comes before, and nothing else is waited for"


def test_the_budget_ends_a_call_only_after_its_attempts_are_journaled(server, settings_for, tmp_path, monkeypatch):
    """Between, they would count neither as reserved nor as spent, and another call would pass the budget."""
    server.configure(rules=[{"fault": "500"}])
    settings, append = metered(settings_for), JournalWriter.append

    async def slow(self, entry):
        await asyncio.sleep(0.5)
        return await append(self, entry)

    async def main():
        actor = await opened_actor(settings, tmp_path)
        works = works_of(settings, [simple("a")])
        await actor.submit(works)
        returned, journaled = [], []
        async with asyncio.timeout(20):
            while not returned:
                report = await actor.collect(1.0)
                journaled += [e.key for e, _ in report.done]
                returned += report.returned
                for key in report.asking:
                    await actor.admit(key, admitted=False)
        await actor.close()
        return works, returned, journaled

    monkeypatch.setattr(JournalWriter, "append", slow)
    works, returned, journaled = asyncio.run(main())
    assert returned == works
    assert journaled == [works[0].key]


@pytest.mark.usefixtures("ray_local")
class TestRuns:
    """One run after another, on the same journal."""

    def test_an_unusable_answer_is_sampled_afresh_by_the_next_run_and_replayed(self, server, settings_for, tmp_path):
        bad, request = "nonsense", simple("question", regex="yes|no")
        server.configure(rules=[{"text": bad}])
        for total in (2, 4):  # a question and a re-ask
            with LLMClient(settings_for(), tmp_path) as client:
                answers = client.ask([request, request])
                assert [a.failure for a in answers] == ["no_match"] * 2
                assert client.ask([request])[0].failure == "no_match", "not twice in the same run"
            assert server.stats()["total"] == total
        server.configure(rules=[{"text": "yes"}])
        with LLMClient(settings_for(), tmp_path) as client:
            assert client.dry_run([request]).calls == 1
            assert client.ask([request])[0].value == "yes"
        for mode in ("record", "replay"):
            with LLMClient(settings_for(rest={"mode": mode}), tmp_path) as client:
                assert client.ask([request])[0].value == "yes"
        assert server.stats()["total"] == 5

    def test_what_was_refused_or_not_answered_is_asked_again_by_the_next_run(self, server, settings_for, tmp_path):
        refusal = {"match": "sorry", "text": "", "message": {"refusal": "I cannot"}}
        server.configure(
            rules=[refusal, {"match": "bad", "status": 400, "body": {}}, {"match": "down", "fault": "500"}]
        )
        requests = [simple("sorry"), simple("bad"), simple("down"), simple("good")]
        settings = settings_for(retries={"attempts": 2})
        with LLMClient(settings, tmp_path) as client:
            failed = client.ask(requests)
        assert [a.failure for a in failed] == ["refused", "rejected", "unreachable", ""]
        with LLMClient(settings.model_copy(update={"mode": "replay"}), tmp_path) as client:
            assert [a.failure for a in client.ask(requests)] == [a.failure for a in failed]
        server.configure()
        with LLMClient(settings, tmp_path) as client:
            assert all(a.ok for a in client.ask(requests))
        assert server.calls("good") == 1

    def test_an_answer_that_is_cut_off_gets_more_room_once(self, server, settings_for, tmp_path):
        cut = {"text": "it is half", "finish_reason": "length"}
        server.configure(rules=[{"match": "long", "nth": 1, **cut}, {"match": "endless", **cut}])
        with LLMClient(settings_for(), tmp_path) as client:
            long, endless = client.ask([simple("long"), simple("endless")])
        assert (long.ok, long.calls) == (True, 2)
        assert (endless.failure, endless.calls, server.calls("endless")) == ("truncated", 2, 2)
        assert sorted(b["max_tokens"] for b in server.stats()["bodies"]) == [256, 256, 1024, 1024]

    def test_more_room_that_is_refused_is_about_that_answer_alone(self, server, settings_for, tmp_path):
        cut = {"match": "long", "nth": 1, "text": "half", "finish_reason": "length"}
        error = {"message": "max_tokens=1024 is not supported", "param": "max_tokens"}
        server.configure(rules=[cut, {"match": "long", "status": 400, "body": {"error": error}}])
        with LLMClient(settings_for(max_concurrency=2), tmp_path) as client:
            answers = client.ask(many(8, "long"))
            assert {a.failure for a in answers} == {"truncated"}, "eight equal refusals stop nothing"
            assert all("with more room: rejected: HTTP 400" in a.error for a in answers)
            assert client.ask([simple("short")])[0].ok
        assert server.stats()["bodies"][-1]["max_tokens"] == 256, "and nothing is learned of the parameter"
        total = server.stats()["total"]
        server.configure()
        with LLMClient(settings_for(), tmp_path) as client:
            assert all(a.ok for a in client.ask(many(8, "long"))), "a fresh sample, not the same request for more room"
        assert server.stats()["total"] == total + 8
        assert {b["max_tokens"] for b in server.stats()["bodies"][-8:]} == {256}

    def test_an_outage_while_more_room_is_asked_for_stays_an_outage(self, server, settings_for, tmp_path):
        cut = {"match": "long", "nth": 1, "text": "half", "finish_reason": "length"}
        server.configure(rules=[cut, {"match": "long", "fault": "500"}])
        settings = settings_for(retries={"attempts": 2})
        with LLMClient(settings, tmp_path) as client:
            answer = client.ask([simple("long")])[0]
        assert (answer.failure, answer.attempts) == ("unreachable", 3)
        server.configure()
        with LLMClient(settings, tmp_path) as client:
            assert client.ask([simple("long")])[0].ok
        assert server.calls("long") == 4, "the request for more room goes on"

    def test_an_empty_answer_is_asked_for_again_plainly(self, server, settings_for, tmp_path):
        thinking = {"text": "", "message": {"reasoning_content": "Yes, they match."}}
        server.configure(rules=[{"match": "empty", "nth": 1, "text": ""}, {"match": "think", **thinking}])
        with LLMClient(settings_for(), tmp_path) as client:
            empty, think = client.ask([simple("empty"), simple("think")])
        assert empty.ok
        assert (think.failure, think.calls) == ("only_reasoning", 2)
        assert all([m["role"] for m in b["messages"]] == ["user"] for b in server.stats()["bodies"])

    @pytest.mark.parametrize("fault", [{"fault": "500"}, {"raw": "<html>"}])
    def test_the_budget_counts_every_attempt_that_may_be_billed(self, server, settings_for, tmp_path, fault):
        server.configure(rules=[fault])
        settings = settings_for(rest={"budget": {"calls": 10}}, retries={"attempts": 20})
        with (
            LLMClient(settings, tmp_path) as client,
            pytest.raises(BudgetReachedError, match=r"llm\.budget\.calls=10 .*10 spent"),
        ):
            client.ask(many(8))
        assert server.stats()["total"] == 10

    def test_the_budget_counts_second_copies(self, server, settings_for, tmp_path):
        server.configure(rules=[{"match": "hung", "fault": "hang"}])
        settings = settings_for(rest={"budget": {"calls": 12}}, timeout_s=3.0)
        with LLMClient(settings, tmp_path) as client, pytest.raises(BudgetReachedError):
            client.ask([simple("hung"), *many(10)])
        assert server.stats()["total"] <= 12
        assert server.calls("hung") == 2

    def test_a_stop_finishes_what_is_in_flight(self, server, settings_for, tmp_path):
        refused = {"match": "bad", "status": 401, "body": {"error": {"message": "no"}}, "latency_s": 0.5}
        server.configure(rules=[refused, {"latency_s": 1.5}])
        with LLMClient(settings_for(), tmp_path) as client:
            client.start()
            with pytest.raises(EndpointRefusedError):
                client.ask([*many(19), simple("bad")])
        with LLMClient(settings_for(), tmp_path) as client:
            assert client.dry_run(many(19)).calls == 0, "paid for, and kept"


DRIVER = """
import sys, ray
sys.path[:0] = {paths}
from llm_helpers import simple
from gubs.errors import GubsError
from gubs.llm.client import LLMClient
from gubs.llm.settings import LLMSettings
ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
try:
    with LLMClient(LLMSettings.model_validate_json({settings!r}), {folder!r}) as client:
        client.ask([simple(f"ask {{i}}") for i in range(160)])
except GubsError as e:
    print(e, file=sys.stderr)
    sys.exit(e.exit_code)
"""


def test_ctrl_c_lets_calls_in_flight_finish_so_that_none_is_paid_twice(server, settings_for, tmp_path, ray_local):
    server.configure(rules=[{"latency_s": 2.0}])
    settings = settings_for(max_concurrency=60, hedge=False)  # a second copy of a slow call is paid for on purpose
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
    script = DRIVER.format(paths=paths, settings=settings.model_dump_json(), folder=str(tmp_path))
    driver = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while server.stats()["total"] < 60:
        assert time.monotonic() < deadline, "the driver makes no calls"
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    printed = driver.communicate(timeout=60)[1]
    assert driver.returncode == 130, printed
    assert re.search(r"calls in flight may finish for 120 s", printed)
    assert "the same command resumes" in printed
    sent = server.stats()["total"]
    kept = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len([e for e in kept if not e["failure"]]) == sent < 160
    server.configure()
    with LLMClient(settings, tmp_path) as client:
        assert all(a.ok for a in client.ask(many(160)))
    assert set(server.stats()["calls"].values()) == {1}


def test_sigterm_lets_calls_in_flight_finish_and_a_second_one_ends_at_once(server, settings_for, tmp_path, ray_local):
    server.configure(rules=[{"match": "slow", "latency_s": 30.0}, {"latency_s": 1.0}])

    def terminate_after(calls, times):
        while server.stats()["total"] < calls:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3.0)  # two signals within a second may be seen as one

    with LLMClient(settings_for(max_concurrency=20, hedge=False), tmp_path) as client:
        client.start()
        threading.Thread(target=terminate_after, args=(20, 1)).start()
        with pytest.raises(StoppedError, match="stopped by SIGTERM") as e:
            client.ask(many(60))
    assert e.value.exit_code == 143
    with LLMClient(settings_for(), tmp_path) as client:
        assert client.dry_run(many(60)).calls == 60 - server.stats()["total"] > 0
        client.start()
        threading.Thread(target=terminate_after, args=(server.stats()["total"] + 1, 2)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            client.ask([simple("slow")])
    assert time.monotonic() - began < 15
