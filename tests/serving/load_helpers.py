"""Requests that come one after the other on some lines, and what became of them, while replicas and nodes are lost."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from node_helpers import wait_for

from gubs.serving.client import AsyncClient, ServiceError
from gubs.serving.schemas import Profile, UserRef

LINES = 6
VIDEOS = ["v1", "v2", "v3", "v4"]
RIGHT = ("keep", "drop", "keep", "drop")


class CountingClient(AsyncClient):
    """Counts its further attempts. Each has a connection of its own: those that stay open would all be at one proxy if
    they came to one at first.
    """

    tried_again = 0

    def __init__(self, *args, **rest):
        super().__init__(*args, **rest)
        self._options["limits"] = httpx.Limits(max_keepalive_connections=0)

    def _pause(self, attempt, outcome):
        pause = super()._pause(attempt, outcome)
        self.tried_again += 1
        return pause


class Load:
    """Requests of clients that do not try again, unless they may, while the context is open."""

    def __init__(self, url, key, retries=0):
        self._client = CountingClient(url, key, retries=retries)
        self._stop, self._pool = threading.Event(), ThreadPoolExecutor(1)
        self.outcomes, self.slowest = [], 0.0

    @property
    def tried_again(self):
        return self._client.tried_again

    def __enter__(self):
        self._running = self._pool.submit(asyncio.run, self._lines())
        wait_for(lambda: len(self.outcomes) >= LINES, 30, "the load")
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._running.result(timeout=60)
        self._pool.shutdown()

    async def _lines(self):
        async with self._client as client:
            await asyncio.gather(*(self._line(client, n) for n in range(LINES)))

    async def _line(self, client, number):
        age = number
        while not self._stop.is_set():
            age = (age + LINES) % 140  # another user, so perhaps another replica
            began = time.monotonic()
            try:
                outcome = await client.filter(UserRef(profile=Profile(age=age)), VIDEOS, mode="score")
            except ServiceError as e:
                outcome = e
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.outcomes.append(outcome)


def assert_all_right(outcomes):
    failed = [f"{o.status} {o}" for o in outcomes if isinstance(o, ServiceError)]
    assert not failed, failed
    assert {tuple(r.decision for r in o.results) for o in outcomes} == {RIGHT}
