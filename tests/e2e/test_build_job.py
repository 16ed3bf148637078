"""The data's journey as a user runs it: one command, and the same as a Ray job on a cluster."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gubs.artifacts import Run
from gubs.ray_runtime import local_head

pytestmark = pytest.mark.slow
SMALL = ["users=80", "videos=40", "views_per_user=30", "max_seconds=2", "min_video_views=3"]
STAGES = ["frames", "ifvr", "raw", "truth", "videos"]
REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("job") / "r")


def test_script_alone_starts_a_cluster_of_its_own(run):
    command = [sys.executable, "ray_jobs/build_ifvr.py", "--run", run.uri, *SMALL]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert run.stages() == STAGES
    verdicts = run.artifact("frames").manifest.info["verdicts"]
    assert verdicts == {"ok": run.artifact("ifvr").manifest.tables["videos"].rows}
    assert run.fs.size(run.path("show.html")) > 10_000


def test_submit_starts_a_head_with_a_token_and_leaves_nothing_behind(run):
    """After the test above: the job finds every stage current."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "gubs.cli", "submit", "build_ifvr", "--run", run.uri, *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"\[(\S+)\] +current: ", done.stdout + done.stderr)) == STAGES
    port = int(re.search(r"dashboard at http://127\.0\.0\.1:(\d+)", done.stderr)[1])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the head is gone with the command"


def test_ray_job_submit_on_a_running_cluster(tmp_path):
    with local_head(num_cpus=2) as address:
        command = [
            str(Path(sys.executable).parent / "ray"),
            "job",
            "submit",
            "--address",
            address,
            "--working-dir",
            str(tmp_path / "upload"),
            "--",
        ]
        command += ["python", "ray_jobs/build_ifvr.py", "--run", str(tmp_path / "r"), *SMALL]
        for part in ("gubs", "ray_jobs"):
            shutil.copytree(REPO / part, tmp_path / "upload" / part)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=280, env={**os.environ, "RAY_ADDRESS": ""}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert Run(tmp_path / "r").stages() == STAGES
        bad = subprocess.run(
            [*command[:-1], "no_such_setting=1"],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "RAY_ADDRESS": ""},
        )
        assert bad.returncode != 0
        assert "unknown setting" in bad.stdout + bad.stderr
