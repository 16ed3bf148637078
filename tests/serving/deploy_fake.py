"""Deploys the service with fake engines on a running cluster, a part at a time, and leaves it there.

python deploy_fake.py ADDRESS ingress PORT SETTINGS          the proxy and the ingress, where the driver's node is alone
python deploy_fake.py ADDRESS engines FILTER SETTINGS        a replica for each node with the resource `engine`
"""

import json
import sys

import fake_replica
import ray
import serving_helpers
from fake_replica import application
from ray import cloudpickle, serve

from gubs.serving.deployment import INGRESS, build_ingress
from gubs.serving.settings import ServingSettings

ENGINES = "engines"
SECONDS = 0.3
"""What an answer takes."""


def main(address: str, part: str, where: str, settings: str) -> None:
    for module in (serving_helpers, fake_replica):
        cloudpickle.register_pickle_by_value(module)
    ray.init(address, log_to_driver=False, namespace="serve")
    if part == "ingress":
        serve.start(http_options={"host": "127.0.0.1", "port": int(where), "request_timeout_s": 60})
        serve.run(build_ingress({"settings": json.loads(settings)}), name=INGRESS, route_prefix="/")
        return
    nodes = int(ray.cluster_resources()["engine"])
    chosen = ServingSettings(**json.loads(settings))
    engines = application(where, chosen, seconds=SECONDS, replicas=nodes, resources={"engine": 1})
    serve.run(engines, name=ENGINES, route_prefix=None)
    traffic = {"versions": {ENGINES: 1.0}, "shadow": []}
    serve.get_app_handle(INGRESS).reconfigure.remote(traffic).result(timeout_s=20)


if __name__ == "__main__":
    main(*sys.argv[1:])
