"""An actor's share of an endpoint's limits: calls in flight, requests and tokens per minute, the pace it asks for.

Limits are split evenly over the actors of the pool, and the pool gives work to an actor with room. So no call has to
ask another process for permission, and the sum never exceeds the limit; only the very end of a batch loses a little.
"""

import asyncio
import time
from collections.abc import Callable

from gubs.llm.settings import RetrySettings

_FEW_REFUSALS = 3
_REFUSED_SHARE = 0.4
"""Refusals that slow an endpoint's calls down: so many, and this share of what was sent. A few per cent are noise."""
_REMEMBERED = 50
_SLOWEST_PER_S = 0.5
_FASTER_PER_S = 1.1
_BURST_S = 1.0
"""A bucket holds what one second brings in: the pace is even, and a minute exceeds its limit by at most a second's."""


class TokenBucket:
    """Lets `per_minute` units per minute pass, in order of arrival.

    A caller waits until the level is positive and then takes all it needs. So something larger than the bucket still
    passes, and the next callers wait longer.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._rate = per_minute / 60.0
        self._capacity = max(1.0, self._rate * _BURST_S)
        self._level = self._capacity
        self._clock = clock
        self._filled_at = clock()
        self._turn = asyncio.Lock()

    async def take(self, amount: Callable[[], int]) -> int:
        """Waits until `amount()` units may pass; it is called when the turn comes, and its result returned."""
        if self._rate <= 0:
            return 0
        async with self._turn:
            taken = amount()
            self._refill()
            needed = min(taken, self._capacity)
            if self._level < needed:
                await asyncio.sleep((needed - self._level) / self._rate)
                self._refill()
            self._level -= taken
            return taken

    def settle(self, difference: float) -> None:
        """Takes what a call used beyond its estimate, or returns what it did not use. Never waits."""
        if self._rate > 0:
            self._level = min(self._capacity, self._level - difference)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._rate)
        self._filled_at = now


class Pace:
    """How fast an endpoint may be asked once it says that this is too fast (429); no limit before.

    All calls share it: after refusals that are more than chance, they wait together and continue as fast as requests
    were taken before; then faster every second, until the next refusals. Single ones do not matter, since a slower pace
    for each would hold up a crowd.
    """

    def __init__(self, settings: RetrySettings, clock: Callable[[], float] = time.monotonic):
        self._settings, self._clock = settings, clock
        self._per_s = float("inf")
        self._next_at = float("-inf")
        self._counted_from = self._changed_at = clock()
        self._cut_at = float("-inf")
        self._sent = self._refused = 0
        self._cuts = 0
        """Since the last answer."""
        self._turn = asyncio.Lock()

    async def turn(self) -> None:
        """Waits until a request may be sent, in order of arrival."""
        if self._next_at > self._clock() or self._turn.locked():
            async with self._turn:
                while (wait_s := self._next_at - self._clock()) > 0:
                    await asyncio.sleep(wait_s)
                self._take()
        else:
            self._take()

    def answered(self) -> None:
        """A request was answered."""
        self._cuts = 0

    def refused(self, began: float, after_s: float | None) -> None:
        """A request that was sent at `began` (on the clock) was too much."""
        if began < self._cut_at:
            return  # it was sent at the pace before
        self._refused += 1
        if self._refused < _FEW_REFUSALS or self._refused < _REFUSED_SHARE * self._sent:
            return
        now = self._clock()
        taken = (self._sent - self._refused) / max(1.0, now - self._counted_from)
        pause_s = min(self._settings.max_s, self._settings.base_s * 2**self._cuts)
        if after_s is not None:
            pause_s = min(after_s, self._settings.longest_retry_after_s)
        self._per_s, self._cuts = max(_SLOWEST_PER_S, taken), min(self._cuts + 1, 30)
        self._next_at = self._counted_from = self._changed_at = now + pause_s
        self._cut_at = now
        self._sent = self._refused = 0

    def _take(self) -> None:
        now = self._clock()
        self._sent += 1
        if self._sent >= _REMEMBERED:  # older requests count less and less
            self._sent, self._refused = self._sent // 2, self._refused // 2
            self._counted_from += (now - self._counted_from) / 2
        if self._per_s < float("inf"):
            self._per_s *= _FASTER_PER_S ** max(0.0, now - self._changed_at)
            self._changed_at = now
            self._next_at = max(now, self._next_at) + 1 / self._per_s


class Limits:
    """One actor's part of one endpoint's limits."""

    def __init__(self, concurrency: int, requests_per_minute: float, tokens_per_minute: float):
        self.slots = asyncio.Semaphore(concurrency)
        self._requests = TokenBucket(requests_per_minute)
        self._tokens = TokenBucket(tokens_per_minute)

    async def admit(self, tokens: Callable[[], int]) -> int:
        """Waits until a request of about `tokens()` tokens (input and output) may be sent; returns what it reserved."""
        await self._requests.take(lambda: 1)
        return await self._tokens.take(tokens)

    def settle(self, reserved: int, used: int) -> None:
        """Corrects the token count once the endpoint has reported what a call used."""
        self._tokens.settle(used - reserved)


def share(total: int, actor: int, actors: int) -> int:
    """One actor's part of `total` whole units; the parts of all `actors` add up to the total."""
    return total // actors + (actor < total % actors)
