"""What the ingress answers with: errors as JSON with a code, and lines (NDJSON) that are sent as they are ready."""

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from typing import TYPE_CHECKING, Any, Self, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from gubs.serving.schemas import ErrorBody, FilterLine, Problem

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

R = TypeVar("R")
NDJSON = "application/x-ndjson"
_log = logging.getLogger("ray.serve")


class RefusedError(Exception):
    """An error response."""

    def __init__(self, status: int, code: str, message: str, *, retryable: bool = False, retry_after: float = 0.0):
        super().__init__(message)
        self.status, self.problem = status, Problem(code=code, message=message, retryable=retryable)
        self.retry_after = retry_after

    def response(self) -> Response:
        """As JSON, with Retry-After where a client should wait."""
        headers = {"Retry-After": str(max(1, round(self.retry_after)))} if self.retry_after else {}
        return JSONResponse(ErrorBody(error=self.problem).model_dump(), self.status, headers)


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an error: of a bug only that there is one, which asking again will not mend."""
    if isinstance(error, RefusedError):
        return error.problem
    return Problem(code="internal", message="the service failed")


def log_bug(error: BaseException) -> None:
    """Logs what kind of error happened where, and not its message: it may repeat what a client sent."""
    told: BaseException | None = error
    while told:
        places = (f"{f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(told.__traceback__))
        _log.error("request failed: %s\n  %s", type(told).__name__, "\n  ".join(places))
        told = told.__cause__ or told.__context__


class Bugs:
    """ASGI middleware: a bug is answered with its code. If it went further, Serve would log its message."""

    def __init__(self, app: "ASGIApp"):
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handles a request as ASGI wants it."""
        begun = False

        async def noting(message: "Message") -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as e:  # noqa: BLE001 - whatever it is
            log_bug(e)
            if begun:
                raise RuntimeError("an answer broke off") from None
            problem = problem_of(e)
            await RefusedError(500, problem.code, problem.message).response()(scope, receive, send)


def wants_lines(request: Request) -> bool:
    """Whether a client takes NDJSON."""
    kinds = request.headers.get("accept", "").split(",")
    return any(kind.partition(";")[0].strip().lower() == NDJSON for kind in kinds)


async def as_ready(calls: Iterable[Awaitable[R]]) -> AsyncGenerator[R]:
    """The results of the calls as they are ready; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(c) for c in calls]
    try:
        for ready in asyncio.as_completed(tasks):
            yield await ready
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Lines(StreamingResponse):
    """A response whose lines come while others are still being made; if the client goes away, so does the work.

    The work has a task of its own: deadlines and counts belong to one task, and a slow client must not hold it up.
    """

    def __init__(self, lines: AsyncGenerator[FilterLine]):
        self._lines, self._ready = lines, asyncio.Queue[FilterLine | None]()
        self._work = asyncio.get_running_loop().create_task(self._fill())
        # gateways would collect lines before they pass them on
        super().__init__(self._text(), media_type=NDJSON, headers={"X-Accel-Buffering": "no"})

    async def begun(self) -> Self:
        """Waits for the first line. What goes wrong before it is raised, and answered with a status as ever."""
        try:
            self._first = await self._ready.get()
            if self._first is None:
                await self._work
        except BaseException:
            self._work.cancel()
            raise
        return self

    async def __call__(self, *channel: Any) -> None:
        """Sends the lines."""
        try:
            await super().__call__(*channel)
        finally:
            self._work.cancel()

    async def _fill(self) -> None:
        try:
            async for line in self._lines:
                self._ready.put_nowait(line)
        finally:
            self._ready.put_nowait(None)

    async def _text(self) -> AsyncIterator[str]:
        line = self._first
        while line:
            yield line.line()
            line = await self._ready.get()
        await asyncio.wait([self._work])
        if error := self._work.exception():
            if not isinstance(error, RefusedError):
                log_bug(error)
            yield FilterLine(error=problem_of(error)).line()
