"""From a run to a service with a real engine: both modes, batch and HTTP alike, a killed engine."""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from node_helpers import several_nodes, wait_for
from prometheus_helpers import needs_prometheus, panels, scraping
from small_world import WORLD

from gubs.artifacts import Run
from gubs.cli import app
from gubs.data.ifvr import IFVR
from gubs.jobs import run_app
from gubs.ray_runtime import free_port
from gubs.records import Split, Task
from gubs.serving.client import Client
from gubs.serving.guard import LIMIT_VARIABLE
from gubs.serving.keys import add_key
from gubs.serving.settings import ServingSettings
from gubs.stages import FILTER

WINDOW = (5, 10, 15, 20, 30, 45)
"""Milliseconds; on a quiet machine several of them end between rendering and sending."""
REPO = Path(__file__).resolve().parent.parent.parent
DASHBOARD = REPO / "cluster" / "grafana" / "gubs.json"
SMALL = [
    *WORLD,
    "splits.ugm_users=24",
    "render.max_seconds=2",
    "ufm.model.lessons=200",
    "ufm.grpo.groups=false",
    "ufm.distil.enabled=true",
    "ufm.distil.items=24",
    "ufm.distil.samples=2",
    "ufm.distil.batch=8",
    "ufm.distil.epochs=1",
    "ufm.held_out=0.4",
    "serving.policy=base",
    "serving.score_gap=1",
]


