"""The main job as a user submits it to a running cluster of several nodes: uploaded, without a run, nothing made."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import standin_llm
import torch
from node_helpers import several_nodes, wait_for
from prometheus_helpers import needs_prometheus, panels, scraping
from small_world import WORLD
from standin_llm import StandinConfig

from gubs.artifacts import Run
from gubs.ufm.monitor import read_metrics

REPO = Path(__file__).resolve().parent.parent.parent
DASHBOARD = REPO / "cluster" / "grafana" / "gubs.json"
ROWS = ("Data and LLM calls", "Training", "GPUs and nodes")
RAY = str(Path(sys.executable).parent / "ray")
PATIENCE = 500
"""Seconds for what takes a tenth of them on a quiet machine."""
SMALL = [
    *WORLD,
    "render.max_seconds=2",
    "ufm.model.lessons=0",
    "ufm.sft.min_steps=4",
    "splits.ugm_users=12",
    "ugm.author=both",
    "ugm.groups=2",
    "ugm.top=6",
    "ugm.min_matched=1",
    "llm.endpoints.default.model=m",
    "llm.actors=3",
    "llm.spread=true",
    "ufm.grpo.tasks=[sequential,sequential,click]",
    "ufm.grpo.steps=2",  # of the sequential task, and one of the click task
    "ufm.grpo.checkpoint.every=1",
    "ufm.grpo.prompts=4",
    "evaluate.items=8",
    "evaluate.bootstrap=20",
    "evaluate.sasrec.epochs=1",
]
MADE = ["raw", "truth", "videos", "ifvr", "frames", "profiles", "ugm", "labels", "sft", "sft_model"]
"""What the main job needs before it judges the policy at the start, trains, and judges again."""


@dataclass
class Finished:
    """The main job, after its end."""

    run: Run
    settings: list[str]
    exit_code: int
    said: str
    refused: subprocess.CompletedProcess[str]
    """A job with a setting that does not exist."""
    drawn: dict[str, list[str]] | None
    """Panel of the dashboard -> its expressions without data; None without Prometheus."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    """On a cluster that loses a worker node while frames are decoded, one with calls of the UGM in flight, and the one
    that trains, after its first step.
    """
    folder = tmp_path_factory.mktemp("main")
    run, log = Run(folder / "home" / "runs" / "demo-synthetic"), folder / "job.log"
    for part in ("gubs", "ray_jobs"):
        shutil.copytree(REPO / part, folder / "upload" / part)
    with (
        pytest.MonkeyPatch.context() as environment,
        standin_llm.running(StandinConfig(median_s=2.0, sigma=0.2)) as llm,
        several_nodes(environment) as nodes,
        scraping(nodes.address, folder) as prometheus,
    ):
        settings = [*SMALL, f"llm.endpoints.default.base_url={llm}/v1"]
        submit = [RAY, "job", "submit", "--address", nodes.address, "--working-dir", str(folder / "upload")]
        submit += ["--runtime-env-json", json.dumps({"env_vars": {"GUBS_HOME": str(folder / "home")}})]
        env = {**os.environ, "RAY_ADDRESS": ""}
        wrong = [*submit, "--", "python", "ray_jobs/build_ifvr.py", "no_such_setting=1"]
        refused = subprocess.run(wrong, capture_output=True, text=True, timeout=PATIENCE, env=env)
        command = [*submit, "--", "python", "ray_jobs/train_grpo.py", *settings]
        with log.open("wb") as out:
            job = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        try:
            nodes.lose("MapWorker(MapBatches(DecodeWorker))", PATIENCE, job)
            wait_for(lambda: job.poll() is not None or calls_in_flight(llm), PATIENCE, "calls of the UGM")
            nodes.lose("ray::ClientActor", PATIENCE, job)
            steps = Path(run.path("grpo.partial"))
            wait_for(lambda: job.poll() is not None or read_metrics(steps), PATIENCE, "the first step")
            nodes.lose("ray::RayTrainWorker", PATIENCE, job)
            job.wait(timeout=PATIENCE)
        finally:
            job.kill()
        drawn = None
        if prometheus:
            shown = panels(DASHBOARD, *ROWS)
            drawn = {title: prometheus.without_data(expressions) for title, expressions in shown.items()}
    return Finished(run, settings, job.returncode, log.read_text(), refused, drawn)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_main_job_makes_what_is_missing_trains_judges_and_shows(finished):
    run, said = finished.run, finished.said
    assert finished.exit_code == 0, said[-5000:]
    made = said_of_stages(said, "done in")
    assert sorted(made[:-4]) == sorted(MADE)
    assert made[-4:] == ["eval-sft_model", "grpo", "eval-grpo", "bars"]
    for later, before in BEFORE.items():
        assert all(made.index(name) < made.index(later) for name in before), (later, made)
    assert set(made) == set(run.stages())
    assert run.artifact("grpo").table("steps")["step"].to_pylist() == [0, 1, 2]
    verdicts = run.artifact("frames").manifest.info["verdicts"]
    assert verdicts == {"ok": run.artifact("ifvr").manifest.tables["videos"].rows}, "no video went with the node"
    assert re.search(r"grpo as a filter, on the targets of \d+ test users", said)
    assert re.search(r"mean reward \(0-3\), calibrated: .*grpo \d\.\d\d, logistic \d.*, never skip \d", said)
    for page in ("training.html", "report.html"):
        assert Path(run.path(page)).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_is_there_is_used_and_never_silently_with_other_settings(finished):
    run = finished.run
    kept = {name: run.artifact(name).manifest.created for name in run.stages()}
    judged = {"eval-sft_model", "grpo", "eval-grpo"}
    for job, stages in (
        ("train_sft", {*MADE} - {"labels", "ugm"}),
        ("train_grpo", {*MADE} | judged | {"bars"}),
        ("evaluate", {*MADE} - {"sft", "ugm"} | judged | {"bars"}),
    ):
        again = _alone(job, finished)
        said = again.stdout + again.stderr
        assert again.returncode == 0, said[-3000:]
        assert set(said_of_stages(said, "current: ")) == stages, job
        assert said_of_stages(said, "done in") == [], job
    assert "Sequential task, natural mix" in said
    for row in ("grpo, filter", "SASRec", "logistic, as shown", "G-UBS (published)"):
        assert row in said, row
    refused = _alone("train_grpo", finished, "ufm.grpo.beta=0.5")
    assert refused.returncode == 4, refused.stderr[-3000:]
    for part in ("grpo is stale: ufm.grpo.beta=0.04, now 0.5", "`gubs grpo --force` remakes it", "another --run"):
        assert part in refused.stderr
    assert {name: run.artifact(name).manifest.created for name in run.stages()} == kept


@pytest.mark.slow
def test_a_wrong_setting_ends_a_job(finished):
    assert finished.refused.returncode != 0
    assert "unknown setting" in finished.refused.stdout + finished.refused.stderr


@pytest.mark.slow
@needs_prometheus
def test_every_panel_draws_what_the_job_did(finished):
    assert set(finished.drawn) >= {"Decoded videos per second", "Raw reward by role", "CPU utilisation"}
    without = {title for title, left in finished.drawn.items() if left}
    assert without == ({t for t in finished.drawn if t.startswith("GPU")} if not torch.cuda.is_available() else set())


BEFORE = {
    "videos": ["raw", "truth"],
    "ifvr": ["raw"],
    "frames": ["ifvr", "videos"],
    "profiles": ["ifvr"],
    "sft": ["ifvr", "profiles"],
    "labels": ["ifvr", "profiles"],
    "sft_model": ["sft", "frames"],
    "eval-sft_model": ["sft_model", "labels"],
    "ugm": ["ifvr", "profiles"],
    "grpo": ["sft_model", "labels", "ugm"],
    "eval-grpo": ["grpo"],
}


def said_of_stages(log: str, what: str) -> list[str]:
    """The stages of which a log says this, in order; the base model, made once per machine, is none."""
    names = re.findall(rf"^(?:.* )?\[(\S+)\] +{re.escape(what)}", log, re.MULTILINE)
    return [n for n in names if n != "model"]


def calls_in_flight(llm: str) -> int:
    with urllib.request.urlopen(f"{llm}/stats", timeout=30) as response:
        return json.load(response)["in_flight"]


def _alone(job: str, finished: Finished, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A job on a cluster of its own, with the settings of the run."""
    command = [sys.executable, f"ray_jobs/{job}.py", "--run", finished.run.uri, *finished.settings, *overrides]
    env = {**os.environ, "RAY_ADDRESS": ""}
    return subprocess.run(command, cwd=REPO, env=env, text=True, capture_output=True, timeout=200)
