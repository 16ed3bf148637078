"""What the HTTP proxy does around a replica's answer: it refuses large and slow bodies and headers that override Serve,
asks again if the ingress that has a request is lost before the answer begins, and puts Serve's own errors into JSON.

Ray Serve's proxy takes bodies of any size, for any time, before anybody has looked at a key, and lets clients lift its
time limit (`x-request-timeout-seconds: 0`) or keep work alive after they left (`x-request-disconnect-disabled`). If an
ingress replica dies, perhaps with its node, the proxy has no answer for its requests (500, without a reason). It loads
`middlewares` if RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it when Ray starts.
"""

import asyncio
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


_READ_S = 20.0
"""For a client to send its body; Serve's proxy gives it as long for the header."""
_BODIES = 32
"""Bodies of the largest size that a proxy holds at a time, or more that are smaller together."""
_SMALL = 64 << 10
"""Bytes of a body that is never refused for lack of room: clients that hold large ones back keep no others away."""


class Guard:
    """ASGI middleware: strips those headers; answers 413 as soon as a body is too large, 408 if it comes too slowly,
    503 if all bodies together take too much memory; asks a second time (then 503) if no answer has begun, for every
    request is a read.
    """

    def __init__(self, app: "ASGIApp", limit: int):
        self._app, self._limit = app, limit
        self._held = 0
        """Bytes of the bodies that are being read or answered."""

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handles a request as ASGI wants it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _STRIPPED]
        body = bytearray()
        try:
            if await self._admitted(headers, receive, send, body):
                await self._answer({**scope, "headers": headers}, body, receive, send)
        finally:
            self._held -= len(body)

    async def _admitted(
        self, headers: "list[tuple[bytes, bytes]]", receive: "Receive", send: "Send", body: bytearray
    ) -> bool:
        """Reads the body; False: it is refused, or its client went away."""
        length = next((value for name, value in headers if name.lower() == b"content-length"), b"")
        try:
            if length.isdigit() and int(length) > self._limit:
                raise self._too_large()
            async with asyncio.timeout(_READ_S):
                return await self._read(receive, body)
        except TimeoutError:
            await refuse(send, 408, "too_slow", f"the body was not there within {_READ_S:g} s", retryable=True)
        except _RefusedError as e:
            await refuse(send, e.status, e.code, str(e))
        return False

    async def _read(self, receive: "Receive", body: bytearray) -> bool:
        """Reads the body; False: the client went away.

        Raises:
            _RefusedError: it is too large, or there is no room for it.
        """
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            block = message.get("body", b"")
            body += block
            self._held += len(block)
            more = message.get("more_body", False)
            if len(body) > self._limit:
                raise self._too_large()
            if self._held > _BODIES * self._limit and len(body) > _SMALL:
                raise _RefusedError(503, "overloaded", "too many large bodies at a time")
        return True

    def _too_large(self) -> "_RefusedError":
        return _RefusedError(413, "too_large", f"the body is larger than {self._limit:,} bytes")

    async def _answer(self, scope: "Scope", body: bytearray, receive: "Receive", send: "Send") -> None:
        for _ in range(_TIMES):
            asked = _Asked(body, receive, send)
            await self._app({**scope, "headers": list(scope["headers"])}, asked.receive, asked.send)
            if asked.begun or asked.left:
                return
        await refuse(send, 503, "unavailable", "the ingress that had this request is gone")


class _RefusedError(Exception):
    """An error response of the guard's own."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class _Asked:
    """A request that was read, given to the app once, and what became of it."""

    def __init__(self, body: bytearray, receive: "Receive", send: "Send"):
        self._body: bytearray | None = body
        self._receive, self._send = receive, send
        self.begun = False
        """The client has got something."""
        self.left = False
        """The client has gone away."""
        self._replaced = False
        """The client gets another answer than this one."""

    async def receive(self) -> "Message":
        """The whole body, then the client's leaving."""
        if self._body is None:
            message = await self._receive()
            self.left = message["type"] == "http.disconnect"
            return message
        body, self._body = self._body, None
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    async def send(self, message: "Message") -> None:
        """A part of the answer. Errors that are no JSON come from Serve itself, and may repeat what was asked."""
        self.begun = True
        if message["type"] == "http.response.start" and message["status"] >= 400 and not _is_json(message):
            self._replaced = True
            await refuse(self._send, *_SERVES.get(message["status"], (message["status"], "refused", "not served")))
        elif not self._replaced:
            await self._send(message)


_SERVES = {
    404: (503, "unavailable", "no ingress is up"),  # the ingress has all paths, and answers in JSON what it lacks
    408: (504, "timeout", "no answer in time"),
    429: (429, "overloaded", "too many requests are waiting"),
    500: (500, "internal", "the service failed"),
    503: (503, "unavailable", "no ingress answers"),
}
"""Errors of Serve's proxy -> status, code and message for the client."""
_RETRYABLE = (429, 503, 504)


def _is_json(message: "Message") -> bool:
    kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return any(kind.startswith(b"application/json") for kind in kinds)


async def refuse(send: "Send", status: int, code: str, message: str, *, retryable: bool | None = None) -> None:
    """A whole error response, with Retry-After where the client should wait; retryable by its status if not given."""
    retryable = status in _RETRYABLE if retryable is None else retryable
    body = json.dumps({"error": {"code": code, "message": message, "retryable": retryable}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def middlewares() -> "list[Middleware]":
    """What Ray Serve's proxy wraps around its app."""
    from starlette.middleware import Middleware

    return [Middleware(Guard, limit=int(float(os.environ.get(LIMIT_VARIABLE, "8")) * 2**20))]
