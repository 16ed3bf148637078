"""What a training tells: to files, to TensorBoard, to Ray's metrics; and one curve from a run that was resumed."""

import json
import sys
from types import SimpleNamespace

import pytest

from gubs.ufm.monitor import METRICS, Monitor, Phases, Watchdog, read_metrics
from gubs.ufm.train_worker import TrainWorker


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)]


def monitor(folder, rank=0, trackers=("tensorboard",)):
    return Monitor(folder, "grpo", trackers, {}, rank)


def test_figures_reach_the_file_and_tensorboard(tmp_path):
    told = monitor(tmp_path)
    for step in range(3):
        told.report(step, {"reward": 1.0 + step, "loss": float("nan")})
    assert [(m["step"], m["reward"], m["loss"]) for m in read_metrics(tmp_path)] == [
        (0, 1, None),
        (1, 2, None),
        (2, 3, None),
    ]
    assert scalars(tmp_path, "reward") == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_only_rank_0_writes(tmp_path):
    monitor(tmp_path, rank=1).report(0, {"reward": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_has_each_step_once(tmp_path):
    """Killed after step 3, resumed from the checkpoint after step 1: steps 2 and 3 are done again."""
    first = monitor(tmp_path)
    for step in range(4):
        first.report(step, {"reward": 1.0})
        first.samples(step, [{"answer": "a"}])
    second = monitor(tmp_path)
    second.forget_after(1)
    for step in range(2, 5):
        second.report(step, {"reward": 2.0})
    assert [(m["step"], m["reward"]) for m in read_metrics(tmp_path)] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]
    assert scalars(tmp_path, "reward") == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    kept = [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert kept == [0, 1]


def test_half_a_line_of_a_killed_process_is_no_figure(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 0, "reward": 1.0}\n{"step": 1, "rew')
    assert [m["step"] for m in read_metrics(tmp_path)] == [0]


def test_figures_become_metrics_of_ray(tmp_path, ray_local, monkeypatch):
    """What the dashboard and Prometheus read, by run and rank."""
    set_: list[tuple[str, float, dict[str, str]]] = []

    class Gauge:
        def __init__(self, name, description, tag_keys):
            assert set(tag_keys) == {"run", "rank"}
            self.name = name

        def set(self, value, tags):
            set_.append((self.name, value, tags))

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    monitor(tmp_path, rank=1).report(0, {"reward_raw/T": 1.5})
    assert set_ == [("gubs_reward_raw_t", 1.5, {"run": "grpo", "rank": "1"})]


def test_wandb_gets_every_step_and_a_resumed_run_continues_the_same_curves(tmp_path, monkeypatch):
    """Its interface stands in for it: what is called with what."""
    begun, logged = [], []
    run = SimpleNamespace(log=lambda figures, step: logged.append((step, figures)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **asked: begun.append(asked) or run))
    monitor(tmp_path, trackers=["wandb"]).report(0, {"reward_raw/T": 1.0})
    monitor(tmp_path, trackers=["wandb"]).report(1, {"reward_raw/T": 2.0})
    assert logged == [(0, {"reward_raw/T": 1.0}), (1, {"reward_raw/T": 2.0})]
    first, second = begun
    assert first == second
    assert first["id"]
    assert first["resume"] == "allow"


def test_mlflow_gets_every_step_and_a_resumed_run_continues_the_same_curves(tmp_path, monkeypatch):
    begun, logged = [], []

    def start_run(**asked):
        begun.append(asked)
        return SimpleNamespace(info=SimpleNamespace(run_id="r7"))

    mlflow = SimpleNamespace(
        set_experiment=lambda _: None,
        start_run=start_run,
        log_metrics=lambda figures, step: logged.append((step, figures)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monitor(tmp_path, trackers=["mlflow"]).report(0, {"reward_raw/T": 1.0})
    monitor(tmp_path, trackers=["mlflow"]).report(1, {"reward_raw/T": 2.0})
    assert logged == [(0, {"reward_raw.T": 1.0}), (1, {"reward_raw.T": 2.0})]
    assert begun == [{"run_name": "grpo"}, {"run_id": "r7"}]


def test_ray_train_hears_of_every_step_after_the_files_and_before_the_checkpoint(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr("ray.train.report", lambda figures: heard.append(("ray", figures)))
    shell = object.__new__(TrainWorker)
    shell.phases, shell.folder, shell.rank, shell.steps = Phases(), tmp_path, 0, 2
    shell._watchdog = Watchdog(shell.phases, 60.0, tmp_path, 0)
    shell.monitor = SimpleNamespace(report=lambda step, figures: heard.append(("files", step)))
    shell._resume, shell._timed, shell._save_final = lambda: 0, lambda step: {"reward": float(step)}, lambda: None
    shell._maybe_checkpoint = lambda step, _: heard.append(("checkpoint", step))
    result = shell.run()
    assert (result["steps"], set(result["after_last_step"])) == (2, {"report"})
    told = [[("files", s), ("ray", {"step": s, "reward": float(s)}), ("checkpoint", s)] for s in range(2)]
    assert heard == told[0] + told[1]
