"""The benchmark of the service, with stand-ins for what it measures: in which order, and on which questions."""

import contextlib
import importlib
from types import SimpleNamespace

import pytest

ROUNDS, REQUESTS = 3, 10


@pytest.fixture
def measured(monkeypatch):
    """What happened, in order: ("up" | "down", "", 0), or (what was measured, mode, first question)."""
    benchmark = importlib.import_module("serve")
    happened = []

    @contextlib.contextmanager
    def service(*_):
        happened.append(("up", "", 0))
        yield "http://service"
        happened.append(("down", "", 0))

    def worker(args, what, *words):
        mode, rate = (words[1], words[2]) if what == "load" else (words[0], "0")
        happened.append((what if rate == "0" else "open", mode, args.skip))
        return {"requests_per_second": 2.0, "per_second": 40.0}

    monkeypatch.setattr(benchmark, "_service", service)
    monkeypatch.setattr(benchmark, "_worker", worker)
    monkeypatch.setattr(benchmark, "_overhead", lambda *_: {})
    args = SimpleNamespace(modes=["reason", "score"], rounds=ROUNDS, requests=REQUESTS, skip=0)
    results = benchmark._measured(args, None)
    assert all(len(results[mode][kind]) == ROUNDS for mode in args.modes for kind in ("saturated", "offline"))
    assert all(list(results[mode]["open"]) == [0.5, 0.8, 1.2] for mode in args.modes)
    return happened


def test_service_and_offline_engine_take_turns(measured):
    """Measured one after the other, a machine that slows down would do so for one of them."""
    turns = [what for what, *_ in measured if what in ("up", "down", "offline")]
    assert turns == ["up", "down", "offline", "offline"] * ROUNDS, "and never two engines at the same time"


@pytest.mark.parametrize("mode", ["reason", "score"])
def test_both_answer_the_same_questions_after_the_same_others(measured, mode):
    """Offline, the questions before the measured ones are asked in the same process."""
    served = [first for what, m, first in measured if (what, m) == ("load", mode)]
    offline = [first for what, m, first in measured if (what, m) == ("offline", mode)]
    assert served == [first + more for first in offline for more in (0, REQUESTS)]


def test_each_measurement_of_a_service_has_questions_of_its_own(measured):
    """What was asked before is in the engine's cache."""
    last = measured[max(i for i, (what, *_) in enumerate(measured) if what == "up") :]
    firsts = [first for what, _, first in last if what in ("load", "open")]
    assert len(set(firsts)) == len(firsts) == 2 * 2 + 2 * 3
