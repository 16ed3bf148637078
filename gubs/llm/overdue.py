"""Notices answers that are overdue (a hung connection), so that a second copy of the request can be sent.

How long is too long follows from what the endpoint has shown for the role: a quarter more than the 95th percentile of
recent latencies. A fixed timeout would either cut off slow but healthy answers or wait minutes for dead ones; with a
second copy the slow first one may still win. The share of second copies is capped, so an endpoint that merely slows
down under load is not given much more of it.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import Iterator

_CHECK_S = 0.25
_SAMPLES = 400
_ENOUGH = 8
_FACTOR = 1.25
_SHORTEST_S = 1.0
_FREE = 3


class Flight:
    """One attempt on its way."""

    __slots__ = ("began", "role")

    def __init__(self, role: str):
        self.role, self.began = role, time.monotonic()


class Watch:
    """Watches the attempts of one endpoint."""

    def __init__(self, share: float):
        self._share = share
        self._latencies: dict[str, collections.deque[float]] = {}
        self._flights: dict[Flight, asyncio.Future[None]] = {}
        self._answered = 0
        self.copies = 0
        """Second copies that were called for."""

    @contextlib.contextmanager
    def flight(self, role: str, due: asyncio.Future[None] | None) -> Iterator[Flight]:
        """Context of one attempt; `due` gets done when a second copy is wanted (None: it never is)."""
        flight = Flight(role)
        if due is not None:
            self._flights[flight] = due
        try:
            yield flight
        finally:
            self._flights.pop(flight, None)

    def answered(self, role: str, latency_s: float) -> None:
        """Learns from an answer."""
        self._answered += 1
        self._latencies.setdefault(role, collections.deque(maxlen=_SAMPLES)).append(latency_s)

    def patience_s(self, role: str) -> float:
        """Time after which an answer for the role is overdue; infinite while too little is known."""
        seen = self._latencies.get(role, ())
        if len(seen) < _ENOUGH:
            return float("inf")
        ordered = sorted(seen)
        return max(_SHORTEST_S, _FACTOR * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))])

    async def run(self) -> None:
        """Checks for ever; to be cancelled."""
        while True:
            await asyncio.sleep(_CHECK_S)
            self.check(time.monotonic())

    def check(self, now: float) -> None:
        """Marks what is overdue, longest first, as far as the share of second copies allows."""
        patience: dict[str, float] = {}
        for flight, due in list(self._flights.items()):  # in order of their beginning
            if self.copies >= _FREE + self._share * self._answered:
                return
            if flight.role not in patience:
                patience[flight.role] = self.patience_s(flight.role)
            if now - flight.began > patience[flight.role] and not due.done():
                due.set_result(None)
                self.copies += 1
