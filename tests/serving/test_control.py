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


def ingress_of(control):
    (config,) = control.applied
    return next(a for a in config["applications"] if a["name"] == "ingress")["args"]["settings"]


def test_a_second_version_leaves_the_ingress_as_it_is(control, capsys):
    """Its command line says nothing of the log, which would end, nor of replicas, which would become fewer."""
    first = ServingSettings(keys_file="k", log_dir="/log", ingress_replicas=3, port=8001, timeout_s=20)
    control.up(first)
    control.deploy("/b", "b", ServingSettings(keys_file="k", max_queued=5), gpus=False)
    assert ingress_of(control) == first.model_copy(update={"max_queued": 5}).model_dump(mode="json")
    told = capsys.readouterr().err
    for line in ("keeps serving.log_dir=/log", "keeps serving.timeout_s=20"):
        assert f"the ingress {line}" in told
    assert "the ingress has serving.max_queued=5 from now on, before 32" in told


def test_keys_are_never_given_up_by_silence(control):
    control.up(ServingSettings(insecure=True))
    control.deploy("/b", "b", ServingSettings(keys_file="k"), gpus=False)
    assert (ingress_of(control)["insecure"], ingress_of(control)["keys_file"]) == (False, "k")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"port": 9000}, r"serving.port=9000: Serve runs with port 8001, .*serve shutdown"),
        ({"host": "0.0.0.0"}, "Serve runs with host 127.0.0.1"),
        ({"timeout_s": 60.0}, "serving.timeout_s=60.0: Serve runs with timeout_s 20"),
    ],
)
def test_what_serve_cannot_change_is_refused(control, given, says):
    """It ignores it, with a line in its own log."""
    up = ServingSettings(keys_file="k", port=8001, timeout_s=20)
    control.up(up)
    with pytest.raises(SettingsError, match=says):
        control.deploy("/b", "b", ServingSettings(keys_file="k", **given), gpus=False)
    ended = {**serve_config("/a", "a", up, gpus=False), "applications": []}
    control.config = lambda: ended
    with pytest.raises(SettingsError, match=says):
        control.deploy("/b", "b", up.model_copy(update=given), gpus=False)
    assert not control.applied
    control.deploy("/b", "b", up, gpus=False)
    assert control.applied


def test_the_access_log_stays_off_for_versions_that_come_later(control):
    """It has paths, which name users; Serve tells of a config only its applications and HTTP options."""
    control.up(ServingSettings(keys_file="k"))
    whole = control.config()
    control.config = lambda: {k: whole[k] for k in ("proxy_location", "http_options", "applications")}
    control.deploy("/b", "b", ServingSettings(keys_file="k"), gpus=False)
    assert [a["logging_config"] for a in control.applied[0]["applications"]] == [{"enable_access_log": False}] * 3


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
