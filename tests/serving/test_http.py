"""The service as clients meet it, through Serve's proxy: keys, limits, overload, deadlines, versions."""

import asyncio
import json
import os
import re
import socket
import time

import httpx
import pytest
import ray
from fake_replica import application
from ray import serve
from serving_helpers import BUG, make_filter

from gubs.serving.client import AsyncClient, Client, ServiceError
from gubs.serving.deployment import build_ingress
from gubs.serving.schemas import Candidate
from gubs.serving.settings import ServingSettings
from gubs.serving.shadow import read_log

pytestmark = pytest.mark.engine
GOOD = {"user": {"id": "u0"}, "candidates": [{"id": "v1"}, {"id": "v2"}]}


@pytest.fixture
def fast(service):
    service.traffic(filter_a=1.0)
    return service


def error(response):
    return response.status_code, response.json()["error"]["code"]


def test_a_request_is_answered(fast):
    response = fast.ask({**GOOD, "request_id": "r1", "mode": "score"})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["request_id"], answer["mode"], answer["threshold"]) == ("r1", "score", 0.5)
    assert answer["model"] == {"name": "run-cars", "version": "version-filter"}
    assert [(r["id"], r["decision"]) for r in answer["results"]] == [("v1", "keep"), ("v2", "drop")]
    assert answer["timing_ms"]["total"] > 0


def test_a_hundred_candidates_are_split_and_put_together_in_order(fast):
    before = fast.work("filter-a")[2]
    ids = [f"v{i}" for i in range(100)]
    answer = fast.ask({"user": {"id": "u1"}, "candidates": [{"id": i} for i in ids]}).json()
    assert [r["id"] for r in answer["results"]] == ids
    assert [r["index"] for r in answer["results"]] == list(range(100))
    assert {r["decision"] for r in answer["results"][1::2]} == {"keep"}
    assert fast.work("filter-a")[2] - before == 100


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.example"])
def test_without_a_key_nothing_is_told(fast, headers, host):
    for path in ("/v1/groups", "/v1/models", "/v1/users/u0", "/v1/examples", "/v1/status"):
        assert error(httpx.get(fast.url + path, headers={**headers, "Host": host})) == (401, "unauthorized")
    for path in ("/v1/filter", "/v1/explain"):
        assert error(fast.ask(path=path, headers={**headers, "Host": host})) == (401, "unauthorized")


def test_a_keys_rate_is_kept(fast):
    headers = {"Authorization": f"Bearer {fast.slow_key}"}
    assert fast.ask({"user": {"id": "u0"}, "candidates": [{"id": "v1"}] * 10}, headers).status_code == 200
    refused = fast.ask(headers=headers)
    assert error(refused) == (429, "rate_limited")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("{", 422, "invalid_request"),
        ('{"user": {"id": "secret-input"}, "candidates": [{"id": 1e999}]}', 422, "invalid_request"),
        ("[" * 100_000, 422, "invalid_request"),
        ({**GOOD, "candidates": [{"id": "secret-input\n"}]}, 422, "invalid_request"),
        ({**GOOD, "user": {"id": "nobody"}}, 404, "unknown_user"),
        (b"\xff\xfe\x00", 422, "invalid_request"),
    ],
)
def test_a_bad_request_gets_a_code_and_no_echo(fast, body, status, code):
    response = fast.ask(body)
    assert error(response) == (status, code)
    assert "secret-input" not in response.text
    assert len(response.content) < 2000


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/examples?count=secret-input", 422, "invalid_request"),
        ("GET", "/v1/secret-input", 404, "not_found"),
        ("DELETE", "/v1/groups", 405, "refused"),
    ],
)
def test_what_the_framework_refuses_has_a_code_too(fast, method, path, status, code):
    response = httpx.request(method, fast.url + path, headers=fast.headers)
    assert error(response) == (status, code)
    assert "secret-input" not in response.text


def test_every_outcome_is_counted(fast):
    def counted(code, mode):
        figures = httpx.get(f"{fast.url}/metrics").text
        match = re.search(rf'gubs_filter_requests_total{{code="{code}",mode="{mode}"}} (\S+)', figures)
        return float(match[1]) if match else 0.0

    outcomes = [("401", "none"), ("422", "none"), ("404", "reason"), ("200", "explain")]
    before = [counted(*o) for o in outcomes]
    fast.ask(headers={})
    fast.ask("{")
    fast.ask({**GOOD, "user": {"id": "nobody"}})
    fast.ask({"user": {"id": "u0"}, "candidate": {"id": "v2"}}, path="/v1/explain")
    assert [counted(*o) for o in outcomes] == [n + 1 for n in before]
    assert "gubs_filter_label_mass_count" in httpx.get(f"{fast.url}/metrics").text


