"""What the HTTP proxy does around a replica's answer: it refuses large bodies and headers that override Serve, and asks
again if the ingress that has a request is lost before the answer begins.

Ray Serve's proxy takes bodies of any size, and lets clients lift its time limit (`x-request-timeout-seconds: 0`) or
keep work alive after they left (`x-request-disconnect-disabled`). If an ingress replica dies, perhaps with its node,
the proxy has no answer for its requests (500, without a reason). It loads `middlewares` if
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it when Ray starts.
"""

import json
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.middleware import Middleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK = "gubs.serving.guard:middlewares"
CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
LIMIT_VARIABLE = "GUBS_SERVE_BODY_MB"
_STRIPPED = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve_multiplexed_model_id",
    b"x-session-id",
}
_TIMES = 2
"""How often an ingress is asked. More often, a request that ends its ingress would end them all."""


class Guard:
    """ASGI middleware: strips those headers, answers 413 as soon as a body is too large, and asks a second time (then
    503) if no answer has begun: every request is a read.
    """

    def __init__(self, app: "ASGIApp", limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handles a request as ASGI wants it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _STRIPPED]
        length = next((value for name, value in headers if name.lower() == b"content-length"), b"")
        if length.isdigit() and int(length) > self._limit:
            await refuse(send, 413, "too_large", f"the body is larger than {self._limit:,} bytes")
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                await refuse(send, 413, "too_large", f"the body is larger than {self._limit:,} bytes")
                return
        for _ in range(_TIMES):
            asked = _Asked(body, receive, send)
            await self._app({**scope, "headers": list(headers)}, asked.receive, asked.send)
            if asked.begun or asked.left:
                return
        await refuse(send, 503, "unavailable", "the ingress that had this request is gone", retryable=True)


class _Asked:
    """A request that was read, given to the app once, and what became of it."""

    def __init__(self, body: bytes, receive: "Receive", send: "Send"):
        self._body: bytes | None = body
        self._receive, self._send = receive, send
        self.begun = False
        """The client has got something."""
        self.left = False
        """The client has gone away."""

    async def receive(self) -> "Message":
        """The whole body, then the client's leaving."""
        if self._body is None:
            message = await self._receive()
            self.left = message["type"] == "http.disconnect"
            return message
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: "Message") -> None:
        """A part of the answer."""
        self.begun = True
        await self._send(message)


async def refuse(send: "Send", status: int, code: str, message: str, *, retryable: bool = False) -> None:
    """A whole error response."""
    body = json.dumps({"error": {"code": code, "message": message, "retryable": retryable}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def middlewares() -> "list[Middleware]":
    """What Ray Serve's proxy wraps around its app."""
    from starlette.middleware import Middleware

    return [Middleware(Guard, limit=int(float(os.environ.get(LIMIT_VARIABLE, "8")) * 2**20))]
