"""A local Ray that a busy machine brings up too late is started again, and no other error is."""

import pytest

from gubs.cluster import ray_session
from gubs.config import RaySettings
from gubs.errors import PlatformError


@pytest.fixture
def tries(monkeypatch):
    """The answers of `ray.init`, in turn: None or an error; and what was called."""
    import ray

    answers, calls = [], []

    def init(**_):
        calls.append("init")
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return answers, calls


LATE = Exception("The current node timed out during startup. This could happen because ...")


def test_a_late_start_is_tried_again(tries):
    answers, calls = tries
    answers += [LATE, None]
    with ray_session(RaySettings()):
        assert calls == ["init", "shutdown", "init"]
    assert calls[-1] == "shutdown"


def test_not_for_ever(tries):
    answers, calls = tries
    answers += [LATE] * 3
    with pytest.raises(PlatformError, match="3 times"), ray_session(RaySettings()):
        pass
    assert calls == ["init", "shutdown"] * 3


def test_another_error_is_not_tried_again(tries):
    answers, calls = tries
    answers += [ValueError("no such thing")]
    with pytest.raises(ValueError, match="no such thing"), ray_session(RaySettings()):
        pass
    assert calls == ["init"]
