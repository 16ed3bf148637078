"""The command line: messages, exit codes, and what commands make or leave alone."""

import contextlib
import json
import signal
import subprocess
import sys

import pytest

from gubs import stages
from gubs.artifacts import Run, open_run
from gubs.cli import app
from gubs.config import load_settings
from gubs.jobs import run_app


def gubs(*args):
    """A command as a process of its own."""
    command = [sys.executable, "-m", "gubs.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def here(capsys):
    """A command in this process, which has imported everything; any error but an exit would come through."""

    def call(*args):
        capsys.readouterr()
        try:
            run_app(app, [str(a) for a in args])
        except SystemExit as e:
            code = int(e.code or 0)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, out, err)

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("cli") / "r")
    stages.make(["raw", "truth", "ifvr"], run, load_settings("tiny", ["users=60", "videos=30"]))
    return run


def test_help_lists_every_command():
    text = gubs("--help").stdout
    for command in (
        *("demo", "synth", "ingest", "build", "frames", "ugm", "teach", "groups", "annotate", "submit", "model"),
        *("sft", "grpo", "judge", "ablate", "plan", "report", "audit", "show", "status", "probe", "doctor", "settings"),
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
        (["ugm", "--dry-run", "--run", "no-such-run"], 4, "run `gubs build` first"),
        (["teach", "--dry-run", "--run", "no-such-run"], 4, "run `gubs build` first"),
        (["groups", "show", "no-such-run"], 4, "run `gubs ugm` first"),
        (["groups", "assign", "new.parquet", "--run", "no-such-run"], 4, "run `gubs ugm` first"),
        (["show", "no-such-run"], 4, "run `gubs synth` or `gubs ingest` first"),
        (["submit", "no_such_job"], 5, "build_ifvr"),
        (["demo", "grpo.stepps=3"], 2, "did you mean 'ufm.grpo.steps'"),
        (["demo", "ufm.evaluate.items=8"], 2, "did you mean 'evaluate.items'"),
        (["judge", "sft_model", "--run", "no-such-run"], 4, "run `gubs sft` first"),
        (["report", "no-such-run"], 4, "gubs judge"),
        (["report", "no-such-run", "--policy", "plain"], 4, "run `gubs judge plain` first"),
        (["evaluate", "sensitivity", "--run", "no-such-run"], 4, "run `gubs grpo` first"),
        (["plan", "--preset", "paper", "--gpus", "3"], 2, "cannot be divided evenly"),
        (["ablate", "T3"], 2, "there is no ablation 'T3'; there are T4, T5"),
        (["ablate", "rule", "--worlds", "0;1"], 2, "'0;1' is not of the form 0,1,2"),
        (
            ["ablate", "rule", "--worlds", "0", "1"],
            2,
            "'1' is not key=value; separate worlds and seeds by commas",
        ),
        (["ablate", "rule", "--run", "memory://r"], 2, "ablations need a path that all workers see"),
    ],
)
def test_errors_are_one_message_and_a_meaningful_exit_code(args, code, message, tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    done = here(*args)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_an_error_of_a_process_is_one_message_too(tmp_path):
    done = gubs("ingest", "--run", tmp_path / "r", "source.kind=movielens", "source.path=nowhere")
    assert done.returncode == 3
    assert "nowhere" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_finished_stage_is_reported_and_kept(run):
    before = run.fs.stat(run.path("ifvr", "manifest.json"))["mtime"]
    done = gubs("build", "--run", run.uri, "users=60", "videos=30")
    assert done.returncode == 0, done.stderr
    messages = " ".join(done.stderr.split())
    assert "[raw] current: 60 users, 30 videos" in messages
    assert "[ifvr] current: " in messages
    assert run.fs.stat(run.path("ifvr", "manifest.json"))["mtime"] == before
    assert gubs("build", "--run", run.uri, "users=60", "videos=30", "--force").returncode == 0
    assert run.fs.stat(run.path("ifvr", "manifest.json"))["mtime"] > before


def test_other_settings_do_not_overwrite_silently(run, here):
    done = here("build", "--run", run.uri, "users=60", "videos=30", "min_video_views=1")
    assert done.returncode == 4
    messages = " ".join(done.stderr.split())
    assert "ifvr is stale: filters.min_video_views=10, now 1." in messages
    assert "`gubs build --force`" in messages


def test_a_missing_stage_is_made_with_all_its_inputs(tmp_path):
    done = gubs("build", "--run", tmp_path / "new", "users=60", "videos=30")
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "new").stages() == ["ifvr", "raw"]


