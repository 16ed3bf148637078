"""A service on a laptop, from `gubs serve` to Ctrl-C: what it prints works, Ray asks for its token, the checked-in
Serve config deploys, and each admin command does what it says.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import yaml
from laptop import REPO, START_S, Person, serving
from node_helpers import wait_for
from serving_helpers import make_filter

from gubs.ray_runtime import free_port
from gubs.serving.keys import add_key
from gubs.serving.shadow import read_log

pytestmark = pytest.mark.engine
FIRST, SECOND = "filter-version-filter", "filter-version-second"
GOOD = {"user": {"id": "u0"}, "candidates": [{"id": "v1"}, {"id": "v2"}]}


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """With a filter that drops cars, and a log that is written at the end only."""
    folder = tmp_path_factory.mktemp("laptop")
    make_filter(folder / "run")
    with serving(folder, "--run", str(folder / "run"), f"serving.port={free_port()}", *log_at_the_end(folder)) as it:
        it.log = str(folder / "decisions")
        yield it


def log_at_the_end(folder: Path) -> list[str]:
    return [f"serving.log_dir={folder / 'decisions'}", "serving.log_every_s=3600"]


@pytest.fixture(scope="module")
def person(laptop):
    it = Person(laptop.dashboard, laptop.token)
    yield it
    it.leaves()


def shell(line: str) -> str:
    """What a command prints; it has to succeed."""
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl on this machine")
def test_the_printed_curl_line_works_as_printed(laptop):
    results = json.loads(shell(laptop.curl))["results"]
    assert [(r["id"], r["decision"]) for r in results] == [("v0", "drop"), ("v1", "keep")]
    key = re.search(r" -H 'Authorization: Bearer gubs_[^']+'", laptop.curl)[0]
    tell = " -s -w ' %{http_code}'"
    assert shell(laptop.curl + tell).endswith("200")
    assert shell(laptop.curl.replace(key, "") + tell).endswith("401")


def test_the_dashboard_answers_only_with_the_clusters_token(laptop):
    """Whoever may submit a job runs any code there."""
    jobs = f"{laptop.dashboard}/api/jobs/"
    job = {"entrypoint": "true"}
    for path in (jobs, f"{laptop.dashboard}/api/serve/applications/"):
        assert httpx.get(path).status_code == 401
        assert httpx.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 403
    assert httpx.post(jobs, json=job).status_code == 401
    listed = httpx.get(jobs, headers={"Authorization": f"Bearer {laptop.token}"})
    assert listed.status_code == 200
    assert ["serve_ufm.py" in j["entrypoint"] for j in listed.json()] == [True], "gubs' own job, and no other"


def edited(folder: Path, port: int, first: str, second: str) -> str:
    """cluster/serve.yaml with what documentation says to fill in, this machine's places, and a second version."""
    text = (REPO / "cluster" / "serve.yaml").read_text()
    for old, new in {
        "filter-0123456789abcdef": FIRST,
        "/shared/runs/production/filter": first,
        "/shared/keys": str(folder),
        "log_dir: /shared/decisions": f"log_dir: {folder / 'log'}\n        log_every_s: 0.3",
        "gpus: true": "gpus: false",
        "port: 8000": f"port: {port}",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    config = yaml.safe_load(text)
    version = config["applications"][0]
    config["applications"].insert(1, version | {"name": SECOND, "args": version["args"] | {"uri": second}})
    config["applications"][-1]["deployments"][0]["user_config"]["versions"][SECOND] = 0.0
    return yaml.safe_dump(config)


@pytest.fixture(scope="module")
def service(laptop, person, tmp_path_factory):
    """Two versions from the checked-in config, the second without requests; it drops pets."""
    folder = tmp_path_factory.mktemp("cluster")
    key, port = add_key(folder / "keys.json", "tests", 10**7), int(re.search(r"curl \S+:(\d+)/", laptop.curl)[1])
    filters = [make_filter(folder / "run"), make_filter(folder / "run", name="second", skip_prompt="pets")]
    (folder / "serve.yaml").write_text(edited(folder, port, *filters))
    command = [str(Path(sys.executable).parent / "serve"), "deploy", str(folder / "serve.yaml")]
    done = subprocess.run(
        [*command, "-a", laptop.dashboard], env=person.environment, capture_output=True, text=True, timeout=START_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=20)
    up = lambda: set(states(person).values()) == {"RUNNING"} and SECOND in states(person)  # noqa: E731
    wait_for(up, START_S, "both versions", every_s=0.5)
    with client:
        yield SimpleNamespace(client=client, log=str(folder / "log"), keys=folder / "keys.json")


def states(person) -> dict[str, str]:
    return json.loads(person.types("serve", "status", "--json"))["status"]


def traffic(service) -> dict[str, tuple[float, bool]]:
    """Version -> share, shadow."""
    return {m["app"]: (m["weight"], m["shadow"]) for m in service.client.get("/v1/models").json()}


def versions(service, count=24) -> list[str]:
    """The version that answers each of several users."""
    bodies = [{**GOOD, "user": {"profile": {"age": 20 + i}}} for i in range(count)]
    answers = [service.client.post("/v1/filter", json=body).json() for body in bodies]
    for answer in answers:
        kept = ["keep", "drop"] if answer["model"]["name"] == "run-cars" else ["drop", "keep"]
        assert [r["decision"] for r in answer["results"]] == kept
    return [f"filter-{answer['model']['version']}" for answer in answers]


def test_the_checked_in_serve_config_deploys(service, person):
    assert traffic(service) == {FIRST: (1.0, False), SECOND: (0.0, False)}
    assert set(versions(service, 8)) == {FIRST}
    assert httpx.post(f"{service.client.base_url}/v1/filter", json=GOOD).status_code == 401
    printed = person.types("serve", "status")
    assert f"{FIRST} RUNNING share 1" in printed
    assert f"{SECOND} RUNNING share 0" in printed


def test_an_ingress_that_is_replaced_writes_the_rest_of_its_log(laptop, service):
    """`gubs serve` started it, and the checked-in config has other settings."""
    logged = lambda: {r["video_id"] for r in read_log(laptop.log).to_pylist()}  # noqa: E731
    wait_for(lambda: logged() == {"v0", "v1"}, 60, "the decisions about the printed curl line", every_s=0.2)


def test_split_divides_the_users(service, person):
    printed = person.types("serve", "split", f"{FIRST}=60", f"{SECOND}=40")
    assert f"shares {{'{FIRST}': 60.0, '{SECOND}': 40.0}}, shadow none" in printed
    assert traffic(service) == {FIRST: (60.0, False), SECOND: (40.0, False)}
    chosen = versions(service)
    assert min(chosen.count(FIRST), chosen.count(SECOND)) >= 6
    assert versions(service) == chosen, "a user stays with a version"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["split", f"{FIRST}=1", "filter-x=1"], "filter-x is not deployed (deployed: "),
        (["split", FIRST], f"'{FIRST}' is not of the form APP=SHARE"),
        (["split", f"{FIRST}=much"], "is not of the form APP=SHARE"),
        (["split", f"{FIRST}=0", f"{SECOND}=0"], "some version needs a share above 0"),
        (["split", f"{FIRST}=2", f"{SECOND}=-1"], f"{SECOND}: a share is a number from 0, not -1"),
        (["split", f"{FIRST}=1", f"{SECOND}=nan"], f"{SECOND}: a share is a number from 0, not nan"),
        (["split", f"{FIRST}=inf", f"{SECOND}=1"], f"{FIRST}: a share is a number from 0, not inf"),
        (["split", f"{FIRST}=1", f"{FIRST}=2"], f"{FIRST} is named twice"),
        (["shadow", "filter-x"], "filter-x is not deployed"),
        (["promote", "filter-x"], "filter-x is not deployed"),
        (["remove", "filter-x"], "filter-x is not deployed"),
        (["shadow", "ingress"], "ingress is not deployed"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_names_and_shares_are_refused(service, person, words, says):
    before = traffic(service)
    assert says in person.types("serve", *words, code=2)
    assert traffic(service) == before


def test_shadow_asks_a_version_beside_the_one_that_acts(service, person):
    person.types("serve", "promote", FIRST)
    printed = person.types("serve", "shadow", SECOND)
    assert f"shadow ['{SECOND}']" in printed
    assert traffic(service) == {FIRST: (1.0, False), SECOND: (0.0, True)}
    answer = service.client.post("/v1/filter", json={**GOOD, "request_id": "shadowed"}).json()
    assert [r["decision"] for r in answer["results"]] == ["keep", "drop"], "the first version's"

    def logged():
        rows = [r for r in read_log(service.log).to_pylist() if r["request_id"] == "shadowed"]
        return {(r["app"], r["acted"], r["video_id"]): r["decision"] for r in rows}

    wait_for(lambda: len(logged()) == 4, 60, "the log", every_s=0.1)
    assert {k: v for k, v in logged().items() if k[0] == SECOND} == {
        (SECOND, False, "v1"): "drop",
        (SECOND, False, "v2"): "keep",
    }
    assert "shadow none" in person.types("serve", "shadow", SECOND, "--off")
    assert traffic(service)[SECOND] == (0.0, False)


def test_promote_gives_a_version_all_requests(service, person):
    printed = person.types("serve", "promote", SECOND)
    assert f"shares {{'{FIRST}': 0.0, '{SECOND}': 1.0}}" in printed
    assert set(versions(service)) == {SECOND}
    assert "still gets requests" in person.types("serve", "remove", SECOND, code=2)
    assert f"{FIRST} is gone" in person.types("serve", "remove", FIRST)
    assert traffic(service) == {SECOND: (1.0, False)}


def test_a_job_deploys_a_version_beside_the_one_that_serves(laptop, service, person, tmp_path):
    make_filter(tmp_path / "run")
    address = [f"serving.port={httpx.URL(service.client.base_url).port}", f"serving.keys_file={service.keys}"]
    address += log_at_the_end(Path(laptop.log).parent)
    command = [sys.executable, "-m", "gubs.cli", "submit", "serve_ufm", "--", "--run", str(tmp_path / "run"), *address]
    env = {**laptop.environment, **person.environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0, done.stderr[-4000:]
    assert traffic(service) == {SECOND: (1.0, False), FIRST: (0.0, False)}, "without requests until somebody says so"
    assert set(versions(service, 8)) == {SECOND}


def test_ctrl_c_ends_the_service_and_its_cluster(laptop, service):
    """The last test here: what comes after it has no service."""
    assert service.client.post("/v1/filter", json={**GOOD, "request_id": "last"}).status_code == 200
    cluster = psutil.Process(laptop.process.pid).children(recursive=True)
    assert any("raylet" in " ".join(p.cmdline()) for p in cluster)
    assert laptop.interrupt() == 0, laptop.messages[-2000:]
    assert not [p for p in cluster if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert sum(r["request_id"] == "last" for r in read_log(laptop.log).to_pylist()) == 2, "also what came last"
