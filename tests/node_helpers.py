"""A Ray cluster of several nodes on this machine, which loses one now and then."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from prometheus_helpers import FAST

from gubs.ray_runtime import free_ports

STORE_BYTES = 100 << 20


class Nodes:
    """A head without CPUs, where drivers run, and two worker nodes with two CPUs each."""

    def __init__(self, folder: str) -> None:
        """Starts the nodes.

        Args:
            folder: of this cluster alone; short, since sockets lie in it. The driver of a job joins the cluster whose
                address is in a file there; in Ray's usual folder that is the machine's latest cluster.
        """
        from ray._private.utils import write_ray_address
        from ray.cluster_utils import Cluster

        port, agent = free_ports(2)
        self._folder = folder
        self.address = f"http://127.0.0.1:{port}"
        self._cluster = Cluster()
        dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        self._add(num_cpus=0, dashboard_agent_listen_port=agent, **dashboard)
        write_ray_address(self._cluster.gcs_address, folder)
        self._workers = [self._add(num_cpus=2) for _ in range(2)]
        wait_for(lambda: _listens(agent), 60, "the head's agent, which starts jobs")

    def lose(self, title: str, within_s: float, job: subprocess.Popen | None = None) -> None:
        """Waits until a worker node runs a process (of a job) with this text in its title, and ends all processes of
        that node at one blow. Then it adds a new node.
        """
        says = f"a process with {title!r} in its title"
        ended = lambda: job is not None and job.poll() is not None  # noqa: E731
        wait_for(lambda: self._running(title) or ended(), within_s, says)
        assert not ended(), f"the job ended before {says}"
        (lost, *_) = self._running(title)
        self._cluster.remove_node(lost, allow_graceful=False)
        self._workers = [*(n for n in self._workers if n is not lost), self._add(num_cpus=2)]

    def end(self) -> None:
        """Ends all nodes."""
        self._cluster.shutdown()

    def _running(self, title: str) -> list[object]:
        return [n for n in self._workers if runs(n, title)]

    def _add(self, **options):
        # On one machine, nodes would unpack an uploaded folder over each other's.
        unpacked = f"uploads-{time.monotonic_ns()}"
        node = {"object_store_memory": STORE_BYTES, "runtime_env_dir_name": unpacked, "temp_dir": self._folder}
        node["include_log_monitor"] = False  # it sends what workers print to drivers, and ours print for themselves
        return self._cluster.add_node(wait=True, **node, **options)


def runs(node: object, title: str) -> bool:
    """Whether a process of a node has this text in its title."""
    return any(title in t for t in _titles(node.all_processes["raylet"][0].process.pid))


def wait_for(what: Callable[[], object], seconds: float, says: str, every_s: float = 0.1) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"waited {seconds:g} s for {says}"
        time.sleep(every_s)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _titles(pid: int) -> Iterator[str]:
    """Titles of a process's children."""
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            yield " ".join(process.cmdline())


@contextmanager
def several_nodes(environment: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A cluster whose jobs run this interpreter (the first `python` on the nodes' PATH) and whose figures come fast."""
    environment.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in FAST.items():
        environment.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(folder)
        try:
            yield nodes
        finally:
            nodes.end()


@contextmanager
def two_nodes() -> Iterator[tuple[str, list[object]]]:
    """Two nodes with a CPU each; without a dashboard they start sooner. Yields where a driver joins them, and them."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster()
        options = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "temp_dir": folder, "include_log_monitor": False}
        try:
            nodes = [cluster.add_node(wait=True, **options, include_dashboard=False), cluster.add_node(**options)]
            yield cluster.gcs_address, nodes
        finally:
            cluster.shutdown()
