"""A local Ray is started again if a busy machine brings it up too late, but not after other errors."""

import subprocess
import sys

import pytest

from gubs.errors import PlatformError
from gubs.ray_runtime import RaySettings, ray_session


@pytest.fixture
def tries(monkeypatch):
    """Results of `ray.init`, in turn (None or an error), and the calls made."""
    import ray

    results, calls = [], []

    def init(**_):
        calls.append("init")
        if error := results.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return results, calls


LATE = Exception("The current node timed out during startup. This could happen because ...")


def test_a_late_start_is_tried_again(tries):
    results, calls = tries
    results += [LATE, None]
    with ray_session(RaySettings()):
        assert calls == ["init", "shutdown", "init"]
    assert calls[-1] == "shutdown"


def test_a_node_that_never_comes_up_is_an_error(tries):
    results, calls = tries
    results += [LATE] * 3
    with pytest.raises(PlatformError, match="3 times"), ray_session(RaySettings()):
        pass
    assert calls == ["init", "shutdown"] * 3


def test_another_error_is_not_tried_again(tries):
    results, calls = tries
    results += [ValueError("no such thing")]
    with pytest.raises(ValueError, match="no such thing"), ray_session(RaySettings()):
        pass
    assert calls == ["init"]


LATE_DASHBOARD = """
import ray
from ray.experimental.internal_kv import _internal_kv_put
from gubs.ray_runtime import dashboard_address, has_dashboard
ray.init(num_cpus=1, include_dashboard=True, dashboard_port=0, log_to_driver=False)
stored = dashboard_address()
_internal_kv_put("webui:url", "", True, namespace="dashboard")  # as a node does that did not wait for it
print("late:", has_dashboard(), dashboard_address() == stored)
ray.shutdown()
"""


@pytest.mark.slow
def test_a_dashboard_that_came_up_late_is_found():
    done = subprocess.run([sys.executable, "-c", LATE_DASHBOARD], capture_output=True, text=True, timeout=200)
    assert "late: False True" in done.stdout, done.stderr[-2000:]
