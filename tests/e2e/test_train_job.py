"""The main job as a user submits it to a running cluster: uploaded, without a run, nothing made before."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gubs.artifacts import Run
from gubs.ray_runtime import local_head

REPO = Path(__file__).resolve().parent.parent.parent
SMALL = [
    "synthetic.users=60",
    "synthetic.videos=40",
    "views_per_user=24",
    "exposures_per_user=24",
    "filters.min_video_views=2",
    "filters.min_user_exposures=8",
    "splits.test_users=8",
    "splits.click_targets=6",
    "render.max_seconds=2",
    "sft_click_users=10",
    "ufm.model.lessons=0",
    "ufm.sft.min_steps=4",
    "ufm.grpo.groups=false",
    "ufm.grpo.steps=2",
    "ufm.grpo.prompts=4",
    "evaluate.items=8",
    "evaluate.bootstrap=20",
]
MADE = ["raw", "truth", "videos", "ifvr", "frames", "profiles", "labels", "sft", "sft_model"]
"""What the main job needs before it judges the policy at the start, trains, and judges again."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_main_job_makes_what_is_missing_trains_judges_and_shows(tmp_path):
    with local_head(num_cpus=2) as address:
        for part in ("gubs", "ray_jobs"):
            shutil.copytree(REPO / part, tmp_path / "upload" / part)
        command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address]
        command += ["--working-dir", str(tmp_path / "upload")]
        command += ["--runtime-env-json", json.dumps({"env_vars": {"GUBS_HOME": str(tmp_path / "home")}})]
        command += ["--", sys.executable, "ray_jobs/train_grpo.py", *SMALL]
        env = {**os.environ, "RAY_ADDRESS": ""}
        done = subprocess.run(command, capture_output=True, text=True, timeout=1400, env=env)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    run = Run(tmp_path / "home" / "runs" / "demo-synthetic")
    made = said_of_stages(said, "done in")
    assert sorted(made[:-3]) == sorted(MADE)
    assert made[-3:] == ["eval-sft_model", "grpo", "eval-grpo"]
    for later, before in BEFORE.items():
        assert all(made.index(name) < made.index(later) for name in before), (later, made)
    assert set(made) == set(run.stages())
    assert run.artifact("grpo").table("steps").num_rows == 2
    assert re.search(r"grpo as a filter, greedy, on the targets of \d+ test users", said)
    assert (tmp_path / "home" / "runs" / "demo-synthetic" / "training.html").stat().st_size > 10_000
    kept = {name: run.artifact(name).manifest.created for name in run.stages()}
    judged = {"eval-sft_model", "grpo", "eval-grpo"}
    for job, stages in (
        ("train_sft", {*MADE} - {"labels"}),
        ("train_grpo", {*MADE} | judged),
        ("evaluate", {*MADE} - {"sft"} | judged),
    ):
        again = _alone(job, run, env)
        said = again.stdout + again.stderr
        assert again.returncode == 0, said[-3000:]
        assert sorted(said_of_stages(said, "current: ")) == sorted(stages), job
        assert said_of_stages(said, "done in") == [], job
    assert "Sequential task, natural mix" in said
    refused = _alone("train_grpo", run, env, "ufm.grpo.beta=0.5")
    assert refused.returncode == 4, refused.stderr[-3000:]
    for part in ("grpo is stale: ufm.grpo.beta=0.04, now 0.5", "`gubs grpo --force` remakes it", "another --run"):
        assert part in refused.stderr
    assert {name: run.artifact(name).manifest.created for name in run.stages()} == kept


BEFORE = {
    "videos": ["raw", "truth"],
    "ifvr": ["raw"],
    "frames": ["ifvr", "videos"],
    "profiles": ["ifvr"],
    "sft": ["ifvr", "profiles"],
    "labels": ["ifvr", "profiles"],
    "sft_model": ["sft", "frames"],
    "eval-sft_model": ["sft_model", "labels"],
    "grpo": ["sft_model", "labels"],
    "eval-grpo": ["grpo"],
}


def said_of_stages(log: str, what: str) -> list[str]:
    """The stages of which a log says this, in order; the base model, made once per machine, is none."""
    names = re.findall(rf"^(?:.* )?\[(\S+)\] +{re.escape(what)}", log, re.MULTILINE)
    return [n for n in names if n != "model"]


def _alone(job: str, run: Run, env: dict[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    """A job on a cluster of its own, with the settings of the run."""
    command = [sys.executable, f"ray_jobs/{job}.py", "--run", run.uri, *SMALL, *overrides]
    return subprocess.run(command, cwd=REPO, env=env, text=True, capture_output=True, timeout=200)
