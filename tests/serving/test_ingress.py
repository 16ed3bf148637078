"""What the ingress refuses by itself, without Serve."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import Request
from ray.exceptions import NodeDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from gubs.serving import deployment, ready
from gubs.serving.deployment import EngineReplica, Ingress, RefusedError, build_engine, build_ingress
from gubs.serving.engine import EngineDiedError
from gubs.serving.keys import add_key
from gubs.serving.metrics import Metrics
from gubs.serving.ready import Readiness
from gubs.serving.responses import Bugs
from gubs.serving.schemas import Candidate, HistoryView, ModelName, Profile, UserRef
from gubs.serving.settings import LimitSettings, ServingSettings

SMALL = ServingSettings(limits=LimitSettings(candidates=2, history=2, frames=2))
CASES = {
    "candidates": (0, [Candidate(id="v")] * 3),
    "user.history": (3, [Candidate(id="v")]),
    "candidates.frames": (0, [Candidate(id="v"), Candidate(id="w", frames=["x"] * 3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_service_may_take_less_than_the_api_allows(name):
    views, candidates = CASES[name]
    user = UserRef(profile=Profile(), history=[HistoryView(title="x")] * views)
    check = Ingress.func_or_class._check_size
    with pytest.raises(RefusedError, match=f"{name}: 3, and this service takes at most 2") as e:
        check(SimpleNamespace(_settings=SMALL), user, candidates)
    assert e.value.status == 422
    check(SimpleNamespace(_settings=ServingSettings()), user, candidates)


def ingress_of(folder, rate, **settings):
    """An ingress without Serve, and a request with its only key."""
    key = add_key(folder / "keys.json", "shop", rate)
    served = ServingSettings(keys_file=str(folder / "keys.json"), **settings)
    headers = [(b"authorization", f"Bearer {key}".encode())]
    plain = Ingress.func_or_class.__bases__[0]  # what Serve has wrapped
    return plain(served.model_dump(mode="json")), Request({"type": "http", "headers": headers})


LOOKING = {"groups": (), "user": ("u0",), "models": (), "examples": (5,), "status": ()}


@pytest.mark.parametrize("name", LOOKING)
def test_requests_without_candidates_count_as_one(tmp_path, name):
    """Each asks a replica, or Serve's controller: without a rate, one key could keep them from everybody else."""
    ingress, request = ingress_of(tmp_path, 1)
    ingress._looking(request)
    with pytest.raises(RefusedError) as e:
        asyncio.run(getattr(ingress, name)(request, *LOOKING[name]))
    assert (e.value.status, e.value.problem.code, e.value.problem.retryable) == (429, "rate_limited", True)
    assert 0 < e.value.retry_after <= 60


def test_an_ingress_replica_admits_its_part_of_a_rate(tmp_path):
    ingress, request = ingress_of(tmp_path, 4, ingress_replicas=2)
    ingress._looking(request)
    ingress._looking(request)
    with pytest.raises(RefusedError, match="rate"):
        ingress._looking(request)


def test_an_engine_replica_takes_the_cpus_that_it_is_given():
    for gpus, more in ((False, {}), (True, {"num_gpus": 1})):
        engine = build_engine({"uri": "u", "gpus": gpus, "settings": {"engine_cpus": 3}})
        assert engine._bound_deployment.ray_actor_options == {"num_cpus": 3, **more}


def test_an_ingress_may_end_its_longest_requests():
    """Otherwise Serve would kill it, and the rest of its log would be lost."""
    ingress = build_ingress({"settings": {"timeout_s": 50}})
    assert ingress._bound_deployment._deployment_config.graceful_shutdown_timeout_s > 50


