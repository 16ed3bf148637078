"""What the HTTP proxy refuses before a request reaches a replica: large bodies, and headers that override Serve.

Ray Serve's proxy takes bodies of any size, and lets clients lift its time limit (`x-request-timeout-seconds: 0`) or
keep work alive after they left (`x-request-disconnect-disabled`). The proxy loads `middlewares` if
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


class Guard:
    """ASGI middleware: strips those headers, and answers 413 as soon as a body is too large."""

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
        given = False

        async def replay() -> "Message":
            nonlocal given
            if given:
                return await receive()  # a client that goes away
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app({**scope, "headers": headers}, replay, send)


async def refuse(send: "Send", status: int, code: str, message: str) -> None:
    """A whole error response."""
    body = json.dumps({"error": {"code": code, "message": message, "retryable": False}}).encode()
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
