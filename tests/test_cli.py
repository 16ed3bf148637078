import json
import signal
import subprocess
import sys

import pytest

from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data.build import build_stage
from gubs.data.ingest import ingest_stage
from gubs.pipeline import open_run


def gubs(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "gubs.cli", *map(str, args)], capture_output=True, text=True, timeout=120, cwd=cwd
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("cli") / "r")
    settings = load_settings("tiny", ["users=60", "videos=30"])
    ingest_stage(run, settings)
    build_stage(run, settings)
    return run


def test_help_lists_every_job_with_a_sentence():
    text = gubs("--help").stdout
    for command in (
        "demo",
        "synth",
        "ingest",
        "build",
        "frames",
        "submit",
        "model",
        "sft",
        "grpo",
        "judge",
        "plan",
        "report",
        "show",
        "status",
        "probe",
        "doctor",
        "settings",
    ):
        assert f" {command} " in text
    assert "Exit codes" in text


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["build", "usrs=3"], 2, "did you mean 'synthetic.users'"),
        (["build", "--preset", "tinny"], 2, "unknown preset"),
        (["bild"], 2, "Did you mean 'build'"),
        (["ingest", "--run", "r", "source.kind=movielens", "source.path=nowhere"], 3, "nowhere"),
        (["build", "--run", "no-such-run"], 4, "no such artifact"),
        (["submit", "no_such_job"], 5, "build_ifvr"),
        (["demo", "grpo.stepps=3"], 2, "did you mean 'ufm.grpo.steps'"),
        (["sft", "--run", "no-such-run"], 4, "no such artifact"),
        (["judge", "sft_model", "--run", "no-such-run"], 4, "no such artifact"),
        (["report", "no-such-run"], 4, "gubs judge"),
        (["plan", "--preset", "paper", "--gpus", "3"], 2, "cannot be dealt evenly"),
    ],
)
def test_errors_are_one_message_and_a_meaningful_exit_code(args, code, message, tmp_path):
    done = gubs(*args, cwd=tmp_path)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_finished_stage_says_so_and_does_nothing(run):
    before = run.fs.stat(run.path("ifvr", "manifest.json"))["mtime"]
    done = gubs("build", "--run", run.uri, "users=60", "videos=30")
    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stderr
    assert run.fs.stat(run.path("ifvr", "manifest.json"))["mtime"] == before
    assert gubs("build", "--run", run.uri, "users=60", "videos=30", "--force").returncode == 0
    assert run.fs.stat(run.path("ifvr", "manifest.json"))["mtime"] > before


def test_other_settings_do_not_overwrite_silently(run):
    done = gubs("build", "--run", run.uri, "users=60", "videos=30", "min_video_views=1")
    assert done.returncode == 4
    assert "--force" in done.stderr


def test_json_goes_to_stdout_alone(run):
    stages = json.loads(gubs("status", run.uri, "--json").stdout)
    assert {m["stage"] for m in stages} == {"raw", "truth", "ifvr"}
    resolved = json.loads(gubs("settings", "--json", "seed=9").stdout)
    assert resolved["seed"] == 9


def test_doctor_has_a_line_for_everything():
    done = gubs("doctor", "--json")
    found = {f["name"]: f for f in json.loads(done.stdout)}
    assert {"Python", "ray", "torch", "vLLM", "decord", "ffmpeg", "/dev/shm", "disk", "memory", "GPUs"} <= set(found)
    assert all(f["ok"] or f["remedy"] for f in found.values())
    assert done.returncode == (0 if all(f["ok"] for f in found.values()) else 5)


def test_relative_runs_stand_where_results_outlive_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_run("runs/x").root == str(tmp_path / "runs/x")
    monkeypatch.setenv("GUBS_HOME", "/data")
    assert open_run("runs/x").root == "/data/runs/x"
    assert open_run("/abs/x").root == "/abs/x"
    monkeypatch.delenv("GUBS_HOME")
    upload = tmp_path / "runtime_resources" / "working_dir_files" / "x"
    upload.mkdir(parents=True)
    monkeypatch.chdir(upload)
    monkeypatch.setenv("HOME", "/home/someone")
    assert open_run("runs/x").root == "/home/someone/gubs/runs/x"


def test_plan_prints_the_sum_and_refuses_what_cannot_fit():
    fits = gubs("plan", "--preset", "paper", "--gpu-gib", "80")
    assert fits.returncode == 0, fits.stderr
    assert "8.29 B parameters" in fits.stdout
    assert "masters, Adam 23.2 GiB" in fits.stdout
    small = gubs("plan", "--preset", "paper", "--gpu-gib", "40")
    assert small.returncode == 5
    assert "DOES NOT FIT" in small.stdout
    told = json.loads(gubs("plan", "--preset", "paper", "--json").stdout)
    assert [p["title"] for p in told] == ["SFT", "GA-GRPO"]
    assert not told[0]["problems"]


def test_missing_inputs_are_named_and_what_is_there_is_kept(run, monkeypatch, capsys):
    from gubs import pipeline

    made = []
    for name in ("build_ifvr", "ugm", "teach", "train_sft"):
        monkeypatch.setattr(pipeline, name, lambda *_, name=name: made.append(name))
    pipeline.prepare(run, load_settings("tiny"))
    assert made == ["build_ifvr", "ugm", "teach", "train_sft"]
    said = " ".join(capsys.readouterr().err.split())
    assert "has ifvr" in said
    assert "has no frames, ugm, sft, labels, sft_model: made first" in said
    made.clear()
    pipeline.prepare(run, load_settings("tiny", ["ufm.grpo.groups=false", "ufm.grpo.start=base"]))
    assert made == ["build_ifvr", "teach"]


SLEEPER = """
import time
from gubs import cli
def app(args):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("stopped what was started", flush=True)
cli.app = app
cli.main([])
"""


def test_a_command_that_is_told_to_end_ends_what_it_started():
    """A head node started by `gubs submit`, say: Python's own answer to SIGTERM runs no `finally`."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert said == "stopped what was started\n"
    assert process.returncode == 128 + signal.SIGTERM
