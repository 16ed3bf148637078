"""What the ingress refuses by itself, without Serve."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import Request

from gubs.serving.deployment import Ingress, RefusedError, build_engine, build_ingress
from gubs.serving.keys import add_key
from gubs.serving.schemas import Candidate, HistoryView, Profile, UserRef
from gubs.serving.settings import LimitSettings, ServingSettings

SMALL = ServingSettings(limits=LimitSettings(candidates=2, history=2, frames=2))
CASES = {
    "candidates": (0, [Candidate(id="v")] * 3),
    "user.history": (3, [Candidate(id="v")]),
    "candidates.frames": (0, [Candidate(id="v"), Candidate(id="w", frames=["x"] * 3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_service_may_take_less_than_the_api_allows(name):
    views, candidates = CASES[name]
    user = UserRef(profile=Profile(), history=[HistoryView(title="x")] * views)
    check = Ingress.func_or_class._check_size
    with pytest.raises(RefusedError, match=f"{name}: 3, and this service takes at most 2") as e:
        check(SimpleNamespace(_settings=SMALL), user, candidates)
    assert e.value.status == 422
    check(SimpleNamespace(_settings=ServingSettings()), user, candidates)


def ingress_of(folder, rate, **settings):
    """An ingress without Serve, and a request with its only key."""
    key = add_key(folder / "keys.json", "shop", rate)
    served = ServingSettings(keys_file=str(folder / "keys.json"), **settings)
    headers = [(b"authorization", f"Bearer {key}".encode())]
    plain = Ingress.func_or_class.__bases__[0]  # what Serve has wrapped
    return plain(served.model_dump(mode="json")), Request({"type": "http", "headers": headers})


LOOKING = {"groups": (), "user": ("u0",), "models": (), "examples": (5,), "status": ()}


@pytest.mark.parametrize("name", LOOKING)
def test_requests_without_candidates_count_as_one(tmp_path, name):
    """Each asks a replica, or Serve's controller: without a rate, one key could keep them from everybody else."""
    ingress, request = ingress_of(tmp_path, 1)
    ingress._looking(request)
    with pytest.raises(RefusedError) as e:
        asyncio.run(getattr(ingress, name)(request, *LOOKING[name]))
    assert (e.value.status, e.value.problem.code, e.value.problem.retryable) == (429, "rate_limited", True)
    assert 0 < e.value.retry_after <= 60


def test_an_ingress_replica_admits_its_part_of_a_rate(tmp_path):
    ingress, request = ingress_of(tmp_path, 4, ingress_replicas=2)
    ingress._looking(request)
    ingress._looking(request)
    with pytest.raises(RefusedError, match="rate"):
        ingress._looking(request)


def test_an_engine_replica_takes_the_cpus_that_it_is_given():
    for gpus, more in ((False, {}), (True, {"num_gpus": 1})):
        engine = build_engine({"uri": "u", "gpus": gpus, "settings": {"engine_cpus": 3}})
        assert engine._bound_deployment.ray_actor_options == {"num_cpus": 3, **more}


def test_an_ingress_may_end_its_longest_requests():
    """Otherwise Serve would kill it, and the rest of its log would be lost."""
    ingress = build_ingress({"settings": {"timeout_s": 50}})
    assert ingress._bound_deployment._deployment_config.graceful_shutdown_timeout_s > 50
