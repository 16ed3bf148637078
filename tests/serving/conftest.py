"""The service with fake engines, deployed once for all files here."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import fake_replica
import httpx
import pytest
import serving_helpers
from fake_replica import application
from ray import cloudpickle, serve
from serving_helpers import make_filter

from gubs.ray_runtime import free_port
from gubs.serving.deployment import INGRESS, build_ingress
from gubs.serving.guard import CALLBACK, CALLBACK_VARIABLE
from gubs.serving.keys import add_key
from gubs.serving.settings import ServingSettings

GOOD = {"user": {"id": "u0"}, "candidates": [{"id": "v1"}, {"id": "v2"}]}


class Service:
    """The deployed service, and what the tests need around it."""

    def __init__(self, folder):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.key = add_key(folder / "keys.json", "tests", 10**7)
        self.slow_key = add_key(folder / "keys.json", "slow", 10)
        self.settings = ServingSettings(
            keys_file=str(folder / "keys.json"),
            log_dir=str(folder / "log"),
            log_every_s=1.0,
            max_ongoing=4,
            max_queued=4,
            timeout_s=6.0,
            chunk=25,
        )
        self.filter = make_filter(folder / "run")
        self.headers = {"Authorization": f"Bearer {self.key}"}

    def deploy(self, name, **how):
        serve.run(application(self.filter, self.settings, **how), name=name, route_prefix=None)

    def traffic(self, shadow=(), **versions):
        """New shares, as `reconfigure` gets them from Serve; that takes seconds, and the e2e test goes that way."""
        config = {"versions": {n.replace("_", "-"): w for n, w in versions.items()}, "shadow": list(shadow)}
        call = lambda: serve.get_app_handle(INGRESS).reconfigure.remote(config).result(timeout_s=20)  # noqa: E731
        with ThreadPoolExecutor(1) as pool:  # a browser test has an event loop in its thread, which Serve refuses
            pool.submit(call).result()

    def ask(self, body=GOOD, headers=None, path="/v1/filter", **more):
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = self.headers if headers is None else headers
        return httpx.post(self.url + path, content=content, headers=headers, timeout=20, **more)

    def work(self, app):
        return serve.get_app_handle(app).work.remote().result(timeout_s=20)

    def peak(self, app):
        return serve.get_app_handle(app).peak.remote().result(timeout_s=20)


@pytest.fixture(scope="package")
def service(ray_local, tmp_path_factory):
    assert os.environ[CALLBACK_VARIABLE] == CALLBACK, "conftest sets it before Ray starts"
    for module in (serving_helpers, fake_replica):
        cloudpickle.register_pickle_by_value(module)
    it = Service(tmp_path_factory.mktemp("service"))
    serve.start(http_options={"host": "127.0.0.1", "port": it.port, "request_timeout_s": 10})
    it.deploy("filter-a")
    it.deploy("slow", seconds=0.4)
    serve.run(build_ingress({"settings": it.settings.model_dump(mode="json")}), name=INGRESS, route_prefix="/")
    yield it
    serve.shutdown()
