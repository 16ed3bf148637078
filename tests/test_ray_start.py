"""A local Ray is started again if a busy machine brings it up too late, but not after other errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gubs import ray_runtime
from gubs.errors import PlatformError
from gubs.ray_runtime import RaySettings, free_ports, local_head, ray_session


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


@pytest.fixture
def heads(monkeypatch):
    """Commands that run in place of head nodes, in turn, and the ports each was given; `sleep` counts as up."""
    commands, ports = [], []

    def start(dashboard, agent, client, folder, num_cpus):
        ports.append((dashboard, agent, client))
        (Path(folder) / "head.log").write_text("port is used by other components")
        return subprocess.Popen(commands.pop(0), start_new_session=True)

    monkeypatch.setattr(ray_runtime, "_start_head", start)
    up = ray_runtime._is_up
    monkeypatch.setattr(ray_runtime, "_is_up", lambda d, a, head: head.args[0] == "sleep" or up(d, a, head))
    return commands, ports


def test_a_head_node_that_found_a_port_taken_is_started_again_on_others(heads):
    commands, ports = heads
    commands += [["false"], ["sleep", "60"]]
    with local_head() as address:
        assert address == f"http://127.0.0.1:{ports[1][0]}"
    assert set(ports[0]) != set(ports[1])


def test_a_head_node_that_always_ends_is_an_error_with_its_log(heads):
    commands, ports = heads
    commands += [["false"]] * 3
    with pytest.raises(PlatformError, match=r"exited while starting(.|\n)*used by other"), local_head():
        pass
    assert len(ports) == 3


def test_head_nodes_of_one_process_have_one_token(heads, monkeypatch):
    """Ray reads it once: the second head would refuse the first one's."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    commands, _ = heads
    commands += [["sleep", "60"]] * 2
    tokens = []
    for _ in range(2):
        with local_head():
            tokens.append(os.environ["RAY_AUTH_TOKEN"])
        assert "RAY_AUTH_MODE" not in os.environ
    assert len(set(tokens)) == 1
    assert len(tokens[0]) == 64


def test_free_ports_differ():
    """Asked for one by one, some of so many would come twice, nearly for certain."""
    assert len(set(free_ports(500))) == 500


LATE_DASHBOARD = """
import ray
from ray.experimental.internal_kv import _internal_kv_put
from gubs.ray_runtime import dashboard_address, has_dashboard
ray.init(address="local", num_cpus=1, include_dashboard=True, dashboard_port=0, log_to_driver=False)
stored = dashboard_address()
_internal_kv_put("webui:url", "", True, namespace="dashboard")  # as a node does that did not wait for it
print("late:", has_dashboard(), dashboard_address() == stored)
ray.shutdown()
"""


@pytest.mark.slow
def test_a_dashboard_that_came_up_late_is_found():
    done = subprocess.run([sys.executable, "-c", LATE_DASHBOARD], capture_output=True, text=True, timeout=200)
    assert "late: False True" in done.stdout, done.stderr[-2000:]
