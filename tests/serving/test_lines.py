"""A response that comes in parts, without Serve: its lines, what ends it, and what becomes of the work behind it."""

import asyncio
import json

import pytest
from fastapi import Request

from gubs.serving.deployment import Ingress, RefusedError, app
from gubs.serving.filter import Decision
from gubs.serving.schemas import ModelName, Result, Usage
from gubs.serving.service import Decided
from gubs.serving.settings import ServingSettings
from gubs.serving.shadow import read_log

NDJSON = b"application/x-ndjson"
ASKED = {"request_id": "r", "user": {"id": "u0"}, "candidates": [{"id": f"v{i}"} for i in range(6)]}
NEVER = 10**6
ONE_BY_ONE = {"v2": 0, "v4": 2, "v0": 4}
"""When a chunk of two is ready, by its first candidate: once the client has got so many lines."""


def ingress(folder, after=ONE_BY_ONE, versions=(("app", 1.0),), raising=None):
    """An ingress with such replicas; `raising`: first candidate -> the error of its chunk."""
    served = ServingSettings(insecure=True, chunk=2, log_dir=str(folder / "log"), log_every_s=3600)
    it = Ingress.func_or_class.__bases__[0](served.model_dump(mode="json"), dict(versions))
    it.got, it.ended = 0, []

    async def call(version, method, *arguments, session=""):
        first = arguments[0].candidates[0].id
        try:
            while it.got < after[first]:
                await asyncio.sleep(0.001)
            if raising and first in raising:
                raise raising[first]
        finally:
            it.ended.append(first)
        results = [Result(index=i, id=c.id, decision=Decision.KEEP) for i, c in enumerate(arguments[0].candidates)]
        model, seconds = ModelName(name="run", version="1"), {"pictures": 0.0, "engine": 0.002}
        return Decided(results, Usage(prompt_tokens=10), 0.5, model, seconds)

    it._call = call
    return it


def request_of(accept=NDJSON, body=ASKED):
    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    headers = [(b"accept", accept), (b"host", b"localhost:8000")]
    scope = {"type": "http", "headers": headers, "client": ("127.0.0.1", 1)}
    return Request(scope, receive)


async def sent(it, request, until=NEVER):
    """Status, content type, and the lines that a client gets who leaves after so many."""
    messages, left = [], asyncio.Event()

    async def send(message):
        messages.append(message)
        it.got += bool(message.get("body"))
        if it.got >= until:
            left.set()

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    async with asyncio.timeout(20):
        response = await it.filter(request)
        await response({"type": "http"}, receive, send)
    lines = [json.loads(m["body"]) for m in messages if m.get("body")]
    return messages[0]["status"], dict(messages[0]["headers"])[b"content-type"], lines


def kinds(lines):
    return [next(iter(line)) for line in lines]


def logged(it, folder):
    it._log.flush()
    return sorted(r["video_id"] for r in read_log(str(folder / "log")).to_pylist())


def counted(it):
    return [line for line in it._metrics.text().decode().splitlines() if line.startswith("gubs_filter_requests_total")]


def test_decisions_come_as_soon_as_their_chunk_is_ready(tmp_path):
    """Each chunk is ready only when the client has got the lines of the one before: else this would not end."""
    it = ingress(tmp_path)
    status, kind, lines = asyncio.run(sent(it, request_of()))
    assert (status, kind) == (200, NDJSON)
    assert kinds(lines) == ["result"] * 6 + ["done"]
    places = [(line["result"]["index"], line["result"]["id"]) for line in lines[:-1]]
    assert places == [(i, f"v{i}") for i in (2, 3, 4, 5, 0, 1)]
    done = lines[-1]["done"]
    assert (done["request_id"], done["threshold"], done["mode"]) == ("r", 0.5, "reason")
    assert done["model"] == {"name": "run", "version": "1"}
    assert done["usage"]["prompt_tokens"] == 30
    assert set(done["timing_ms"]) == {"total", "queue", "pictures", "engine"}
    assert done["timing_ms"]["total"] > done["timing_ms"]["engine"] == 2.0
    assert logged(it, tmp_path) == [f"v{i}" for i in range(6)]
    assert counted(it) == ['gubs_filter_requests_total{code="200",mode="reason"} 1.0']


@pytest.mark.parametrize("accept", [b"", b"*/*", b"application/json", b"application/x-ndjsonx"])
def test_nobody_gets_lines_who_does_not_ask_for_them(tmp_path, accept):
    it = ingress(tmp_path, after=dict.fromkeys(ONE_BY_ONE, 0))
    status, kind, (answer,) = asyncio.run(sent(it, request_of(accept)))
    assert (status, kind) == (200, b"application/json")
    assert [(r["index"], r["id"]) for r in answer["results"]] == [(i, f"v{i}") for i in range(6)]


def test_a_client_may_take_both(tmp_path):
    accept = b"application/json, Application/X-NDJSON;q=0.9"
    assert asyncio.run(sent(ingress(tmp_path), request_of(accept)))[1] == NDJSON


def test_the_api_tells_of_both():
    answers = app.openapi()["paths"]["/v1/filter"]["post"]["responses"]["200"]["content"]
    assert set(answers) == {"application/json", NDJSON.decode()}
    assert set(answers[NDJSON.decode()]["schema"]["properties"]) == {"result", "done", "error"}
    assert "$ref" not in json.dumps(answers[NDJSON.decode()])


