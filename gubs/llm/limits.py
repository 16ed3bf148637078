"""An actor's share of an endpoint's limits: calls in flight, requests per minute, tokens per minute.

Limits are split evenly over the actors of the pool, and the pool gives work to an actor with room. So no call has to
ask another process for permission, and the sum never exceeds the limit; only the very end of a batch loses a little.
"""

import asyncio
import time
from collections.abc import Callable

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
