"""An actor's share of an endpoint's limits: calls in flight, requests a minute, tokens a minute.

Limits are split evenly over the actors of the pool, and the pool gives work to whoever has room; so no call has to ask
another process for leave, the sum never exceeds the limit, and nothing is lost but a little at the very end of a batch.
"""

import asyncio
import time
from collections.abc import Callable

_BURST_S = 1.0
"""A bucket holds what one second brings in: the pace is even, and a minute sees the limit plus a second's at most."""


class TokenBucket:
    """Lets `per_minute` units a minute pass, in order of arrival.

    Whoever comes waits until the level is positive and then takes all it needs, so that something larger than the
    bucket still passes and the next ones wait the longer.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self._rate = per_minute / 60.0
        self._capacity = max(1.0, self._rate * _BURST_S)
        self._level = self._capacity
        self._clock = clock
        self._at = clock()
        self._turn = asyncio.Lock()

    async def take(self, amount: Callable[[], int]) -> int:
        """Waits until `amount()` units may pass; it is asked when the turn comes, and returned."""
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
        """Takes what a call used beyond its estimate, or gives back what it did not use. Never waits."""
        if self._rate > 0:
            self._level = min(self._capacity, self._level - difference)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now


class Limits:
    """One endpoint's limits, as far as one actor is concerned."""

    def __init__(self, concurrency: int, requests_per_minute: float, tokens_per_minute: float):
        self.slots = asyncio.Semaphore(concurrency)
        self._requests = TokenBucket(requests_per_minute)
        self._tokens = TokenBucket(tokens_per_minute)

    async def admit(self, tokens: Callable[[], int]) -> int:
        """Waits for leave to send a request of about so many tokens (input and output); returns what was set aside."""
        await self._requests.take(lambda: 1)
        return await self._tokens.take(tokens)

    def settle(self, taken: int, used: int) -> None:
        """Corrects the token count once the endpoint has said what a call used."""
        self._tokens.settle(used - taken)


def share(total: int, actor: int, actors: int) -> int:
    """Part of `total` whole units for one of `actors`; the parts add up to the total."""
    return total // actors + (actor < total % actors)
