"""The whole client on a real Ray, against a real HTTP server."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from llm_helpers import simple

from gubs.errors import SettingsError
from gubs.llm.client import LLMClient
from gubs.llm.errors import BudgetReachedError, EndpointDownError, EndpointRefusedError, NotInJournalError
from gubs.llm.settings import BudgetSettings, LLMSettings

pytestmark = pytest.mark.usefixtures("ray_local")
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def replaying(settings):
    unreachable = settings.endpoints["default"].model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    return settings.model_copy(update={"mode": "replay", "endpoints": {"default": unreachable}})


def as_bytes(answers):
    return json.dumps([dataclasses.asdict(dataclasses.replace(a, replayed=False)) for a in answers]).encode()


def test_faults_lose_nothing_and_a_replay_gives_the_same_bytes(server, settings_for, tmp_path):
    server.configure(
        median_s=0.1,
        faults={"429": 0.05, "500": 0.04, "hang": 0.01, "cut": 0.02},
        rules=[
            {"match": "re-ask", "nth": 1, "text": "nonsense"},
            {"match": "hopeless", "text": "nonsense"},
            {"match": "rejected", "status": 400, "body": {"error": {"message": "no"}}},
            {"match": "cannot be used", "text": '{"n": 2}'},
            {"match": "做饭", "text": "<think>好</think>是"},
        ],
    )
    requests = [simple(f"ask {i}", metadata={"i": i}) for i in range(300)]
    requests += [simple("re-ask", schema=SCHEMA), simple("hopeless", regex="yes|no")]
    requests += [simple("rejected"), simple("做饭")]
    settings = settings_for(rest={"actors": 2})
    with LLMClient(settings, tmp_path) as client:
        first = client.ask(requests)
    *plain, reasked, hopeless, rejected, chinese = first
    assert all(a.ok and a.metadata == {"i": i} and a.text for i, a in enumerate(plain))
    assert (reasked.value, reasked.calls) == ({"n": 2}, 2)
    assert (hopeless.failure, hopeless.text, hopeless.calls) == ("no_match", '{"n": 2}', 2)
    assert (rejected.failure, rejected.value) == ("rejected", None)
    assert (chinese.value, chinese.reasoning) == ("是", "好")
    assert server.stats()["peak"] > 100
    before = server.stats()["total"]
    answered = [r for r, a in zip(requests, first, strict=True) if a.ok]
    with LLMClient(settings, tmp_path) as client:
        assert as_bytes(client.ask(answered)) == as_bytes([a for a in first if a.ok])
    assert server.stats()["total"] == before, "a run that starts again repeats no finished call"
    with LLMClient(replaying(settings), tmp_path) as client:
        again = client.ask(requests)
        assert as_bytes(again) == as_bytes(first)
        assert all(a.replayed for a in again)
        with pytest.raises(NotInJournalError, match="matcher 'label/"):
            client.ask([simple("never asked")])


def test_equal_requests_share_a_call_unless_their_sample_differs(server, settings_for, tmp_path):
    with LLMClient(settings_for(), tmp_path) as client:
        same = client.ask([simple("a"), simple("a"), simple("a", sample=1)])
        client.ask([simple("a"), simple("a", sample=1)])
    assert server.calls("a") == 2
    assert same[0].key == same[1].key != same[2].key


def test_a_journal_stays_valid_with_other_limits_but_not_with_other_parameters(server, settings_for, tmp_path):
    with LLMClient(settings_for(), tmp_path) as client:
        client.ask([simple("a")])
        assert client.dry_run([simple("a")]).calls == 0
    with LLMClient(settings_for(max_concurrency=3, timeout_s=9), tmp_path) as client:
        assert client.dry_run([simple("a")]).calls == 0
    with LLMClient(settings_for(rest={"roles": {"matcher": {"temperature": 1.0}}}), tmp_path) as client:
        assert client.dry_run([simple("a")]).calls == 1


def test_dry_run_spends_nothing_and_estimates(server, settings_for, tmp_path):
    prices = {"input_price": 2.0, "output_price": 10.0}
    requests = [simple("x" * 400 + str(i)) for i in range(10)] + [simple("y", role="profiler")] * 2
    with LLMClient(settings_for(**prices), tmp_path) as client:
        plan = client.dry_run(requests)
        assert server.stats()["total"] == 0
        matcher, profiler = plan.roles["matcher"], plan.roles["profiler"]
        assert (matcher.calls, profiler.calls, profiler.requests) == (10, 1, 2)
        assert matcher.tokens_in == pytest.approx(10 * 105, rel=0.02)
        assert matcher.tokens_out == 10 * 256, "no calls yet: the maximum"
        assert matcher.money == pytest.approx((10 * 105 * 2 + 2560 * 10) / 1e6, rel=0.02)
        client.ask(requests[:6])
        later = client.dry_run(requests).roles["matcher"]
        assert (later.journaled, later.calls) == (6, 4)
        assert later.tokens_out == 4 * 7, "the mean so far"


def budgeted(settings, **limits):
    return settings.model_copy(update={"budget": BudgetSettings(**limits)})


def test_a_budget_of_calls_is_exact_and_can_be_raised(server, settings_for, tmp_path):
    server.configure(median_s=0.05)
    settings, requests = settings_for(rest={"actors": 2}), [simple(f"{i}") for i in range(60)]
    answered = []
    with (
        LLMClient(budgeted(settings, calls=25), tmp_path) as client,
        pytest.raises(BudgetReachedError, match=r"llm\.budget\.calls=25 .*25 spent.*35 of 60 requests are open"),
    ):
        answered += client.stream(requests)
    assert server.stats()["total"] == 25
    with LLMClient(budgeted(settings, calls=60), tmp_path) as client:
        assert all(a.ok for a in client.ask(requests))
    assert server.stats()["total"] == 60


@pytest.mark.parametrize("limit", [{"tokens": 2000}, {"money": 0.002}])
def test_a_budget_of_tokens_or_money_is_not_overrun(server, settings_for, tmp_path, limit):
    settings = settings_for(input_price=1.0, output_price=1.0)
    requests = [simple("x" * 200 + str(i)) for i in range(100)]
    with LLMClient(budgeted(settings, **limit), tmp_path) as client:
        with pytest.raises(BudgetReachedError):
            client.ask(requests)
        total = client.journal.total
        used = total.tokens if "tokens" in limit else total.money * 1e6
        assert 1000 < used <= 2000 * 1.02, "by no more than the estimates of a few calls err"
        assert total.calls == server.stats()["total"], "calls in flight finish"


def test_an_endpoint_that_goes_down_stops_the_run_and_finished_calls_are_kept(server, settings_for, tmp_path):
    server.configure(rules=[{"match": "late", "fault": "reset"}])
    requests = [simple(f"early {i}") for i in range(50)] + [simple(f"late {i}") for i in range(20)]
    settings = settings_for(retries={"down_after_s": 1.0, "attempts": 30}, rest={"actors": 2})
    answers = []
    with LLMClient(settings, tmp_path) as client:
        with pytest.raises(EndpointDownError, match=r"is down.*run again"):
            answers.extend(a for _, a in client.stream(requests))
        assert len(answers) == 50
        server.configure()
        assert all(a.ok for a in client.ask(requests)), "the same client can continue"
    assert all(server.calls(f"early {i}") == 1 for i in range(50))


def test_a_wrong_key_stops_the_run_and_stays_hidden(server, settings_for, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-this-is-a-very-secret-key")
    server.configure(key="another")
    with (
        LLMClient(settings_for(api_key_env="SOME_KEY"), tmp_path) as client,
        pytest.raises(EndpointRefusedError, match=r"Bearer .hidden.") as e,
    ):
        client.ask([simple("a")])
    assert "very-secret" not in str(e.value)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(SettingsError, match="SOME_KEY"):
        LLMClient(settings_for(api_key_env="SOME_KEY"), tmp_path)


def test_a_dead_actor_loses_no_finished_call(server, settings_for, tmp_path):
    server.configure(median_s=0.5)
    requests = [simple(f"{i}") for i in range(100)]
    with LLMClient(settings_for(rest={"actors": 2}), tmp_path) as client:
        answers = {}
        for i, answer in client.stream(requests):
            answers[i] = answer
            if len(answers) == 30:
                journaled = [c for p in tmp_path.glob("*.jsonl") for c in p.read_text().splitlines()]
                import ray

                ray.kill(client._pool._members[0].actor)
        assert len(answers) == 100
        assert all(a.ok for a in answers.values())
        ended = [e for e in map(json.loads, journaled) if not e["retried"]]
        finished = [e["request"]["messages"][-1]["content"] for e in ended]
        assert all(server.calls(text) == 1 for text in finished)


def test_progress_adds_up(server, settings_for, tmp_path):
    server.configure(median_s=0.3, rules=[{"match": "bad", "status": 400, "body": {"error": {"message": "no"}}}])
    reports = []
    with LLMClient(settings_for(), tmp_path, on_progress=lambda p: reports.append(dataclasses.replace(p))) as client:
        client.ask([simple("0")])
        reports.clear()
        client.ask([*(simple(f"{i}") for i in range(40)), simple("bad")])
    last = reports[-1]
    assert (last.total, last.done, last.replayed, last.waiting) == (41, 41, 1, 0)
    assert last.failures == {"rejected": 1}
    assert last.cost.calls == 39, "what was rejected costs nothing"
    assert any(p.in_flight for p in reports)


@pytest.mark.parametrize("median_s", [0.0, 0.2], ids=["answers come together", "one by one"])
def test_an_abandoned_batch_does_not_disturb_the_next(server, settings_for, tmp_path, median_s):
    server.configure(median_s=median_s)
    with LLMClient(settings_for(), tmp_path) as client:
        next(iter(client.stream([simple(f"{i}") for i in range(20)])))
        assert [a.label for a in client.ask([simple("new"), simple("5")])] == [simple("new").label, simple("5").label]
    assert server.calls("5") == 1


DRIVER = """
import json, sys, ray
sys.path[:0] = {paths}
from llm_helpers import simple
from gubs.llm.client import LLMClient
from gubs.llm.settings import LLMSettings
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
with LLMClient(LLMSettings.model_validate_json({settings!r}), {folder!r}) as client:
    answers = client.ask([simple(f"ask {{i}}") for i in range(400)])
