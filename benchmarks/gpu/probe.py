"""The rollout engine with a clock on its sleep; a module of its own, so that Ray's processes find the class."""

import time

from gubs.ufm.rollout import Engine


class Probe(Engine):
    """The engine, with a clock on its sleep."""

    def timed_sleep(self, level: int) -> float:
        """Seconds that it takes to fall asleep at a level."""
        self.wake()
        began = time.perf_counter()
        self._llm.sleep(level=level)
        self._asleep, self._discarded = ("weights", "kv_cache"), level > 1
        return time.perf_counter() - began

    def timed_wake(self) -> float:
        """Seconds that it takes to wake up."""
        began = time.perf_counter()
        self.wake()
        return time.perf_counter() - began