def test_without_an_active_version_all_is_kept_in_lines_too(tmp_path):
    it = ingress(tmp_path, versions=())
    _, _, lines = asyncio.run(sent(it, request_of()))
    assert [line["result"]["decision"] for line in lines[:-1]] == ["keep"] * 6
    assert lines[-1]["done"]["model"]["name"] == "none"
    assert logged(it, tmp_path) == [], "nobody decided"


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (RefusedError(429, "overloaded", "too many", retryable=True), "overloaded", True),
        (ZeroDivisionError("secret"), "internal", False),
    ],
)
def test_an_error_after_some_lines_is_the_last_line(tmp_path, caplog, error, code, retryable):
    it = ingress(tmp_path, ONE_BY_ONE | {"v0": NEVER}, raising={"v4": error})
    status, _, lines = asyncio.run(sent(it, request_of()))
    assert (status, kinds(lines)) == (200, ["result", "result", "error"])
    assert (lines[-1]["error"]["code"], lines[-1]["error"]["retryable"]) == (code, retryable)
    assert "secret" not in json.dumps(lines) + caplog.text
    assert ("ZeroDivisionError" in caplog.text) == (code == "internal"), "where a bug is has to be told somewhere"
    assert sorted(it.ended) == sorted(ONE_BY_ONE), "the chunk that was still in work was dropped"
    assert logged(it, tmp_path) == ["v2", "v3"], "what was answered, and nothing else"
    (count,) = counted(it)
    assert 'code="200"' not in count


def test_a_deadline_ends_the_lines(tmp_path):
    it = ingress(tmp_path, {"v2": 0, "v4": NEVER, "v0": NEVER})
    _, _, lines = asyncio.run(sent(it, request_of(body={**ASKED, "timeout_ms": 200})))
    assert kinds(lines) == ["result", "result", "error"]
    assert lines[-1]["error"]["code"] == "timeout"


def test_what_fails_before_the_first_line_has_its_status(tmp_path):
    async def refused(it, body=ASKED):
        with pytest.raises(RefusedError) as e:
            await it.filter(request_of(body=body))
        return e.value.status

    waiting = dict.fromkeys(ONE_BY_ONE, NEVER)
    dead = ingress(tmp_path, waiting | {"v2": 0}, raising={"v2": RefusedError(503, "unavailable", "no engine")})
    assert asyncio.run(refused(dead)) == 503
    assert sorted(dead.ended) == sorted(ONE_BY_ONE), "and nothing goes on"
    assert asyncio.run(refused(ingress(tmp_path), {**ASKED, "candidates": []})) == 422
    assert asyncio.run(refused(ingress(tmp_path, waiting), {**ASKED, "timeout_ms": 5})) == 504


def test_of_a_whole_response_that_fails_nothing_is_logged(tmp_path):
    async def failing(it):
        with pytest.raises(RefusedError):
            await it.filter(request_of(b""))

    late = RefusedError(503, "unavailable", "no engine")
    it = ingress(tmp_path, dict.fromkeys(ONE_BY_ONE, 0), raising={"v4": late})
    asyncio.run(failing(it))
    assert logged(it, tmp_path) == []


def test_a_client_that_leaves_between_lines_frees_the_rest(tmp_path):
    it = ingress(tmp_path, {"v2": 0, "v4": NEVER, "v0": NEVER})

    async def leaving():
        await sent(it, request_of(), until=2)
        async with asyncio.timeout(10):
            while not counted(it):
                await asyncio.sleep(0.001)

    asyncio.run(leaving())
    assert sorted(it.ended) == sorted(ONE_BY_ONE)
    assert counted(it) == ['gubs_filter_requests_total{code="499",mode="reason"} 1.0']


def test_a_client_that_leaves_before_the_first_line_frees_all(tmp_path):
    it = ingress(tmp_path, dict.fromkeys(ONE_BY_ONE, NEVER))

    async def leaving():
        asked = asyncio.create_task(it.filter(request_of()))
        await asyncio.sleep(0.02)
        asked.cancel()
        async with asyncio.timeout(10):
            while not counted(it):
                await asyncio.sleep(0.001)

    asyncio.run(leaving())
    assert sorted(it.ended) == sorted(ONE_BY_ONE)


def test_a_request_without_an_id_has_the_same_in_answer_and_log(tmp_path):
    asked = {name: value for name, value in ASKED.items() if name != "request_id"}
    it = ingress(tmp_path)
    _, _, lines = asyncio.run(sent(it, request_of(body=asked)))
    it._log.flush()
    ids = {row["request_id"] for row in read_log(str(tmp_path / "log")).to_pylist()}
    assert ids == {lines[-1]["done"]["request_id"]}


def test_a_shadow_that_there_is_no_room_for_is_counted(tmp_path):
    async def busy():
        it = ingress(tmp_path)
        it.reconfigure({"versions": {"app": 1.0}, "shadow": ["other"]})
        it._settings = it._settings.model_copy(update={"max_queued": 0})
        await sent(it, request_of())
        return it._metrics.text().decode()

    assert 'gubs_filter_errors_total{code="shadow_dropped"} 1.0' in asyncio.run(busy())
