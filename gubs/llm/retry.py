"""When a failed call is tried again, and when an endpoint counts as down."""

import random
import time
from collections.abc import Callable

from gubs.llm.settings import RetrySettings
from gubs.llm.wire import AttemptError


class Patience:
    """The attempts of one call."""

    def __init__(self, settings: RetrySettings, clock: Callable[[], float] = time.monotonic):
        self._settings, self._clock = settings, clock
        self._began = clock()
        self._failures = 0
        self._slow_downs = 0

    def pause_s(self, fault: AttemptError) -> float | None:
        """Seconds until the next attempt; None if there should be none."""
        if fault.advice == "wait":
            self._slow_downs += 1
            pause = self._pause(self._slow_downs, fault.after_s)
            return pause if self._clock() - self._began + pause <= self._settings.patience_s else None
        self._failures += 1
        return self._pause(self._failures, fault.after_s) if self._failures < self._settings.attempts else None

    def _pause(self, nth: int, after_s: float | None) -> float:
        if after_s is not None:  # never sooner than asked; the jitter keeps many callers from returning at once
            return after_s + random.uniform(0.0, min(0.1 * after_s, 1.0) + 0.05)
        return min(self._settings.max_s, self._settings.base_s * 2 ** min(nth - 1, 30)) * random.uniform(0.5, 1.0)


class Health:
    """Whether an endpoint still responds, as far as one actor sees it."""

    def __init__(self, settings: RetrySettings, clock: Callable[[], float] = time.monotonic):
        self._settings, self._clock = settings, clock
        self._alive_at = float("-inf")
        self._silent_since = float("inf")
        self._failures = 0

    def alive(self) -> None:
        """The endpoint responded."""
        self._alive_at, self._silent_since, self._failures = self._clock(), float("inf"), 0

    def failed(self, began: float) -> None:
        """An attempt that began at `began` (on the clock) got no response."""
        self._failures += 1
        self._silent_since = min(self._silent_since, max(began, self._alive_at))

    def down(self, exhausted: bool = False) -> bool:
        """Whether the endpoint is down: enough failures over enough time with no response in between.

        A call that has used up all its attempts (`exhausted`) while nothing else succeeded is proof enough.
        """
        if self._failures < self._settings.down_failures:
            return exhausted and self._failures >= self._settings.attempts
        return exhausted or self._clock() - self._silent_since >= self._settings.down_after_s

    def explain(self) -> str:
        """What was seen, for the error message."""
        return f"{self._failures} attempts in a row without an answer over {self._clock() - self._silent_since:.0f} s"