print(sum(a.ok for a in answers))
"""


def wait_for_writers_to_end(folder):
    """The driver's actors notice its death and end; then the locks on their segments are free."""
    deadline = time.monotonic() + 60
    for path in folder.glob("*.jsonl"):
        with path.open("rb") as f:
            while True:
                try:
                    fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    assert time.monotonic() < deadline, "an actor outlives its driver"
                    time.sleep(0.1)


def test_a_run_killed_at_any_moment_repeats_no_finished_call(server, settings_for, tmp_path):
    server.configure(median_s=1.0)
    settings = settings_for(max_concurrency=60, rest={"actors": 2})
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
    script = DRIVER.format(paths=paths, settings=settings.model_dump_json(), folder=str(tmp_path))
    driver = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    deadline = time.monotonic() + 60
    while server.stats()["total"] < 150:
        assert time.monotonic() < deadline, "the driver makes no calls"
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(10)
    wait_for_writers_to_end(tmp_path)
    finished = []
    for path in tmp_path.glob("*.jsonl"):
        lines = path.read_bytes().split(b"\n")[:-1]
        ended = [e for e in map(json.loads, lines) if not e["retried"]]
        finished += [e["request"]["messages"][-1]["content"] for e in ended]
    assert 30 <= len(finished) < 400
    calls = {text: server.calls(text) for text in finished[:50]}
    with LLMClient(settings, tmp_path) as client:
        assert client.dry_run([simple(f"ask {i}") for i in range(400)]).calls == 400 - len(finished)
        assert all(a.ok for a in client.ask([simple(f"ask {i}") for i in range(400)]))
    assert {text: server.calls(text) for text in calls} == calls, "none of them is asked again"
    assert server.stats()["total"] <= 400 + 60 + 10


def test_settings_that_make_no_sense_are_refused(tmp_path):
    endpoint = {"base_url": "http://x/v1", "model": "m"}
    with pytest.raises(ValueError, match="needs the endpoint 'default'"):
        LLMSettings(endpoints={"other": endpoint})
    for url in ("https://user:word@x/v1", "x/v1"):
        with pytest.raises(ValueError, match="must"):
            LLMSettings(endpoints={"default": {**endpoint, "base_url": url}})
    with pytest.raises(ValueError, match="taken by the server gubs starts itself"):
        LLMSettings(endpoints={"embedded": endpoint})
    mixed = LLMSettings(endpoints={"default": endpoint}, roles={"matcher": {"endpoint": "embedded"}})
    assert mixed.endpoint_of("matcher") == "embedded"
    assert LLMSettings().endpoint_of("summarizer") == "embedded"
    with pytest.raises(SettingsError, match=r"llm\.journal"):
        LLMClient(LLMSettings(), "")
    with pytest.raises(SettingsError, match="local or shared"):
        LLMClient(LLMSettings(), "s3://bucket/journal")
