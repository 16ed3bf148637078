"""Deployments beside one that is there, with the dashboard's answers filled in."""

from types import SimpleNamespace

import pytest
import requests

from gubs.errors import PlatformError, SettingsError
from gubs.serving.control import Control, serve_config
from gubs.serving.settings import ServingSettings


@pytest.fixture
def control(monkeypatch):
    """With a service up whose settings a test gives to `up`; `applied` has the configs that were set."""
    control = object.__new__(Control)
    control.applied = []
    control.up = lambda settings: setattr(control, "config", lambda: serve_config("/a", "a", settings, gpus=False))
    monkeypatch.setattr(control, "apply", control.applied.append, raising=False)
    return control


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3"])
def test_a_service_that_others_reach_is_never_left_without_keys(control, host):
    control.up(ServingSettings(keys_file="k", host=host))
    with pytest.raises(SettingsError, match="this machine only"):
        control.deploy("/b", "b", ServingSettings(insecure=True), gpus=False)
    assert not control.applied


@pytest.mark.parametrize("insecure", [False, True])
def test_a_second_version_gets_no_requests_yet(control, insecure):
    control.up(ServingSettings(insecure=insecure, keys_file="" if insecure else "k"))
    control.deploy("/b", "b", ServingSettings(insecure=insecure, keys_file="k"), gpus=False)
    apps = {a["name"]: a for a in control.applied[0]["applications"]}
    assert set(apps) == {"filter-a", "filter-b", "ingress"}
    assert apps["ingress"]["deployments"][0]["user_config"]["versions"] == {"filter-a": 1.0, "filter-b": 0.0}


def test_a_service_that_does_not_end_in_order_is_told(monkeypatch):
    def gone(_):
        raise requests.exceptions.ConnectionError("connection refused")

    control, states = object.__new__(Control), [{"ingress": {"status": "DELETING"}}] * 3
    monkeypatch.setattr("gubs.serving.control._POLL_S", 0.01)
    deployed = []
    control._client = SimpleNamespace(
        deploy_applications=deployed.append,
        get_serve_details=lambda: {"applications": {}, "proxy_location": "EveryNode"} if not states else ended(),
    )

    def ended():
        return {"applications": {n: a | {"deployed_app_config": None} for n, a in states.pop().items()}}

    control.end(5)
    assert deployed == [{"applications": []}]
    assert not states, "it waits for the end"
    states += [{"ingress": {"status": "DELETING"}}] * 10**4
    with pytest.raises(PlatformError, match=r"not at its end within 0.05 s: \{'ingress': 'DELETING'\}"):
        control.end(0.05)
    control._client.deploy_applications = gone
    with pytest.raises(PlatformError, match="the dashboard does not answer: connection refused"):
        control.end(5)
