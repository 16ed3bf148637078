"""Replicas and engines that die with requests in flight: nobody gets a wrong answer, and no request ends them all."""

import os
import signal
import time

import psutil
import pytest
from fake_replica import application
from load_helpers import LINES, Load, assert_all_right
from node_helpers import wait_for
from ray import serve
from ray.serve.context import _get_global_client
from serving_helpers import DEADLY

from gubs.serving.client import ServiceError

pytestmark = pytest.mark.engine
REPLICAS = 3
RECOVERED_S = 60
"""It takes 3 to 4 s on a quiet machine: Serve's look at its replicas once a second, and the start of one."""


@pytest.fixture(scope="module")
def frail(service):
    """The service with one version of three replicas, where all of the load may wait."""
    settings = service.settings.model_copy(update={"max_queued": 4 * LINES})
    serve.run(application(service.filter, settings, seconds=0.3, replicas=REPLICAS), name="frail", route_prefix=None)
    service.traffic(frail=1.0)
    assert service.ask().status_code == 200, "the ingress knows the replicas"
    yield service
    serve.delete("frail")


def pids() -> set[int]:
    """Processes of the replicas that run."""
    details = _get_global_client().get_serve_details()["applications"]["frail"]["deployments"]["engine"]
    return {r["pid"] for r in details["replicas"] if r["state"] == "RUNNING"}


def alive(processes: set[int]) -> set[int]:
    """Those that run; one that has ended may still be there as a zombie."""
    listed = (p for p in psutil.process_iter(["pid", "status"]) if p.info["pid"] in processes)
    return {p.info["pid"] for p in listed if p.info["status"] != psutil.STATUS_ZOMBIE}


def recovery_after(lost: set[int], began: float) -> float:
    """Seconds until there are as many replicas as before, without the lost ones; told, and bounded."""
    whole = lambda: len(pids() - lost) == REPLICAS  # noqa: E731
    wait_for(whole, RECOVERED_S, f"{REPLICAS} replicas", every_s=0.1)
    seconds = time.monotonic() - began
    print(f"{REPLICAS} replicas again {seconds:.1f} s after {len(lost)} died")
    return seconds


def test_requests_in_flight_on_a_killed_replica_are_asked_again(frail):
    with Load(frail.url, frail.key) as load:
        lost = min(pids())
        os.kill(lost, signal.SIGKILL)
        recovery_after({lost}, time.monotonic())
    assert_all_right(load.outcomes)


def test_a_request_that_ends_its_engine_is_asked_once_more_and_not_again(frail):
    """Otherwise one request would end every replica. Others that were on both of the two may fail, none wrongly."""
    before = pids()
    assert len(before) == REPLICAS
    deadly = {"user": {"id": "u0"}, "candidates": [{"id": "new", "title": DEADLY}]}
    with Load(frail.url, frail.key) as load:
        began = time.monotonic()
        response = frail.ask(deadly)
        wait_for(lambda: len(alive(before)) <= REPLICAS - 2, 10, "the end of the second engine", every_s=0.1)
        recovery_after(before - alive(before), began)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert response.json()["error"]["retryable"]
    assert len(alive(before)) == REPLICAS - 2
    failed = [o for o in load.outcomes if isinstance(o, ServiceError)]
    assert {(o.status, o.problem.retryable) for o in failed} <= {(503, True)}
    assert_all_right([o for o in load.outcomes if not isinstance(o, ServiceError)])