@pytest.mark.parametrize(
    ("client", "host", "admitted"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "localhost", True),
        ("::1", "[::1]:8000", True),
        ("127.0.0.1", "evil.example:8000", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[::1", False),
        ("10.0.0.9", "localhost", False),
        (None, "localhost", False),
    ],
)
def test_without_keys_it_answers_only_who_asks_for_this_machine_on_this_machine(client, host, admitted):
    """A page on the internet may give its own name this machine's address, and ask from a browser here."""
    scope = {"type": "http", "headers": [(b"host", host.encode())], "client": client and (client, 1)}
    authorised = Ingress.func_or_class._authorised
    if admitted:
        assert authorised(SimpleNamespace(_keys=None), Request(scope)) is None
    else:
        with pytest.raises(RefusedError) as e:
            authorised(SimpleNamespace(_keys=None), Request(scope))
        assert e.value.status == 403


class Probes:
    """A service whose engine answers as a test says, and the probes that ask for it."""

    def __init__(self, *outcomes):
        self.now, self.asked, self.outcomes = 100.0, 0, list(outcomes)
        self.readiness = Readiness(self.ask, lambda: self.now)

    async def ask(self):
        self.asked += 1
        await asyncio.sleep(0)
        if outcome := self.outcomes.pop(0):
            raise outcome

    async def probe(self, count=1):
        results = await asyncio.gather(*(self.readiness.check() for _ in range(count)), return_exceptions=True)
        return ["ready" if r is None else r.status for r in results]


BUSY = RefusedError(429, "overloaded", "too many requests are waiting")
DEAD = RefusedError(504, "timeout", "no answer within 5 s")


def test_probes_cost_the_engine_one_question_in_two_seconds():
    """They ask without a key: each with a question of its own, they would fill the queue of those that pay."""

    async def many():
        it = Probes(None, DEAD, None)
        first = await it.probe(50) + await it.probe()
        it.now += ready._AGAIN_S
        second = await it.probe(50)
        it.now += ready._AGAIN_S
        return it.asked, set(first), set(second), await it.probe()

    assert asyncio.run(many()) == (2, {"ready"}, {503}, ["ready"])


def test_a_probe_that_leaves_ends_no_other():
    async def leaving():
        it = Probes(None)
        first, other = asyncio.create_task(it.probe()), asyncio.create_task(it.probe())
        await asyncio.sleep(0)
        first.cancel()
        return await other

    assert asyncio.run(leaving()) == ["ready"]


def test_a_busy_engine_is_ready():
    async def busy():
        it = Probes(BUSY, DEAD, DEAD)
        full = await it.probe()
        it.now += ready._AGAIN_S
        it.readiness.answered()
        answering = await it.probe()
        it.now += ready._BUSY_S
        silent = await it.probe()
        it.readiness.answered()
        it.readiness.forget()
        return full, answering, silent, await it.probe(), it.asked

    assert asyncio.run(busy()) == (["ready"], ["ready"], [503], [503], 3)


@pytest.mark.parametrize("versions", [{}, {"filter-a": 0.0}, {"filter-a": 1.0}])
def test_a_service_without_an_engine_is_not_ready(tmp_path, versions):
    ingress, _ = ingress_of(tmp_path, 60)
    ingress.reconfigure({"versions": versions})

    async def nobody(*_):
        raise RefusedError(503, "unavailable", "this version is not deployed", retryable=True)

    ingress._call = nobody
    if not any(versions.values()):
        ingress._ready.answered()  # before the last version went
    with pytest.raises(RefusedError) as e:
        asyncio.run(ingress.readyz())
    assert (e.value.status, e.value.problem.code, e.value.problem.retryable) == (503, "unavailable", True)


class Replica:
    """A handle whose calls fail like this, one after the other."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    @property
    def about(self):
        async def failing():
            self.calls += 1
            if self.errors:
                raise self.errors.pop(0)
            return "answer"

        return SimpleNamespace(remote=failing)


LOST = NodeDiedError("its node is gone")
CANCELLED = RequestCancelledError("r")
BUG = RayTaskError("about", "trace", ValueError("user-17"))


@pytest.mark.parametrize(
    ("errors", "outcome", "calls"),
    [
        ([LOST], "answer", 2),
        ([LOST, DeploymentUnavailableError("engine")], 503, 2),
        ([RayTaskError("about", "trace", LOST).as_instanceof_cause()], "answer", 2),
        ([CANCELLED], 503, 1),
        ([BackPressureError(1, 1)], 429, 1),
        ([BUG.as_instanceof_cause()], ValueError, 1),
    ],
)
def test_what_a_lost_replica_had_is_asked_again_and_a_bug_is_not(tmp_path, errors, outcome, calls):
    (ingress, _), replica = ingress_of(tmp_path, 60), Replica(*errors)
    ingress._handle = lambda _: replica

    async def outcome_of():
        try:
            return await ingress._call("filter-a", "about")
        except RefusedError as e:
            return e.status
        except ValueError:
            return ValueError

    assert (asyncio.run(outcome_of()), replica.calls) == (outcome, calls)


class Engine:
    """An engine that answers a canary after a while, and others meanwhile."""

    def __init__(self, quiet_s, takes_s, dead=False):
        self.quiet_s, self.takes_s, self.dead, self.asked = quiet_s, takes_s, dead, 0

    async def check(self):
        if self.dead:
            raise EngineDiedError("it ended")

    async def ask(self, *_):
        self.asked += 1
        await asyncio.sleep(self.takes_s)

    async def healthy(self, monkeypatch):
        monkeypatch.setattr(deployment, "_CANARY_S", 0.2)
        monkeypatch.setattr(deployment, "_QUIET_S", 0.1)
        replica = object.__new__(EngineReplica.func_or_class)
        replica._engine, replica._bundle = self, SimpleNamespace(config=SimpleNamespace(tasks=["sequential"]))
        replica._service = SimpleNamespace(close=lambda: None)
        self.close = lambda: None
        await replica.check_health()


def test_an_engine_that_answers_others_is_healthy_without_being_asked(monkeypatch):
    """The question would wait behind all of theirs, and Serve would end a busy replica."""
    engine = Engine(quiet_s=0.05, takes_s=60)
    asyncio.run(engine.healthy(monkeypatch))
    assert engine.asked == 0


def test_a_quiet_engine_is_asked(monkeypatch):
    engine = Engine(quiet_s=100, takes_s=0)
    asyncio.run(engine.healthy(monkeypatch))
    assert engine.asked == 1


def test_an_engine_that_hangs_is_not_healthy(monkeypatch):
    with pytest.raises(TimeoutError):
        asyncio.run(Engine(quiet_s=100, takes_s=60).healthy(monkeypatch))


def test_an_engine_that_answers_others_first_is_healthy(monkeypatch):
    engine = Engine(quiet_s=0.15, takes_s=60)
    asyncio.run(engine.healthy(monkeypatch))
    assert engine.asked == 1


def test_a_replica_whose_engine_is_dead_ends(monkeypatch):
    ends = []
    monkeypatch.setattr(deployment.os, "_exit", ends.append)
    asyncio.run(Engine(quiet_s=0, takes_s=0, dead=True).healthy(monkeypatch))
    assert ends == [1]


def test_a_bug_is_answered_and_logged_without_what_was_asked(caplog):
    """Serve logs the message of what it gets to see, and a message may name a user."""
    sent = []

    async def broken(*_):
        try:
            {}["user-17"]
        except KeyError as e:
            raise ValueError("no history of user-17") from e

    async def send(message):
        sent.append(message)

    asyncio.run(Bugs(broken)({"type": "http"}, None, send))
    assert sent[0]["status"] == 500
    assert b'"internal"' in sent[1]["body"]
    assert "ValueError" in caplog.text
    assert "KeyError" in caplog.text
    assert "in broken" in caplog.text
    assert "user-17" not in caplog.text + str(sent)


def test_a_bug_in_a_replica_is_an_answer(caplog):
    async def decide(*_):
        raise KeyError("user-17")

    replica = object.__new__(EngineReplica.func_or_class)
    replica._service = SimpleNamespace(decide=decide, close=lambda: None)
    replica._engine = SimpleNamespace(close=lambda: None)
    answer = asyncio.run(replica.decide(None, None))
    assert (answer.code, "user-17" in str(answer) + caplog.text) == ("internal", False)
    assert "KeyError" in caplog.text


def test_where_the_time_went_and_who_decides_is_counted():
    it = Metrics()
    it.request("200", "reason", 0.5)
    it.phases("reason", {"queue": 0.1, "pictures": 0.1, "engine": 0.2})
    text = it.text().decode()
    for phase in ("total", "queue", "pictures", "engine"):
        assert f'gubs_filter_seconds_count{{mode="reason",phase="{phase}"}} 1.0' in text
    for version in ("1", "2"):
        it.model("filter-a", ModelName(name="run", version=version))
    infos = [line for line in it.text().decode().splitlines() if line.startswith("gubs_filter_model_info{")]
    tags = 'app="filter-a",name="run",version='
    assert infos == [f'gubs_filter_model_info{{{tags}"1"}} 0.0', f'gubs_filter_model_info{{{tags}"2"}} 1.0']


def test_what_was_kept_of_versions_that_are_gone_goes_too(tmp_path):
    ingress, _ = ingress_of(tmp_path, 60)
    ingress._handles = {"old": object(), "new": object()}
    ingress._metrics.model("old", ModelName(name="run", version="1"))
    ingress.reconfigure({"versions": {"new": 1.0}})
    assert set(ingress._handles) == {"new"}
    assert 'gubs_filter_model_info{app="old",name="run",version="1"} 0.0' in ingress._metrics.text().decode()
