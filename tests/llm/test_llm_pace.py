"""Limits, pauses, circuit breakers and overdue answers, on a fake clock or within tenths of seconds."""

import asyncio
import time

import pytest

from gubs.llm.hedging import HedgeTimer
from gubs.llm.limits import Limits, Pace, TokenBucket, share
from gubs.llm.retry import Health, Patience, Refusals
from gubs.llm.settings import RetrySettings
from gubs.llm.wire import AttemptError


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def fault(advice="retry", after_s=None):
    return AttemptError("unreachable", "x", advice, after_s=after_s)


def test_shares_add_up():
    for total in (1, 7, 1000):
        for actors in (1, 2, 3, 9):
            assert sum(share(total, i, actors) for i in range(actors)) == total


def test_a_bucket_keeps_the_pace():
    async def main():
        bucket = TokenBucket(1200)  # 20 per second, and the first second's at once
        began = time.monotonic()
        await asyncio.gather(*(bucket.take(lambda: 1) for _ in range(40)))
        return time.monotonic() - began

    assert 0.95 < asyncio.run(main()) < 1.5


def test_more_than_the_bucket_holds_passes_and_delays_the_next():
    async def main():
        bucket = TokenBucket(6000)  # 100 per second
        began = time.monotonic()
        await bucket.take(lambda: 150)
        at_once = time.monotonic() - began
        await bucket.take(lambda: 1)
        return at_once, time.monotonic() - began

    at_once, then = asyncio.run(main())
    assert at_once < 0.1
    assert 0.45 < then < 0.9


def test_tokens_are_settled():
    async def main():
        limits = Limits(10, 0, 6000)
        await limits.admit(lambda: 100)
        limits.settle(100, 20)
        began = time.monotonic()
        await limits.admit(lambda: 80)
        return time.monotonic() - began

    assert asyncio.run(main()) < 0.1


def test_pauses_double_within_bounds_and_end():
    patience = Patience(RetrySettings(attempts=4, base_s=1, max_s=3), Clock())
    pauses = [patience.pause_s(fault()) for _ in range(4)]
    assert pauses[3] is None
    for pause, full in zip(pauses[:3], (1, 2, 3), strict=True):
        assert full / 2 <= pause <= full


def test_retry_after_is_never_undercut():
    patience = Patience(RetrySettings(base_s=0.1), Clock())
    assert all(10 <= patience.pause_s(fault("wait", 10)) <= 11.1 for _ in range(20))
    assert patience.pause_s(fault("wait", 86_400)) < 122, "but for a day's"


def test_requests_to_slow_down_use_up_time_not_attempts():
    clock = Clock()
    patience = Patience(RetrySettings(attempts=2, patience_s=100, max_s=1), clock)
    for _ in range(50):
        assert patience.pause_s(fault("wait")) is not None
    clock.now = 100
    assert patience.pause_s(fault("wait")) is None
    assert patience.pause_s(fault("wait"), answered_at=50) is not None, "others are answered meanwhile"
    assert patience.pause_s(fault()) is not None


@pytest.mark.parametrize("gap", [0.0, 3600.0])
def test_an_endpoint_is_down_after_time_and_failures(gap):
    clock = Clock()
    health = Health(RetrySettings(down_after_s=60, down_failures=3), clock)
    health.alive()
    clock.now = gap  # an idle hour does not count as silence
    for i in range(500):
        health.failed(fault(), clock.now, f"call {i}")
    assert not health.down()
    clock.now += 59
    assert not health.down(), "the setting is obeyed"
    clock.now += 1
    health.failed(fault(), clock.now, "call 0")
    assert health.down()
    health.alive()
    assert not health.down()


def test_hung_calls_count_from_their_beginning():
    clock = Clock()
    health = Health(RetrySettings(down_after_s=60, down_failures=3), clock)
    clock.now = 300.0
    for i in range(3):
        health.failed(fault(), 0.0, f"call {i}")
    assert health.down()


def test_a_few_calls_that_a_server_cannot_take_are_no_outage_but_silence_is():
    clock = Clock()
    health = Health(RetrySettings(down_after_s=60, down_failures=8), clock)
    for i in range(100):
        health.failed(fault(), 0.0, f"call {i % 7}")
    clock.now = 1000
    assert not health.down()
    health.alive()
    for _ in range(8):
        health.failed(AttemptError("unreachable", "x", "retry", responded=False), 1000.0, "call 0")
    clock.now = 1060
    assert health.down()


def test_refusals_stop_only_if_they_are_equal_and_in_a_row():
    refusals = Refusals()
    refused = [refusals.refused(rejected(f"temperature {i}"), 0) for i in range(5)]
    assert refused == [False] * 4 + [True]
    refusals.answered()
    assert not any(refusals.refused(rejected(text), 0) for text in ("a", "b") * 20)
    assert not any(refusals.refused(rejected("a"), in_flight=30) for _ in range(28)), "answers may still come"


def rejected(message):
    return AttemptError("rejected", message, "give_up")


def test_refusals_that_are_more_than_chance_slow_all_calls_down_together():
    async def main():
        pace = Pace(RetrySettings(base_s=0.2))
        for _ in range(100):
            await pace.turn()
        for _ in range(4):
            pace.refused(time.monotonic(), None)
        began = time.monotonic()
        await pace.turn()
        few = time.monotonic() - began
        for _ in range(40):
            await pace.turn()
        sent = time.monotonic()
        for _ in range(200):
            pace.refused(sent, 0.3)
        began = time.monotonic()
        await asyncio.gather(*(pace.turn() for _ in range(3)))
        return few, time.monotonic() - began

    few, many = asyncio.run(main())
    assert few < 0.05, "a few are noise"
    assert many > 0.3, "Retry-After, once for all"


def test_overdue_follows_from_recent_latencies_and_copies_are_capped():
    async def main():
        watch = HedgeTimer(share=0.05)
        due = [asyncio.get_running_loop().create_future() for _ in range(10)]
        flights = [watch.flight("matcher", "k", d) for d in due]
        for f in flights:
            f.__enter__()
        watch.check(time.monotonic() + 1000)
        assert watch.copies == 0, "no answers yet"
        other = HedgeTimer(share=0.05)
        other.answered("matcher", 4)
        assert other.overdue_after_s("matcher") == 4.25 * 4, "from the first answer on, with a wide margin"
        for i in range(20):
            watch.answered("matcher", 4 + i / 10)
        assert watch.overdue_after_s("matcher") == pytest.approx(1.25 * 5.9)
        watch.check(time.monotonic() + 5)
        assert watch.copies == 0
        watch.check(time.monotonic() + 10)
        assert watch.copies == 4, "three for free and 5% of 20"
        assert [d.done() for d in due] == [True] * 4 + [False] * 6

    asyncio.run(main())
