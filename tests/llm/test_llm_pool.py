"""The client actors' start, where one of them dies with its node."""

from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from gubs.errors import PlatformError
from gubs.llm import pool as pools
from gubs.llm.client_actor import Report
from gubs.llm.endpoint import Assignment
from gubs.llm.pool import Pool
from gubs.llm.settings import LLMSettings


@pytest.fixture
def starts(monkeypatch):
    """Fills in for Ray: what each start of an actor gives, in turn; the actors' numbers; the pauses."""
    given, numbers, slept = [], [], []

    def start(_, assignment):
        numbers.append(assignment.number)
        ready = given.pop(0)
        return pools.Member(assignment, SimpleNamespace(open=SimpleNamespace(remote=lambda _: ready)))

    def get(refs, timeout):
        assert timeout == pools._START_S
        if isinstance(refs, Exception):
            raise refs
        return refs

    monkeypatch.setattr(Pool, "_start", start)
    monkeypatch.setattr(pools.time, "sleep", slept.append)
    monkeypatch.setattr(pools.ray, "get", get)
    monkeypatch.setattr(pools.ray, "is_initialized", lambda: True)
    return given, numbers, slept


def assignment(actors: int) -> Assignment:
    return Assignment(LLMSettings(), {}, "journal", "id", 0, actors)


def test_an_actor_that_dies_as_it_starts_is_started_again(starts):
    given, numbers, slept = starts
    given += [Report([]), RayActorError(), Report([]), RayActorError(), last := Report([])]
    pool = Pool(assignment(3))
    assert numbers == [0, 1, 2, 1, 1]
    assert slept == [*pools._PAUSES_S[:2]], "a lost node counts as alive for a while, and would get the actor again"
    assert pool._members[1].last is last


def test_several_actors_may_die_with_one_node(starts):
    given, numbers, _ = starts
    given += [RayActorError()] * 6 + [Report([])] * 6
    Pool(assignment(6))
    assert sorted(numbers) == sorted([*range(6)] * 2)


def test_an_actor_that_keeps_dying_is_an_error(starts):
    given, numbers, slept = starts
    given += [RayActorError()] * (len(pools._PAUSES_S) + 1)
    with pytest.raises(PlatformError, match="client actor 0 died 4 times"):
        Pool(assignment(1))
    assert len(numbers) == len(pools._PAUSES_S) + 1
    assert slept == [*pools._PAUSES_S]
