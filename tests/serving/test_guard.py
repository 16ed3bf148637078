"""The proxy's guard: what is too large never reaches the app, and clients cannot override Serve's limits."""

import asyncio
import json

import pytest

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


def test_the_limit_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(LIMIT_VARIABLE, "0.5")
    (middleware,) = middlewares()
    assert middleware.kwargs == {"limit": 2**19}
