"""A node is lost with requests in flight on it: they are asked again on another, and nobody gets a wrong answer."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from node_helpers import STORE_BYTES, wait_for
from serving_helpers import make_filter
from test_killed import LINES, Load, assert_all_right

from gubs.ray_runtime import free_port
from gubs.serving.keys import add_key
from gubs.serving.settings import ServingSettings

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("deploy_fake.py")
HEALTH = {"INITIAL_DELAY_MS": 0, "PERIOD_MS": 500, "TIMEOUT_MS": 1000, "FAILURE_THRESHOLD": 3}
"""How Ray finds out that a node is gone; it would take 15 s and more."""


class Service:
    """What `Load` needs of the service."""

    def __init__(self, folder: Path):
        self.url = f"http://127.0.0.1:{free_port()}"
        self.key = add_key(folder / "keys.json", "tests", 10**7)
        keys = str(folder / "keys.json")
        self.settings = ServingSettings(keys_file=keys, max_ongoing=4, max_queued=4 * LINES, timeout_s=30)


def deploy(address: str, part: str, where: str, service: Service) -> None:
    command = [sys.executable, str(SCRIPT), address, part, where, service.settings.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def replicas(service: Service) -> int:
    status = httpx.get(f"{service.url}/v1/status", headers={"Authorization": f"Bearer {service.key}"}, timeout=20)
    return sum(status.json()["replicas"].values())


def test_requests_in_flight_on_a_lost_node_are_asked_again(tmp_path, monkeypatch):
    """Half of them were on it. A new node gets the lost replica's successor."""
    from ray.cluster_utils import Cluster

    for name, value in HEALTH.items():
        monkeypatch.setenv(f"RAY_health_check_{name.lower()}", str(value))
    service, filter_ = Service(tmp_path), make_filter(tmp_path / "run")
    with tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster()
        node = {"object_store_memory": STORE_BYTES, "temp_dir": folder, "include_dashboard": False}
        try:
            cluster.add_node(wait=True, num_cpus=2, **node)
            deploy(cluster.gcs_address, "ingress", service.url.rpartition(":")[2], service)
            lost, _ = (cluster.add_node(wait=True, num_cpus=1, resources={"engine": 1}, **node) for _ in range(2))
            deploy(cluster.gcs_address, "engines", filter_, service)
            with Load(service) as load:
                cluster.remove_node(lost, allow_graceful=False)
                began, before = time.monotonic(), len(load.outcomes)
                wait_for(lambda: len(load.outcomes) >= before + 4 * LINES, 60, "answers without the node")
                cluster.add_node(wait=True, num_cpus=1, resources={"engine": 1}, **node)
                wait_for(lambda: replicas(service) == 2, 60, "two replicas", every_s=0.2)
                print(f"two replicas again {time.monotonic() - began:.1f} s after a node was lost")
            assert_all_right(load.outcomes)
        finally:
            cluster.shutdown()
