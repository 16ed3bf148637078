"""A node is lost with requests in flight: in its engine, in its ingress and at its proxy. Nobody gets a wrong answer.

What came through another node's proxy is asked again by the service. What is at the lost proxy is cut off, since nobody
else has its connections: the client asks again, and comes to another node. Worker nodes share a port here, over which
Linux spreads connections as a gateway does; the head has a port of its own.
"""

import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from load_helpers import LINES, Load, assert_all_right
from node_helpers import STORE_BYTES, wait_for
from serving_helpers import make_filter

from gubs.ray_runtime import free_ports
from gubs.serving.keys import add_key
from gubs.serving.settings import ServingSettings

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("deploy_fake.py")
ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",  # a node that is gone is noticed in 3 s; it would take 15
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # else the head's proxy would ask the head's ingress alone
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # not 5: Serve ends a proxy that a busy machine starts late
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
ENGINE, INGRESS = {"engine": 1}, {"ingress": 1}
"""What a node has and a replica takes, so that each stands where it should."""
RECOVERED_S = 150
"""It takes 3 and 8 s where three other processes want the two cores; 45 s were seen on a crowded machine."""
_WITHOUT = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
"""What takes CPU on each node and is of no use here."""


class Service:
    """The service on a head and two worker nodes: both have an engine, head and the first worker an ingress."""

    def __init__(self, cluster, folder, key, head, workers):
        self._cluster, self._folder, self.key = cluster, folder, key
        self.head, self.workers = f"http://127.0.0.1:{head}", f"http://127.0.0.1:{workers}"
        self._workers_port = workers
        self._add(num_cpus=1, resources=INGRESS)
        self._frail = self._add(num_cpus=1, resources=ENGINE | INGRESS)
        self._add(num_cpus=1, resources=ENGINE)
        cluster.wait_for_nodes()

    def deploy(self, filter_, settings):
        port = self.head.rpartition(":")[2]
        command = [sys.executable, str(SCRIPT), self._cluster.gcs_address, port, filter_, settings.model_dump_json()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    def engines(self):
        """Engine replicas that run, as Serve sees it."""
        headers = {"Authorization": f"Bearer {self.key}"}
        return sum(httpx.get(f"{self.head}/v1/status", headers=headers, timeout=30).json()["replicas"].values())

    def lose_a_node(self):
        """Ends all processes of the node with an engine and an ingress, while its proxy has requests."""
        (raylet,) = self._frail.all_processes["raylet"]
        node = psutil.Process(raylet.process.pid)
        (proxy,) = (p for p in node.children() if "ProxyActor" in p.cmdline()[0])
        wait_for(lambda: self._requests_at(proxy) >= 2, 20, "requests at the proxy", every_s=0.001)
        for process in (proxy, *node.children(recursive=True), node):
            process.kill()
        self._cluster.remove_node(self._frail, allow_graceful=False)

    def replace_it(self):
        self._add(num_cpus=1, resources=ENGINE | INGRESS)

    def _requests_at(self, proxy):
        connections = (c for c in proxy.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED)
        return sum(c.laddr.port == self._workers_port for c in connections)

    def _add(self, **options):
        node = {"object_store_memory": STORE_BYTES, "temp_dir": self._folder, **_WITHOUT}
        return self._cluster.add_node(wait=self._cluster.head_node is None, **node, **options)


@contextmanager
def deployed(folder, environment):
    from ray.cluster_utils import Cluster

    head, workers = free_ports(2)
    for name, value in (ENVIRONMENT | {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(workers)}).items():
        environment.setenv(name, value)
    keys = folder / "keys.json"
    key = add_key(keys, "tests", 10**7)
    settings = ServingSettings(keys_file=str(keys), max_ongoing=4, max_queued=4 * LINES, timeout_s=30)
    with tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as nodes:
        cluster = Cluster()
        try:
            service = Service(cluster, nodes, key, head, workers)
            service.deploy(make_filter(folder / "run"), settings)
            yield service
        finally:
            cluster.shutdown()


def seconds_until(what, says):
    began = time.monotonic()
    wait_for(what, RECOVERED_S, says, every_s=0.1)
    return time.monotonic() - began


def test_requests_in_flight_on_a_lost_node_are_asked_again(tmp_path, monkeypatch):
    """Clients at the head's proxy do not try again; those at the workers' proxies may."""
    with deployed(tmp_path, monkeypatch) as service:
        elsewhere, there = Load(service.head, service.key), Load(service.workers, service.key, retries=3)
        with elsewhere, there:
            service.lose_a_node()
            noticed = seconds_until(lambda: service.engines() == 1, "the loss")
            service.replace_it()
            whole = seconds_until(lambda: service.engines() == 2, "two engines")
        print(f"the loss noticed after {noticed:.1f} s, two engines {whole:.1f} s after a new node was started")
        for load, where in ((elsewhere, "elsewhere"), (there, "there")):
            print(
                f"{where}: {len(load.outcomes)} answers, the slowest {load.slowest:.1f} s, {load.tried_again} retries"
            )
        assert there.tried_again, "nobody was at the lost proxy"
        assert_all_right(elsewhere.outcomes)
        assert_all_right(there.outcomes)