def gubs(*arguments):
    """A command that starts Ray for itself."""
    command = [sys.executable, "-m", "gubs.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def here(capsys):
    """A command in this process: one that asks a cluster."""

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_app(app, [str(a) for a in arguments])
        printed = "".join(capsys.readouterr())
        assert not ended.value.code, printed[-4000:]
        return printed

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a filter, and a table that was filtered with it."""
    folder = tmp_path_factory.mktemp("serve")
    run = Run(folder / "run")
    gubs("build", "--run", run.uri, *SMALL)
    targets = IFVR(run).targets(Task.SEQUENTIAL, [Split.TEST])
    pairs = targets.select(["user_id", "video_id"]).slice(0, 20)
    pairs = pa.concat_tables([pairs, pa.table({"user_id": ["nobody"], "video_id": ["v0"]}).cast(pairs.schema)])
    pq.write_table(pairs, folder / "candidates.parquet")
    assert "1 unknown" in gubs("filter", folder / "candidates.parquet", "--run", run.uri, *SMALL)
    return run


@pytest.fixture(scope="module")
def drawn():
    """Panel -> its expressions without data, after the test of the service."""
    return {}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_run_to_a_service(run, tmp_path, here, monkeypatch, drawn):
    config = json.loads(Path(run.path(FILTER, "filter.json")).read_text())
    assert set(config["modes"]) == {"reason", "score"}
    held_out = run.artifact(FILTER).table("held_out")
    assert held_out.num_rows > 20
    folder = Path(run.uri).parent
    key, other = (add_key(tmp_path / "keys.json", name, 10**6) for name in ("test", "other"))
    port = free_port()
    settings = ServingSettings(keys_file=str(tmp_path / "keys.json"), port=port)
    served = [*SMALL, f"serving.port={port}", f"serving.keys_file={tmp_path / 'keys.json'}"]
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv(LIMIT_VARIABLE, str(settings.limits.body_mb))
    with several_nodes(monkeypatch) as nodes, Client(url, key, retries=20) as client:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", nodes.address)
        with scraping(nodes.address, tmp_path) as prometheus:
            here("submit", "serve_ufm", "--", "--run", run.uri, *served)
            user, video = _agrees_with_batch(client, folder)
            _is_not_upset_by_requests_that_end_early(client, run, url, key, user)
            _keeps_keys_apart(client, url, other, user, video)
            assert len(client.explain(user, video).frames) == 4
            _tells_what_cannot_be_shown(url, key, user)
            if prometheus:
                drawn |= {title: prometheus.without_data(e) for title, e in panels(DASHBOARD, "Filter").items()}
            _outlives_its_engine(client, user, video)


@pytest.mark.slow
@needs_prometheus
def test_every_panel_of_the_filter_draws_what_the_service_did(drawn):
    assert len(drawn) == 9
    assert not any(drawn.values()), drawn


def _agrees_with_batch(client, folder):
    """The same policy, greedy: the service says what the batch job wrote; returns a user and a video."""
    rows = pq.read_table(folder / "candidates.filtered").to_pylist()
    assert rows[-1]["error"] == "unknown"
    assert {r["error"] for r in rows} <= {None, "unknown", "unreadable"}
    answered = [r for r in rows if r["error"] is None]
    assert answered, "nothing was compared"
    for row in answered:
        (result,) = client.filter(row["user_id"], [row["video_id"]]).results
        assert result.skip_probability == pytest.approx(row["skip_probability"], abs=1e-3)
        assert (result.decision, result.reason or "") == (row["decision"], row["reason"] or "")
    by_user = [r["video_id"] for r in answered if r["user_id"] == answered[0]["user_id"]]
    scored = client.filter(answered[0]["user_id"], by_user, mode="score")
    assert [r.error for r in scored.results] == [None] * len(by_user)
    assert all(r.label_mass > 0 and r.reason is None for r in scored.results)
    assert scored.usage.answer_tokens == len(by_user), "one token each"
    return answered[0]["user_id"], answered[0]["video_id"]


def _is_not_upset_by_requests_that_end_early(client, run, url, key, user):
    """Between being rendered and being sent, their pictures are lost, and vLLM takes them for sent."""
    videos = run.artifact(FILTER).table("videos")["video_id"].to_pylist()
    body = {"user": {"id": user}, "mode": "score"}
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as impatient:
        for start in range(0, len(videos), 25):
            body["candidates"] = [{"id": video} for video in videos[start : start + 25]]
            codes = [impatient.post("/v1/filter", json={**body, "timeout_ms": t}).status_code for t in WINDOW]
            assert set(codes) <= {200, 504}
            answer = impatient.post("/v1/filter", json=body)
            assert answer.status_code == 200, answer.text
            assert not any(r["error"] for r in answer.json()["results"])
            impatient.post("/v1/filter", json={**body, "mode": "reason", "timeout_ms": WINDOW[-1]})
    # whoever has left, or was told that it takes too long, keeps the engine from nothing
    wait_for(lambda: [m.running for m in client.models()] == [0], 20, "the engine to drop what nobody waits for")


def _keeps_keys_apart(client, url, other, user, video):
    """What the engine has cached of a user's prompts tells nothing to another key: its first question finds nothing."""
    with Client(url, other, retries=20) as stranger:
        first, again = (stranger.filter(user, [video], mode="score").usage.cached_tokens for _ in range(2))
    assert client.filter(user, [video], mode="score").usage.cached_tokens > 0
    assert again > first == 0


def _tells_what_cannot_be_shown(url, key, user):
    body = {"user": {"id": user}, "candidates": [{"id": "new", "uri": "file:///etc/passwd"}]}
    answer = httpx.post(f"{url}/v1/filter", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30).json()
    assert answer["results"][0]["error"]["code"] == "pictures"


def _outlives_its_engine(client, user, video):
    """The engine's process is killed: requests are answered again, and none wrongly."""
    before = client.filter(user, [video], mode="score")
    wait_for(_engines, 400, "an engine")  # on a busy machine Serve may just be replacing one that answered too late
    (engine,) = _engines()
    engine.kill()
    began = time.monotonic()
    after = client.filter(user, [video], mode="score")
    print(f"answers again {time.monotonic() - began:.1f} s after the engine was killed")
    assert [r.decision for r in after.results] == [r.decision for r in before.results]


def _engines() -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline"])
    return [p for p in processes if "EngineCore" in " ".join(p.info["cmdline"] or [])]