def test_without_keys_a_service_answers_on_its_own_machine_only(fast):
    open_to_all = ServingSettings(insecure=True).model_dump(mode="json")
    ingress = build_ingress({"settings": open_to_all, "versions": {"filter-a": 1.0}})
    serve.run(ingress, name="open", route_prefix="/open")
    try:
        assert httpx.post(f"{fast.url}/open/v1/filter", json=GOOD, timeout=20).status_code == 200
        stranger = httpx.get(f"{fast.url}/open/v1/groups", headers={"Host": "evil.example"})
        assert error(stranger) == (403, "forbidden"), "a page whose name leads to this machine"
    finally:
        serve.delete("open")


def test_a_huge_body_is_refused_before_a_replica_sees_it(fast):
    began = time.perf_counter()
    response = fast.ask(b"x" * (30 << 20))
    assert error(response) == (413, "too_large")
    assert time.perf_counter() - began < 5


def test_what_is_told_about_the_service(fast):
    assert httpx.get(f"{fast.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{fast.url}/readyz").json() == {"status": "ready"}
    paths = httpx.get(f"{fast.url}/openapi.json").json()["paths"]
    assert {"/v1/filter", "/v1/explain", "/v1/groups", "/v1/users/{user_id}", "/v1/models"} <= set(paths)
    body = paths["/v1/filter"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["candidates"]["items"]["properties"]["duration_s"]["anyOf"][0]["maximum"] == 1e6
    assert "$ref" not in json.dumps(body)
    fast.ask()
    figures = httpx.get(f"{fast.url}/metrics").text
    assert 'gubs_filter_requests_total{code="200",mode="reason"}' in figures
    assert 'gubs_filter_candidates_total{decision="drop",option="B"}' in figures
    assert fast.key not in figures


def test_the_client(fast):
    with Client(fast.url, fast.key) as client:
        answer = client.filter("u0", ["v1", Candidate(id="new", title="x", tags=["cars"])], mode="score")
        assert [r.decision for r in answer.results] == ["keep", "drop"]
        assert [p.whose for p in client.explain("u0", "v2").perspectives] == ["own", "similar", "group", "none"]
        assert client.groups()[0].name == "Pet lovers"
        assert client.user("ü 3/4").user_id == "ü 3/4"
        assert [(m.app, m.weight) for m in client.models()] == [("filter-a", 1.0)]
        with pytest.raises(ServiceError, match="unknown_user") as e:
            client.filter("nobody", ["v1"])
        assert e.value.status == 404
    with Client(fast.url, "wrong") as stranger, pytest.raises(ServiceError, match="unauthorized"):
        stranger.groups()


async def crowd(service, requests, candidates=5, retries=0):
    """Many requests at once; the answers or errors, and the seconds of each."""

    async def one(client, i):
        began = time.perf_counter()
        try:
            result = await client.filter(f"u{i % 3}", [f"v{k}" for k in range(candidates)], mode="score")
        except ServiceError as e:
            result = e
        return result, time.perf_counter() - began

    async with AsyncClient(service.url, service.key, retries=retries) as client:
        return await asyncio.gather(*(one(client, i) for i in range(requests)))


def test_over_capacity_requests_are_refused_at_once(service):
    """One replica takes 4 chunks and at most 4 wait: of 30 at once some are answered, the others are told soon."""
    service.traffic(slow=1.0)
    service.peak("slow")
    outcomes = asyncio.run(crowd(service, 30))
    accepted = [s for r, s in outcomes if not isinstance(r, ServiceError)]
    refused = [(r, s) for r, s in outcomes if isinstance(r, ServiceError)]
    assert len(accepted) >= 4
    assert 5 <= service.peak("slow") <= 4 * 5, "four chunks of five questions at a time"
    assert {(r.status, r.problem.code, r.problem.retryable) for r, _ in refused} == {(429, "overloaded", True)}
    assert max(accepted) < service.settings.timeout_s
    assert sorted(s for _, s in refused)[len(refused) // 2] < min(accepted), "at once, however busy the machine is"
    assert service.ask(headers=service.headers).status_code == 200, "it has recovered"


def test_the_number_of_engines_follows_the_load(service):
    settings = service.settings.model_copy(update={"max_replicas": 2, "ongoing": 1})
    serve.run(application(service.filter, settings, seconds=0.4), name="elastic", route_prefix=None)
    service.traffic(elastic=1.0)

    def running():
        return httpx.get(f"{service.url}/v1/status", headers=service.headers).json()["replicas"]["elastic"]

    def until(count, load):
        deadline = time.monotonic() + 60
        while running() != count:
            assert time.monotonic() < deadline, f"{running()} replicas, not {count}"
            load()

    try:
        assert running() == 1
        until(2, lambda: asyncio.run(crowd(service, 6)))
        until(1, lambda: time.sleep(0.5))
    finally:
        service.traffic(slow=1.0)
        serve.delete("elastic")


def test_a_client_that_retries_gets_through(service):
    service.traffic(slow=1.0)
    outcomes = asyncio.run(crowd(service, 16, retries=8))
    assert not [r for r, _ in outcomes if isinstance(r, ServiceError)]


def test_a_client_that_goes_away_frees_its_work(service):
    service.traffic(slow=1.0)
    body = json.dumps({"user": {"id": "u0"}, "candidates": [{"id": f"v{i}"} for i in range(100)]})
    request = (
        f"POST /v1/filter HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.key}\r\n"
        f"X-Request-Disconnect-Disabled: ?1\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    with socket.create_connection(("127.0.0.1", service.port)) as s:
        s.sendall(request.encode())
        deadline = time.monotonic() + 10
        while service.work("slow")[1] < 50:
            assert time.monotonic() < deadline, "the request never reached the engine"
            time.sleep(0.05)
    finished = service.work("slow")[2]
    deadline = time.monotonic() + 3
    while service.work("slow")[1]:
        assert time.monotonic() < deadline, "its questions are still in work"
        time.sleep(0.05)
    assert service.work("slow")[2] - finished < 60, "they were dropped, not answered"


def test_decisions_can_come_in_lines(service):
    """Through the proxy and its guard: the first lines come while the engine still works on the rest."""
    service.traffic(slow=1.0)
    ids = [f"v{i}" for i in range(50)]
    with Client(service.url, service.key, retries=0) as client:
        lines = client.filter_lines("u0", ids, mode="score")
        got = [next(lines)]
        assert service.work("slow")[1] > 0, "the service waited for all of them"
        got += lines
    assert sorted((line.result.index, line.result.id) for line in got[:-1]) == list(enumerate(ids))
    assert got[-1].done.usage.prompt_tokens == 500


def test_a_client_that_leaves_between_lines_frees_its_work(service):
    service.traffic(slow=1.0)
    before = service.work("slow")[2]
    with Client(service.url, service.key, retries=0) as client:
        lines = client.filter_lines("u0", [f"v{i}" for i in range(75)], mode="score")
        assert next(lines).result
        lines.close()
    deadline = time.monotonic() + 3
    while service.work("slow")[1]:
        assert time.monotonic() < deadline, "its questions are still in work"
        time.sleep(0.05)
    assert service.work("slow")[2] - before < 75, "they were dropped, not answered"


@pytest.mark.parametrize("headers", [{}, {"X-Request-Timeout-Seconds": "0"}])
def test_a_deadline_is_kept(service, headers):
    service.traffic(slow=1.0)
    began = time.perf_counter()
    response = service.ask({**GOOD, "timeout_ms": 100}, {**service.headers, **headers})
    assert error(response) == (504, "timeout")
    assert time.perf_counter() - began < 2


def test_no_client_can_wait_longer_than_the_service_allows(service):
    service.deploy("stuck", seconds=60.0)
    service.traffic(stuck=1.0)
    began = time.perf_counter()
    response = service.ask({**GOOD, "timeout_ms": 600_000}, {**service.headers, "X-Request-Timeout-Seconds": "0"})
    assert error(response) == (504, "timeout")
    assert time.perf_counter() - began < service.settings.timeout_s + 3
    serve.delete("stuck")


async def _steady(service, count):
    """Requests one after the other on four lines."""

    async def line(client, n):
        results = []
        for i in range(count // 4):
            try:
                results.append(await client.filter(f"u{(n + i) % 3}", [f"v{k}" for k in range(5)], mode="score"))
            except ServiceError as e:
                results.append(e)
        return results

    async with AsyncClient(service.url, service.key, retries=3) as client:
        lines = await asyncio.gather(*(line(client, n) for n in range(4)))
    return [r for results in lines for r in results]


def test_a_roll_over_drops_no_request(service):
    """A second version with another opinion: in, 50:50, alone, back; each user stays with a version meanwhile."""
    service.filter = make_filter(service.folder / "run", name="second", skip_prompt="pets")
    service.deploy("filter-b", word="pets")
    service.filter = str(service.folder / "run" / "filter")
    seen = []

    async def roll():
        running = asyncio.create_task(_steady(service, 200))
        for shares in ({"filter_a": 0.5, "filter_b": 0.5}, {"filter_b": 1.0}, {"filter_a": 1.0, "filter_b": 0.0}):
            await asyncio.sleep(0.5)
            await asyncio.to_thread(service.traffic, **shares)
            with Client(service.url, service.key, retries=3) as client:
                answer = await asyncio.to_thread(client.filter, "u0", ["v1", "v2"])
            seen.append(answer.model.version)
        return await running

    service.traffic(filter_a=1.0, filter_b=0.0)
    outcomes = asyncio.run(roll())
    assert not [r for r in outcomes if isinstance(r, ServiceError)]
    assert seen[1:] == ["version-second", "version-filter"]
    opinions = {"version-filter": "drop", "version-second": "keep"}
    for answer in outcomes:
        assert answer.results[0].decision == opinions[answer.model.version], "v0 is about cars"


def test_a_version_in_shadow_decides_and_does_not_act(service):
    service.filter = make_filter(service.folder / "run", name="third", skip_prompt="pets")
    service.deploy("filter-c", word="pets")
    service.filter = str(service.folder / "run" / "filter")
    service.traffic(filter_a=1.0, shadow=["filter-c"])
    answer = service.ask({**GOOD, "request_id": "shadowed"}).json()
    assert answer["model"]["version"] == "version-filter"
    assert [r["decision"] for r in answer["results"]] == ["keep", "drop"]
    deadline = time.monotonic() + 60
    while True:
        rows = [r for r in read_log(str(service.folder / "log")).to_pylist() if r["request_id"] == "shadowed"]
        if len(rows) == 4:
            break
        assert time.monotonic() < deadline, "the log was not written"
        time.sleep(0.5)
    decided = {(r["app"], r["acted"], r["video_id"]): r["decision"] for r in rows}
    assert decided == {
        ("filter-a", True, "v1"): "keep",
        ("filter-a", True, "v2"): "drop",
        ("filter-c", False, "v1"): "drop",
        ("filter-c", False, "v2"): "keep",
    }
    assert {r["user_id"] for r in rows} == {"u0"}


def test_without_an_active_version_everything_is_kept(service):
    service.traffic(filter_a=0.0, shadow=["filter-a"])
    answer = service.ask().json()
    assert [r["decision"] for r in answer["results"]] == ["keep", "keep"]
    assert answer["model"]["name"] == "none"
    assert error(httpx.get(f"{service.url}/readyz")) == (503, "unavailable")


def test_a_user_stays_with_a_replica_until_it_is_full(service):
    """Its prefix cache has the user's profile and history; at a third of the replicas, only a third of requests hit."""
    service.deploy("three", seconds=0.3, replicas=3)
    service.traffic(three=1.0)

    def answered(until=3):
        """Process of each replica -> questions answered."""
        seen, deadline = {}, time.monotonic() + 30
        while len(seen) < until:
            assert time.monotonic() < deadline, seen
            pid, _, finished = service.work("three")
            seen[pid] = finished
        return seen

    async def asking(user, times, retries=0):
        async with AsyncClient(service.url, service.key, retries=retries) as client:
            await asyncio.gather(*(client.filter(user, ["v1", "v2"], mode="score") for _ in range(times)))

    try:
        for user in ("u0", "u1", "u2", "ü 3/4"):
            before = answered()
            for _ in range(3):
                asyncio.run(asking(user, 2))
            after = answered()
            assert sorted(after[pid] - before[pid] for pid in before) == [0, 0, 12], user
        before = answered()
        asyncio.run(asking("u0", 3 * service.settings.max_ongoing, retries=8))
        after = answered()
        assert sum(after[pid] > before[pid] for pid in before) > 1, "a hot user spills over"
    finally:
        service.traffic(filter_a=1.0)
        serve.delete("three")


def test_neither_keys_nor_users_are_logged(fast):
    sent = {"profile": {"occupation": "secret-occupation"}}
    fast.ask({**GOOD, "user": sent})
    bug = fast.ask({"user": sent, "candidates": [{"id": "new", "title": BUG}]})
    assert error(bug) == (500, "internal")
    logs = ray._private.worker._global_node.get_logs_dir_path()
    for folder, _, names in os.walk(logs):
        for name in names:
            with open(os.path.join(folder, name), "rb") as f:  # noqa: PTH118, PTH123
                text = f.read()
            assert fast.key.encode() not in text, name
            assert b"secret-occupation" not in text, name
