"""The proxy's guard: what is too large never reaches the app, and clients cannot override Serve's limits."""

import asyncio
import json

import pytest

from gubs.serving import guard
from gubs.serving.guard import LIMIT_VARIABLE, Guard, middlewares

LIMIT = 1000


class App:
    """Reads a request, remembers it, answers; or gives up before or while it does."""

    def __init__(self, *lost):
        self.headers, self.body = None, None
        self.bodies, self._lost = [], list(lost)

    async def __call__(self, scope, receive, send):
        self.headers = dict(scope["headers"])
        message = await receive()
        self.body = message["body"]
        self.bodies.append(self.body)
        lost = self._lost.pop(0) if self._lost else ""
        if lost == "with its client":
            assert (await receive())["type"] == "http.disconnect"
        if lost in ("with its client", "before"):
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if not lost:
            await send({"type": "http.response.body", "body": b"ok"})


def ask(headers, *blocks, lost=()):
    app, sent, left = App(*lost), [], list(blocks)

    async def receive():
        if not left:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(Guard(app, LIMIT)(scope, receive, send))
    return app, sent, left


def test_a_small_body_comes_through_whole():
    app, sent, _ = ask({"content-type": "application/json"}, b"a" * 400, b"b" * 400)
    assert app.body == b"a" * 400 + b"b" * 400
    assert sent[0]["status"] == 200


def test_a_length_above_the_limit_is_refused_unread():
    app, sent, left = ask({"content-length": str(LIMIT + 1)}, b"x" * LIMIT, b"x")
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "too_large"
    assert app.body is None
    assert len(left) == 2


@pytest.mark.parametrize("length", ["10", "", "-5", "abc"])
def test_a_body_that_lies_about_its_length_is_cut_off(length):
    app, sent, left = ask({"content-length": length}, *[b"x" * 600] * 50)
    assert sent[0]["status"] == 413
    assert app.body is None
    assert len(left) == 48, "reading stops at the limit"


def test_headers_that_override_serve_are_stripped():
    stripped = {
        "x-request-timeout-seconds": "0",
        "X-Request-Disconnect-Disabled": "?1",
        "serve_multiplexed_model_id": "other",
        "x-session-id": "chosen-by-the-client",
    }
    app, _, _ = ask(stripped | {"authorization": "Bearer k"}, b"{}")
    assert app.headers == {b"authorization": b"Bearer k"}


def test_a_client_that_leaves_is_not_waited_for():
    app, sent, _ = ask({})
    assert app.body is None
    assert sent == []


def test_a_request_whose_ingress_is_lost_is_asked_again():
    app, sent, _ = ask({}, b"a" * 400, b"b" * 400, lost=["before"])
    assert app.bodies == [b"a" * 400 + b"b" * 400] * 2
    assert [m.get("status") or m["body"] for m in sent] == [200, b"ok"]


def test_a_request_is_asked_again_only_once():
    """It might be what ends them."""
    app, sent, _ = ask({}, b"{}", lost=["before"] * 5)
    assert len(app.bodies) == 2
    error = json.loads(sent[1]["body"])["error"]
    assert (sent[0]["status"], error["code"], error["retryable"]) == (503, "unavailable", True)


@pytest.mark.parametrize("lost", ["during", "with its client"])
def test_what_has_begun_or_nobody_waits_for_is_not_asked_again(lost):
    app, sent, _ = ask({}, b"{}", lost=[lost])
    assert len(app.bodies) == 1
    assert len(sent) == (lost == "during")


class Serves:
    """Serve's proxy where it answers by itself."""

    def __init__(self, status, kind=b"text/plain", *parts):
        self.status, self.kind, self.parts = status, kind, parts

    async def __call__(self, scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"Content-Type", self.kind)]})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": part is not self.parts[-1]})


def answer_of(app):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app, LIMIT)({"type": "http", "headers": []}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m["body"] for m in sent[1:])


@pytest.mark.parametrize(
    ("status", "answered", "code", "retryable"),
    [
        (404, 503, "unavailable", True),
        (408, 504, "timeout", True),
        (429, 429, "overloaded", True),
        (500, 500, "internal", False),
        (503, 503, "unavailable", True),
        (418, 418, "refused", False),
    ],
)
def test_serves_own_errors_become_json(status, answered, code, retryable):
    """They are plain text, and repeat the path."""
    got, headers, body = answer_of(Serves(status, b"text/plain", b"Path '/secret", b"' not found."))
    problem = json.loads(body)["error"]
    assert (got, problem["code"], problem["retryable"]) == (answered, code, retryable)
    assert headers[b"content-type"] == b"application/json"
    assert (b"retry-after" in headers) == (answered in (429, 503))
    assert b"secret" not in body


@pytest.mark.parametrize(("status", "kind"), [(200, b"text/plain"), (404, b"application/json; charset=utf-8")])
def test_other_answers_come_through_as_they_are(status, kind):
    assert answer_of(Serves(status, kind, b"a", b"b")) == (status, {b"Content-Type": kind}, b"ab")


class Stalling:
    """Clients that send a part of a body and hold the rest back until they may go on."""

    def __init__(self, app):
        self.guard, self.go_on = Guard(app, LIMIT), asyncio.Event()

    async def ask(self, body, more=True):
        sent, blocks = [], [body]

        async def receive():
            if not blocks:
                await self.go_on.wait()
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": blocks.pop(), "more_body": more}

        async def send(message):
            sent.append(message)

        await self.guard({"type": "http", "headers": []}, receive, send)
        return (sent[0]["status"], json.loads(sent[1]["body"])["error"]) if more and sent else sent


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    """Nobody has looked at a key yet."""
    monkeypatch.setattr(guard, "_READ_S", 0.05)
    status, error = asyncio.run(Stalling(App()).ask(b"x" * (LIMIT - 1)))
    assert (status, error["code"], error["retryable"]) == (408, "too_slow", True)


def test_an_answer_may_take_longer_than_a_body(monkeypatch):
    monkeypatch.setattr(guard, "_READ_S", 0.02)

    class Slow(App):
        async def __call__(self, *asgi):
            await asyncio.sleep(0.1)
            await super().__call__(*asgi)

    assert asyncio.run(Stalling(Slow()).ask(b"{}", more=False))[0]["status"] == 200


def test_bodies_that_are_held_back_take_bounded_memory_and_keep_small_requests_in(monkeypatch):
    monkeypatch.setattr(guard, "_BODIES", 4)
    monkeypatch.setattr(guard, "_SMALL", 100)

    async def crowd():
        clients = Stalling(App())
        held = [asyncio.create_task(clients.ask(b"x" * (LIMIT - 1))) for _ in range(10)]
        await asyncio.sleep(0.05)
        refused = [task.result() for task in held if task.done()]
        small = await clients.ask(b"x" * 50, more=False)
        clients.go_on.set()
        await asyncio.gather(*held)
        again = await clients.ask(b"x" * (LIMIT - 1), more=False)
        return refused, small[0]["status"], again[0]["status"], clients.guard._held

    refused, small, again, left = asyncio.run(crowd())
    assert len(refused) == 6
    assert {(status, error["code"], error["retryable"]) for status, error in refused} == {(503, "overloaded", True)}
    assert (small, again, left) == (200, 200, 0)


def test_the_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0.5")
    (middleware,) = middlewares()
    assert middleware.kwargs == {"limit": 2**19}
