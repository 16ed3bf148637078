"""What a training says and decides before it starts."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from ufm_helpers import changed_copy, small_settings

from gubs import stages
from gubs.artifacts import Recipe, Run, StageJob
from gubs.errors import ArtifactError, PlatformError
from gubs.records import Option, Task
from gubs.stages import make_stage
from gubs.ufm import stage
from gubs.ufm.held_out import HeldOut
from gubs.ufm.memory import Machine
from gubs.ufm.model import checkpoint
from gubs.ufm.monitor import check_trackers
from gubs.ufm.questions import Item
from gubs.ufm.settings import GRPOSettings, SFTSettings
from gubs.ufm.sft import COLUMNS, order_of, steps_of
from gubs.ufm.stage import _examples, _options, _tasks

NOBODY = HeldOut(0.0, 0)


class Log:
    """Questions about a data set with these golds of training records by task."""

    def __init__(self, **golds):
        self.golds = golds
        self.run = SimpleNamespace(uri="r")
        self.ifvr = SimpleNamespace(uri="r/ifvr", targets=lambda task, _: pa.table({"gold": list(golds.get(task, ""))}))

    def training_outcomes(self, task, _):
        return [Item("i", "u", "v", task, Option(g), "rule") for g in self.golds[str(task)]]


@pytest.mark.parametrize(
    ("examples", "epochs", "min_steps", "steps"),
    [(906, 1, 0, 57), (83, 1, 0, 6), (83, 1, 200, 203), (83, 1, 209, 213), (906, 4, 200, 227), (3, 2, 0, 1)],
)
def test_few_examples_are_repeated_until_there_are_enough_steps(examples, epochs, min_steps, steps):
    sft = SFTSettings(epochs=epochs, min_steps=min_steps, batch=16)
    assert steps_of(examples, sft) == steps
    order = order_of(examples, sft, 3)
    assert len(order) == 16 * steps
    assert set(order) == set(range(examples)), "no example is left out"
    assert order == order_of(examples, sft, 3) != order_of(examples, sft, 4)


def test_every_epoch_has_an_order_of_its_own_and_leaves_none_out():
    order = order_of(83, SFTSettings(epochs=4, batch=16), 0)
    first, second = order[:83], order[83:166]
    assert sorted(first) == sorted(second) == list(range(83))
    assert first != second


def test_no_example_of_a_held_out_user_is_trained_on():
    users = [f"u{n % 40}" for n in range(400)]
    table = pa.table({c: users if c == "user_id" else ["x"] * 400 for c in (*COLUMNS, "gold")})
    job = SimpleNamespace(input=lambda _: SimpleNamespace(uri="r/sft", table=lambda *_: table))
    held_out = HeldOut(0.3, 7)
    kept = set(_examples(job, held_out)["user_id"].to_pylist())
    assert kept == {u for u in users if u not in held_out}
    assert 0.5 < len(kept) / 40 < 0.9, "about three in ten are held out"
    with pytest.raises(ArtifactError, match=r"ufm\.held_out"):
        _examples(job, HeldOut(1.0, 7))


def test_users_are_held_out_by_their_own_id_and_the_seed():
    users = [f"u{n}" for n in range(2000)]
    first = {u for u in users if u in HeldOut(0.15, 0)}
    assert 0.12 < len(first) / 2000 < 0.18
    assert first < {u for u in users if u in HeldOut(0.3, 0)}, "more of them, never others"
    assert first != {u for u in users if u in HeldOut(0.15, 1)}


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_spent():
    check_trackers(["tensorboard"])
    with pytest.raises(PlatformError, match="pip install wandb"):
        check_trackers(["tensorboard", "wandb"])


def test_what_is_missing_is_named():
    counts = {("sequential", "A"): 1200, ("sequential", "C"): 3}
    assert _options("records", counts) == "records: sequential task: 1,200 A, 3 C (none of B, D); click task: none"


def test_a_task_with_one_option_only_is_left_out_and_said(capsys):
    assert _tasks(Log(sequential="ABBA", click="BBB"), tuple(Task), NOBODY) == (Task.SEQUENTIAL,)
    assert "the click task is left out: its records all have the same option" in capsys.readouterr().err


def test_the_log_says_what_was_measured_of_the_papers_rule(capsys):
    stage._say_rule(GRPOSettings(advantage={"rule": "paper"}))
    assert "advantage rule paper: one third of the right answers" in capsys.readouterr().err
    stage._say_rule(GRPOSettings(advantage={"rule": "paper"}, groups=False))
    stage._say_rule(GRPOSettings(advantage={"rule": "weighted"}))
    assert not capsys.readouterr().err


def grpo_job(run: Run, steps: int, schedule: str = "constant") -> StageJob:
    """A training of GA-GRPO with so many steps, before it begins."""
    settings = small_settings(f"ufm.grpo.steps={steps}", f"ufm.grpo.optimizer.schedule={schedule}")
    recipe = Recipe(settings=stages.settings_of(stages.stage("grpo", settings), settings))
    return StageJob(run, "grpo", "grpo", recipe, settings.model_dump(mode="json"), False)


def test_a_killed_training_may_be_given_more_steps_and_nothing_else(tmp_path):
    """With a constant rate: the steps that were done are those of the longer training too."""
    run, more_steps = Run(tmp_path / "run"), ("ufm.grpo.steps",)
    with suppress(KeyboardInterrupt), stage._training(grpo_job(run, 10), more_steps) as (_, folder):
        (folder / "checkpoints" / "step-000004").mkdir(parents=True)
        raise KeyboardInterrupt
    with stage._training(grpo_job(run, 20), more_steps) as (_, folder):
        assert (folder / "checkpoints" / "step-000004").exists(), "it resumes"
        shutil.copytree(folder, tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", tmp_path / "run" / "grpo.partial")
    refused = pytest.raises(ArtifactError, match=r"unfinished training with other settings.*schedule=.*now")
    with refused, stage._training(grpo_job(run, 20, "linear"), ()):
        pass


def test_trainings_of_a_world_differ_in_their_seed_alone():
    """The first one is what it was before there could be several."""
    seeds = [small_settings(f"ufm.seed={n}").ufm.training_seed(world) for world in (0, 1, 2) for n in range(3)]
    assert len(set(seeds)) == 9
    assert seeds[::3] == [0, 1, 2]


def test_turns_are_kept_as_they_are_named():
    wanted = (Task.CLICK, Task.SEQUENTIAL, Task.SEQUENTIAL)
    assert _tasks(Log(sequential="AB", click="AB"), wanted, NOBODY) == wanted


def test_without_any_choice_to_learn_nothing_is_trained():
    with pytest.raises(ArtifactError, match="two options"):
        _tasks(Log(click="BBB"), tuple(Task), NOBODY)


def test_workers_that_find_no_place_are_waited_for_so_long_and_no_longer(ufm_run, tmp_path, monkeypatch, capsys):
    """Ray Train itself would try for ever, and say nothing."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    settings = small_settings(
        "ufm.workers.count=4", "ufm.workers.max_failures=1", "ufm.grpo.start=base", "ufm.grpo.groups=false"
    )
    run = changed_copy(ufm_run, tmp_path / "run", settings)
    with pytest.raises(PlatformError, match=r"4 workers could not start in time.*`ray status`"):
        make_stage("grpo", run, settings)
    printed = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert any(text.startswith("4 workers wait for 4 CPU (") for text in printed)


