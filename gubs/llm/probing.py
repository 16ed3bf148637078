"""One call goes ahead of a crowd of its kind: what it learns about the endpoint spares the others a refusal."""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

_HEAD_START_S = 0.5
"""A server refuses a parameter long before it has written an answer; what is not refused by then goes through."""


class Probes:
    """Kinds of calls (what fields they send) that an endpoint is known to take."""

    def __init__(self) -> None:
        self._known: set[Hashable] = set()
        self._ahead: dict[Hashable, asyncio.Event] = {}

    @asynccontextmanager
    async def turn(self, kind: Hashable) -> AsyncIterator[None]:
        """Context of an attempt. While its kind is unknown, one attempt at a time is let in; the kind is known once an
        attempt succeeds or takes longer than refusals do.
        """
        while kind not in self._known and kind in self._ahead:
            await self._ahead[kind].wait()
        if kind in self._known:
            yield
            return
        passed = self._ahead[kind] = asyncio.Event()
        timer = asyncio.get_running_loop().call_later(_HEAD_START_S, self._take, kind)
        try:
            yield
            self._take(kind)
        finally:
            timer.cancel()
            if self._ahead.get(kind) is passed:
                del self._ahead[kind]
            passed.set()

    def is_known(self, kind: Hashable) -> bool:
        """Whether the endpoint is known to take this kind, so that its calls need not wait for a turn."""
        return kind in self._known

    def _take(self, kind: Hashable) -> None:
        self._known.add(kind)
        if passed := self._ahead.pop(kind, None):
            passed.set()
