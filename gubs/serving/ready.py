"""Whether an engine answers, for probes that ask without a key and as often as they like."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from gubs.serving.responses import RefusedError

_AGAIN_S = 2.0
"""Seconds for which an answer to a probe holds."""
_BUSY_S = 10.0
"""An engine that answered a request within so many seconds is not asked at all: it has work."""


class Readiness:
    """Asks for all probes at once, and not while requests are being answered."""

    def __init__(self, ask: Callable[[], Awaitable[object]], clock: Callable[[], float] = time.monotonic):
        """Asks nothing yet.

        Args:
            ask: waits for an engine's answer; raises `RefusedError` if none comes.
            clock: seconds.
        """
        self._ask, self._clock = ask, clock
        self.forget()

    def forget(self) -> None:
        """Other engines are asked from now on."""
        self._answered = self._ended = -math.inf
        self._asking: asyncio.Task[RefusedError | None] | None = None

    def answered(self) -> None:
        """An engine has just answered a request."""
        self._answered = self._clock()

    async def check(self) -> None:
        """Returns if an engine answers, or is only busy.

        Raises:
            RefusedError: none answers (503).
        """
        if self._clock() - self._answered < _BUSY_S:
            return
        if self._asking is None or (self._asking.done() and self._clock() - self._ended >= _AGAIN_S):
            self._asking = asyncio.create_task(self._outcome())
        if error := await asyncio.shield(self._asking):  # a probe that leaves ends no other's
            raise RefusedError(503, "unavailable", f"no engine answers: {error}", retryable=True, retry_after=5)

    async def _outcome(self) -> RefusedError | None:
        try:
            await self._ask()
        except RefusedError as e:
            return None if e.status == 429 else e  # its queue is full: it is busy
        finally:
            self._ended = self._clock()
        return None