@pytest.mark.parametrize("train", ["sft_model", "grpo"])
def test_what_does_not_fit_a_gpu_is_refused_before_anything_is_written(ufm_run, tmp_path, monkeypatch, train):
    settings = small_settings("ufm.grpo.start=base")
    run = changed_copy(ufm_run, tmp_path / "run", settings)
    before = sorted(Path(run.root).rglob("*"))
    monkeypatch.setattr(stage, "use_gpu", lambda _: True)
    monkeypatch.setattr(stage.memory, "gpu_machine", lambda: Machine(gpu=1e6, gpus=1, host=1e12))
    with pytest.raises(PlatformError, match="DOES NOT FIT"):
        make_stage(train, run, settings)
    assert sorted(Path(run.root).rglob("*")) == before


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_without_sft_and_without_pictures(ufm_run, tmp_path):
    """From the base model (Table 7), blind (Table 9): nothing sees a picture, and the tower stays as it was."""
    from safetensors.torch import load_file

    settings = small_settings(
        "ufm.grpo.start=base",
        "ufm.inputs.vision=false",
        "ufm.inputs.max_new_tokens=8",
        "ufm.grpo.steps=1",
        "ufm.grpo.beta=0",
        "ufm.rollout.kv_cache_gb=0.1",
        "ufm.workers.threads=1",
    )
    run = changed_copy(ufm_run, tmp_path / "run", settings)
    rows = make_stage("grpo", run, settings).table("steps").to_pylist()
    assert len(rows) == 2
    assert all(row["engine/picture_reuse"] == 0 and row["health/mismatch"] < 1.02 for row in rows)
    assert "health/kl" not in rows[0], "without a reference there is nothing to measure it against"
    policy = Path(run.path("grpo", "policy", "model.safetensors"))
    after, before = load_file(policy), load_file(checkpoint(settings.ufm.model) / "model.safetensors")
    tower = [name for name in before if "visual" in name]
    assert tower
    assert all((after[name] == before[name]).all() for name in tower)
    kept = Path(run.path("grpo", "checkpoints", "step-000002", "settings.json"))
    assert json.loads(kept.read_text())["ufm"]["grpo"]["start"] == "base"
