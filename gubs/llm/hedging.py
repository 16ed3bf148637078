"""Notices overdue answers (a hung connection), so that a second copy of the request can be sent.

An answer is overdue after 1.25 times the 95th percentile of the role's recent latencies, with a wider margin while only
a few are known. A fixed timeout would either cut off slow but healthy answers or wait minutes for dead ones; beside a
second copy, the slow first one may still win. The share of second copies is capped, so that an endpoint that merely
slows down under load gets little more of it.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

_CHECK_S = 0.25
_SAMPLES = 400
_MARGIN = 3.0
"""Added to the factor, divided by the number of known latencies: one of them says little about the others."""
_ENOUGH = 8
_FACTOR = 1.25
_SHORTEST_S = 1.0
_FREE_COPIES = 3


@dataclass(eq=False, slots=True)
class Flight:
    """One attempt in flight."""

    role: str
    key: str
    """Of the call."""
    began: float = field(default_factory=time.monotonic)


class HedgeTimer:
    """Watches the attempts of one endpoint."""

    def __init__(self, share: float):
        self._share = share
        self._latencies: dict[str, collections.deque[float]] = {}
        self.flights: dict[Flight, asyncio.Future[None] | None] = {}
        """Attempts in flight, in the order in which they began, each with its `copy_wanted`."""
        self._answered = 0
        self.copies = 0
        """Second copies requested so far."""

    @contextlib.contextmanager
    def flight(self, role: str, key: str, copy_wanted: asyncio.Future[None] | None) -> Iterator[Flight]:
        """Context of one attempt; `copy_wanted` is resolved when a second copy should be sent (None: never)."""
        flight = Flight(role, key)
        self.flights[flight] = copy_wanted
        try:
            yield flight
        finally:
            del self.flights[flight]

    def answered(self, role: str, latency_s: float) -> None:
        """Learns from an answer."""
        self._answered += 1
        self._latencies.setdefault(role, collections.deque(maxlen=_SAMPLES)).append(latency_s)

    def overdue_after_s(self, role: str) -> float:
        """Time after which an answer for the role is overdue; infinite before the first answer."""
        latencies = sorted(self._latencies.get(role, ()))
        if not latencies:
            return float("inf")
        factor = _FACTOR + (_MARGIN / len(latencies) if len(latencies) < _ENOUGH else 0.0)
        return max(_SHORTEST_S, factor * latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))])

    async def run(self) -> None:
        """Checks until it is cancelled."""
        while True:
            await asyncio.sleep(_CHECK_S)
            self.check(time.monotonic())

    def check(self, now: float) -> None:
        """Marks overdue attempts, oldest first, as far as the share of second copies allows."""
        limits_s = {role: self.overdue_after_s(role) for role in self._latencies}
        for flight, copy_wanted in self.flights.items():
            if self.copies >= _FREE_COPIES + self._share * self._answered:
                return
            if copy_wanted and not copy_wanted.done() and now - flight.began > limits_s.get(flight.role, float("inf")):
                copy_wanted.set_result(None)
                self.copies += 1
