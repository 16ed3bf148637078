"""How test users' targets are dealt to engines: by who is free, and to no more engines than there is work for."""

from types import SimpleNamespace

import pytest
import ray

from gubs.errors import PlatformError
from gubs.evaluate import judge
from gubs.ufm.rollout import Request


@ray.remote(num_cpus=0)
class Echo:
    """Answers with the temperature and the request; lives as long as the test."""

    def ready(self):
        return 0

    def generate(self, requests, temperature):
        return [(temperature, r.seed) for r in requests]


@pytest.fixture
def dealt(monkeypatch, ray_local):
    """Asks 20 targets in both modes, four at a time, of these engines."""

    def deal(workers, *engines, deadline=100.0):
        left = iter(engines)
        monkeypatch.setattr(judge, "use_gpu", lambda _: True)
        monkeypatch.setattr(judge, "_engine", lambda *_: next(left).remote())
        monkeypatch.setattr(judge, "_AT_ONCE", 8)
        settings = SimpleNamespace(ufm=SimpleNamespace(workers=SimpleNamespace(count=workers, stuck_after_s=deadline)))
        asked = [(k, mode, Request({}, k)) for k in range(20) for mode in judge.MODES]
        with judge._started(None, settings, len(asked)) as started:
            return sorted(judge._ask(asked, started, deadline))

    return deal


ALL = sorted((k, mode, (heat, k)) for k in range(20) for mode, heat in (("greedy", 0.0), ("sampled", 1.0)))
NEVER = Echo.options(resources={"a GPU that is busy": 1})


def test_everything_is_answered_once_by_as_many_engines_as_workers(dealt):
    assert dealt(2, Echo, Echo) == ALL


def test_an_engine_that_waits_for_a_busy_gpu_keeps_nothing_from_the_others(dealt):
    assert dealt(2, NEVER, Echo) == ALL


def test_no_more_engines_than_chunks(dealt):
    """20 targets a mode are three chunks of eight: six in all."""
    given = [Echo, Echo, NEVER, NEVER, NEVER, NEVER]
    assert dealt(50, *given) == ALL


def test_where_no_engine_comes_up_it_is_said(dealt):
    with pytest.raises(PlatformError, match="no engine that judges test users was up or answered within 1 s"):
        dealt(1, NEVER, deadline=1.0)
