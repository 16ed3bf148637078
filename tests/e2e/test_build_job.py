"""The data's journey as a user runs it: one command, and the same as a Ray job on a cluster."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gubs.artifacts import Run

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
