"""Deploys the service with fake engines on a running cluster, and leaves it there.

python deploy_fake.py ADDRESS PORT FILTER SETTINGS

Each node with the resource `engine` gets an engine replica, each with `ingress` an ingress replica.
"""

import json
import sys
import time
from typing import Any

import fake_replica
import ray
import serving_helpers
from fake_replica import application
from ray import cloudpickle, serve

from gubs.serving.deployment import INGRESS, Ingress
from gubs.serving.settings import ServingSettings

ENGINES = "engines"
SECONDS = 0.3
"""What an answer takes."""


def main(address: str, port: str, filter_: str, settings: str) -> None:
    for module in (serving_helpers, fake_replica):
        cloudpickle.register_pickle_by_value(module)
    ray.init(address, log_to_driver=False, namespace="serve")
    serve.start(http_options={"host": "127.0.0.1", "port": int(port), "request_timeout_s": 60})
    chosen = ServingSettings(**json.loads(settings))
    engines = application(filter_, chosen, seconds=SECONDS, replicas=_nodes("engine"), resources={"engine": 1})
    ingress: Any = Ingress
    ingress = ingress.options(
        num_replicas=_nodes("ingress"), ray_actor_options={"num_cpus": 0, "resources": {"ingress": 1}}
    ).bind(json.loads(settings), {ENGINES: 1.0})
    serve.run_many([serve.RunTarget(engines, ENGINES, None), serve.RunTarget(ingress, INGRESS, "/")])
    while len(proxies := serve.status().proxies) < len(ray.nodes()) or set(proxies.values()) != {"HEALTHY"}:
        time.sleep(0.2)


def _nodes(resource: str) -> int:
    return int(ray.cluster_resources()[resource])


if __name__ == "__main__":
    main(*sys.argv[1:])