def test_status_lists_every_stage(run, here):
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in here("status", run.uri).stdout.splitlines()}
    assert lines["raw"][0] == lines["ifvr"][0] == "current"
    assert lines["raw"][1].startswith("60 users, 30 videos, ")
    assert lines["frames"] == ["missing", "`gubs frames` makes it"]
    other = here("status", run.uri, "users=60", "videos=30", "min_video_views=1").stdout
    assert "ifvr             stale    filters.min_video_views=10, now 1" in other


def test_json_goes_to_stdout_alone(run):
    states = json.loads(gubs("status", run.uri, "--json").stdout)
    assert {s["stage"] for s in states if s["status"] == "current"} == {"raw", "truth", "ifvr"}
    assert all((s["manifest"] is None) == (s["status"] == "missing") for s in states)
    resolved = json.loads(gubs("settings", "--json", "seed=9").stdout)
    assert resolved["seed"] == 9


def test_doctor_checks_everything():
    done = gubs("doctor", "--json")
    checks = {f["name"]: f for f in json.loads(done.stdout)}
    assert {"Python", "ray", "torch", "vLLM", "decord", "ffmpeg", "/dev/shm", "disk", "memory", "GPUs"} <= set(checks)
    assert all(f["ok"] or f["remedy"] for f in checks.values())
    assert done.returncode == (0 if all(f["ok"] for f in checks.values()) else 5)


def test_relative_runs_are_where_results_outlive_a_job(tmp_path, monkeypatch):
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


def test_plan_prints_the_sum_and_refuses_what_cannot_fit(here):
    fits = here("plan", "--preset", "paper", "--gpu-gib", "80")
    assert fits.returncode == 0, fits.stderr
    assert "8.29 B parameters" in fits.stdout
    assert "masters, Adam 23.2 GiB" in fits.stdout
    small = here("plan", "--preset", "paper", "--gpu-gib", "40")
    assert small.returncode == 5
    assert "DOES NOT FIT" in small.stdout
    plans = json.loads(here("plan", "--preset", "paper", "--json").stdout)
    assert [p["title"] for p in plans] == ["SFT", "GA-GRPO"]
    assert not plans[0]["problems"]


def test_missing_inputs_are_made_first_and_current_ones_kept(run, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(stages, "make_stage", lambda node, *_, **__: made.append(node.name))
    monkeypatch.setattr(stages, "_preflight", lambda *_: None)
    monkeypatch.setattr(stages, "ray_session", lambda _: contextlib.nullcontext())
    own = ["users=60", "videos=30"]
    stages.make([stages.GRPO], run, load_settings("tiny", own))
    assert set(made) == {"videos", "frames", "profiles", "ugm", "sft", "labels", "sft_model", "grpo"}
    for before, after in [("videos", "frames"), ("profiles", "ugm"), ("profiles", "sft"), ("sft", "sft_model")]:
        assert made.index(before) < made.index(after)
    assert made[-1] == "grpo"
    messages = " ".join(capsys.readouterr().err.split())
    assert all(f"[{name}] current: " in messages for name in ("raw", "truth", "ifvr"))
    made.clear()
    without = ["ufm.grpo.groups=false", "ufm.grpo.start=base", "teachers.profiles=false"]
    stages.make([stages.GRPO], run, load_settings("tiny", own + without))
    assert set(made) == {"videos", "frames", "labels", "grpo"}, "nothing is made for groups and SFT if they are off"


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


def test_a_command_that_gets_sigterm_ends_what_it_started():
    """For example the head node of `gubs submit`: by default, Python runs no `finally` on SIGTERM."""
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert output == "stopped what was started\n"
    assert process.returncode == 128 + signal.SIGTERM
