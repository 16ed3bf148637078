"""When a failed call is tried again, and when an endpoint counts as down or refuses everything."""

import random
import re
import time
from collections.abc import Callable

from gubs.llm.settings import RetrySettings
from gubs.llm.wire import AttemptError

_EQUAL_REFUSALS = 5
_NUMBER = re.compile(r"\d+")


class Patience:
    """The attempts of one call."""

    def __init__(self, settings: RetrySettings, clock: Callable[[], float] = time.monotonic):
        self._settings, self._clock = settings, clock
        self._began = clock()
        self._failures = 0

    def pause_s(self, fault: AttemptError, answered_at: float = float("-inf")) -> float | None:
        """Seconds until the next attempt; None if there should be none.

        Requests to slow down use up time, not attempts: the time since the endpoint last answered any call
        (`answered_at` on the clock). They do not let the pause grow either: `Pace` slows all calls down together.
        """
        if fault.advice == "wait":
            pause = self._pause(1, fault.after_s)
            waited = self._clock() - max(self._began, answered_at)
            return pause if waited + pause <= self._settings.patience_s else None
        self._failures += 1
        return self._pause(self._failures, fault.after_s) if self._failures < self._settings.attempts else None

    def _pause(self, nth: int, after_s: float | None) -> float:
        if after_s is not None:  # never sooner than asked; the jitter keeps many callers from returning at once
            after_s = min(after_s, self._settings.longest_retry_after_s)
            return after_s + random.uniform(0.0, min(0.1 * after_s, 1.0) + 0.05)
        return min(self._settings.max_s, self._settings.base_s * 2 ** min(nth - 1, 30)) * random.uniform(0.5, 1.0)


class Health:
    """Whether an endpoint still answers, as far as one actor sees it."""

    def __init__(self, settings: RetrySettings, clock: Callable[[], float] = time.monotonic):
        self._settings, self._clock = settings, clock
        self.answered_at = float("-inf")
        """When it last answered a call, on the clock."""
        self._calls: set[str] = set()
        self.alive()

    @property
    def has_answered(self) -> bool:
        """Whether it has answered any call."""
        return self.answered_at > float("-inf")

    def answered(self) -> None:
        """A call was answered."""
        self.answered_at = self._clock()
        self.alive()

    def alive(self) -> None:
        """The endpoint works, even if it refused a call."""
        self._alive_at, self._silent_since = self._clock(), float("inf")
        self._failures, self._responded = 0, False
        self._calls.clear()

    def failed(self, fault: AttemptError, began: float, call: str) -> None:
        """An attempt of a call that began at `began` (on the clock) failed through the endpoint's fault."""
        self._failures += 1
        self._responded = self._responded or fault.responded
        if len(self._calls) < self._settings.down_failures:
            self._calls.add(call)
        self._silent_since = min(self._silent_since, max(began, self._alive_at))

    def down(self) -> bool:
        """Whether the endpoint is down: enough failures over enough time with no answer in between.

        A server that responds is there: then several calls must have failed, not one prompt that it cannot take.
        """
        least = self._settings.down_failures
        enough = self._failures >= least and not (self._responded and len(self._calls) < least)
        return enough and self._clock() - self._silent_since >= self._settings.down_after_s

    def explain(self) -> str:
        """What was seen, for the error message."""
        return f"{self._failures} attempts in a row without an answer over {self._clock() - self._silent_since:.0f} s"


class Refusals:
    """Whether an endpoint refuses every request for the same reason."""

    def __init__(self) -> None:
        self._reason = ""
        self._times = 0

    def answered(self) -> None:
        """A request was not refused."""
        self._times = 0

    def refused(self, fault: AttemptError, in_flight: int) -> bool:
        """Counts a refusal; returns whether so many in a row were equal, apart from numbers, that none will be taken.

        With many calls in flight, refusals come long before answers: then more of them are needed.
        """
        reason = _NUMBER.sub("#", fault.message)
        self._times = self._times + 1 if reason == self._reason else 1
        self._reason = reason
        return self._times >= max(_EQUAL_REFUSALS, in_flight)
