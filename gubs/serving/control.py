"""Deploys filters on a cluster and moves requests between versions, through the dashboard's REST interface.

The whole state is one Serve config, as in a YAML file for `serve deploy`: one application per version, and the ingress
with the versions' shares in its `user_config`. A new share restarts nothing.
"""

import copy
import math
import time
from collections.abc import Collection, Mapping
from typing import Any

from gubs.artifacts import JsonObject
from gubs.console import say
from gubs.errors import PlatformError, SettingsError
from gubs.serving.settings import ServingSettings

INGRESS = "ingress"
_POLL_S = 1.0
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_LOGGING = {"enable_access_log": False}
"""Paths may name users."""
_OF_INGRESS = (
    *("chunk", "mode", "timeout_s", "max_queued", "ingress_replicas", "keys_file", "insecure", "limits"),
    *("log_dir", "log_every_s"),
)
"""Settings that the ingress of all versions reads."""


def app_name(version: str) -> str:
    """Name of a version's application."""
    return f"filter-{version}"


def engine_app(uri: str, version: str, settings: ServingSettings, *, gpus: bool) -> JsonObject:
    """A version's application in a Serve config."""
    return {
        "name": app_name(version),
        "route_prefix": None,
        "import_path": "gubs.serving.deployment:build_engine",
        "logging_config": _LOGGING,
        "args": {"uri": uri, "settings": settings.model_dump(mode="json"), "gpus": gpus},
    }


def ingress_app(settings: ServingSettings, traffic: JsonObject) -> JsonObject:
    """The ingress in a Serve config."""
    return {
        "name": INGRESS,
        "route_prefix": "/",
        "import_path": "gubs.serving.deployment:build_ingress",
        "logging_config": _LOGGING,
        "args": {"settings": settings.model_dump(mode="json")},
        "deployments": [{"name": INGRESS, "user_config": traffic}],
    }


def serve_config(uri: str, version: str, settings: ServingSettings, *, gpus: bool) -> JsonObject:
    """A whole Serve config with one version that gets all requests."""
    traffic = {"versions": {app_name(version): 1.0}, "shadow": []}
    return {
        "proxy_location": "EveryNode",
        "http_options": _http_options(settings),
        "logging_config": _LOGGING,  # of the proxies; a version that is added later has its application's
        "applications": [engine_app(uri, version, settings, gpus=gpus), ingress_app(settings, traffic)],
    }


def _http_options(settings: ServingSettings) -> JsonObject:
    host = "127.0.0.1" if settings.insecure else settings.host
    return {"host": host, "port": settings.port, "request_timeout_s": settings.timeout_s + 5}


class Control:
    """The service on one cluster."""

    def __init__(self, address: str):
        """Connects.

        Args:
            address: of the dashboard, http://host:8265.

        Raises:
            PlatformError: it cannot be reached.
        """
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        try:
            self._client = ServeSubmissionClient(address)
        except (ConnectionError, RuntimeError) as e:
            raise PlatformError(f"cannot reach the dashboard at {address}: {e}") from None
        self.address = address

    def config(self) -> JsonObject:
        """The present config; one without applications if nothing is deployed."""
        details = self._client.get_serve_details()
        applications = [a["deployed_app_config"] for a in details.get("applications", {}).values()]
        options = {k: details[k] for k in ("proxy_location", "http_options") if details.get(k)}
        return {**options, "applications": [a for a in applications if a]}

    def apply(self, config: JsonObject, timeout_s: float = 600.0) -> None:
        """Sets a config and waits until every application runs.

        Raises:
            PlatformError: one of them cannot start, or takes too long.
        """
        self._client.deploy_applications(config)
        wanted = {a["name"] for a in config["applications"]}
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            status = self.status()
            if all(status.get(name, "") == "RUNNING" for name in wanted) and set(status) == wanted:
                return
            failed = [n for n in wanted if status.get(n) in ("DEPLOY_FAILED", "UNHEALTHY")]
            if failed:
                message = self._client.get_serve_details()["applications"][failed[0]].get("message", "")
                raise PlatformError(f"{failed[0]} does not start: {message.strip()[-1500:]}")
            time.sleep(_POLL_S)
        aim = "up" if wanted else "at its end"
        raise PlatformError(f"the service was not {aim} within {timeout_s:g} s: {self.status()}")

    def end(self, timeout_s: float) -> None:
        """Ends all applications in order, so that an ingress writes what is left of its log.

        Not by Serve's own shutdown, which may block the dashboard and says nothing of what it left.

        Raises:
            PlatformError: the dashboard does not answer, or some applications do not end in time.
        """
        try:
            self.apply({**self.config(), "applications": []}, timeout_s)
        except (OSError, RuntimeError) as e:  # OSError: also those of requests
            raise PlatformError(f"the dashboard does not answer: {e}") from None

    def status(self) -> dict[str, str]:
        """Status of each application."""
        return {name: a["status"] for name, a in self._client.get_serve_details().get("applications", {}).items()}

    def deploy(self, uri: str, version: str, settings: ServingSettings, *, gpus: bool) -> str:
        """Deploys a version: with all requests if it is the first, else with none, beside those that are there.

        The ingress that is there keeps its settings, apart from those that are given: that differ from the defaults.

        Returns:
            The name of its application.

        Raises:
            SettingsError: without keys, beside a service that other machines reach; or with an address or a time limit
                that the running Serve does not have, and cannot change.
        """
        name, present = app_name(version), self.config()
        others = [a for a in present["applications"] if a["name"] not in (INGRESS, name)]
        ingress = next((a for a in present["applications"] if a["name"] == INGRESS), None)
        http = present.get("http_options") or {}
        if ingress is None:
            _check_http(http, settings, ServingSettings.model_fields)
            self.apply(serve_config(uri, version, settings, gpus=gpus))
            return name
        if settings.insecure and http.get("host", "") not in _LOOPBACK:
            host = http.get("host", "")
            raise SettingsError(f"the service listens on {host}: without keys it may listen on this machine only")
        _check_http(http, settings, _given(settings))
        traffic = _traffic(present)
        traffic["versions"].setdefault(name, 0.0 if others else 1.0)
        kept = _ingress_settings(ServingSettings(**ingress["args"].get("settings", {})), settings)
        applications = [*others, engine_app(uri, version, settings, gpus=gpus), ingress_app(kept, traffic)]
        self.apply({**present, "applications": applications})
        return name

    def split(self, weights: Mapping[str, float]) -> None:
        """Gives versions their shares of the requests; others get none.

        Raises:
            SettingsError: a version is not deployed, a share is negative or not finite, or none is above 0.
        """
        self._change(lambda traffic: traffic.update(versions=self._known(weights)))

    def promote(self, name: str) -> None:
        """Gives a version all requests; the others stay deployed, for the way back."""
        self.split({name: 1.0})

    def shadow(self, name: str, *, on: bool = True) -> None:
        """Asks a version beside those that act; its decisions only go to the log."""
        self._known({name: 1.0})

        def change(traffic: JsonObject) -> None:
            others = [n for n in traffic["shadow"] if n != name]
            traffic["shadow"] = [*others, name] if on else others

        self._change(change)

    def remove(self, name: str) -> None:
        """Takes a version away that gets no requests.

        Raises:
            SettingsError: it gets some, or is not deployed.
        """
        present = self.config()
        traffic = _traffic(present)
        self._known({name: 1.0})
        if traffic["versions"].get(name) or name in traffic["shadow"]:
            raise SettingsError(f"{name} still gets requests: promote another version first")
        traffic["versions"].pop(name, None)
        applications = [a for a in present["applications"] if a["name"] != name]
        self.apply({**present, "applications": _with_traffic(applications, traffic)})
        _say(f"{name} is gone; ", traffic)

    def traffic(self) -> JsonObject:
        """Shares and shadows: {"versions": {application: weight}, "shadow": [...]}."""
        return _traffic(self.config())

    def _known(self, weights: Mapping[str, float]) -> dict[str, float]:
        deployed = [a["name"] for a in self.config()["applications"] if a["name"] != INGRESS]
        unknown = [n for n in weights if n not in deployed]
        if unknown:
            raise SettingsError(f"{unknown[0]} is not deployed (deployed: {', '.join(deployed) or 'nothing'})")
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise SettingsError(f"{name}: a share is a number from 0, not {weight:g}")
        if not any(weights.values()):
            raise SettingsError("some version needs a share above 0")
        return {name: float(weights.get(name, 0.0)) for name in deployed}

    def _change(self, change: Any) -> None:
        present = self.config()
        traffic = _traffic(present)
        change(traffic)
        self.apply({**present, "applications": _with_traffic(present["applications"], traffic)})
        _say("", traffic)


def _given(settings: ServingSettings) -> set[str]:
    """Names of the settings that differ from the defaults."""
    default = ServingSettings()
    return {name for name in ServingSettings.model_fields if getattr(settings, name) != getattr(default, name)}


def _check_http(running: Mapping[str, Any], settings: ServingSettings, given: Collection[str]) -> None:
    """Raises `SettingsError` if given settings do not fit the options with which Serve runs: it would ignore them."""
    wanted = _http_options(settings)
    differ = {n: running[n] for n in ("host", "port") if n in given and n in running and running[n] != wanted[n]}
    seconds = running.get("request_timeout_s")
    if seconds and "timeout_s" in given and wanted["request_timeout_s"] > seconds:
        differ["timeout_s"] = seconds - 5
    if differ:
        asked = ", ".join(f"serving.{n}={getattr(settings, n)}" for n in differ)
        runs = ", ".join(f"{name} {value}" for name, value in differ.items())
        raise SettingsError(f"{asked}: Serve runs with {runs}, which it keeps until `serve shutdown` ends it")


def _ingress_settings(present: ServingSettings, settings: ServingSettings) -> ServingSettings:
    """The settings of an ingress that is there, with those that are given; says what changes, and what does not."""
    given = _given(settings) | {"insecure"}  # whether keys are asked for is never left as it was by silence
    now = present.model_copy(update={name: getattr(settings, name) for name in given})
    for name in _OF_INGRESS:
        before, after = getattr(present, name), getattr(now, name)
        if after != before:
            say(f"[serve]  the ingress has serving.{name}={after} from now on, before {before}")
        elif after != getattr(settings, name):
            say(f"[serve]  the ingress keeps serving.{name}={after}")
    return now


def _say(what: str, traffic: JsonObject) -> None:
    say(f"[serve]  {what}shares {traffic['versions']}, shadow {traffic['shadow'] or 'none'}")


def _traffic(config: JsonObject) -> JsonObject:
    for application in config["applications"]:
        for deployment in application.get("deployments", ()):
            if application["name"] == INGRESS and deployment.get("user_config"):
                return copy.deepcopy(deployment["user_config"])
    return {"versions": {}, "shadow": []}


def _with_traffic(applications: list[JsonObject], traffic: JsonObject) -> list[JsonObject]:
    return [
        {**a, "deployments": [{"name": INGRESS, "user_config": traffic}]} if a["name"] == INGRESS else a
        for a in applications
    ]
