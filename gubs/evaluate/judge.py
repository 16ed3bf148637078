"""The stage `eval-<policy>`: a policy's answers about the test users' targets, and the metrics of them.

Each target is asked twice, greedy and sampled, from the user's own prompt (as in use); the metrics are taken on the
natural mix of options and on a balanced one, since a policy trained on balanced batches may do well on either alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.artifacts import StageJob
from gubs.console import progress
from gubs.data.ifvr import PROFILES
from gubs.errors import ArtifactError
from gubs.evaluate.metrics import Predictions, table
from gubs.evaluate.settings import EvalSettings
from gubs.records import TASK_OPTIONS, Option, Split, Task
from gubs.ufm.predict import Prediction, Predictor, Query
from gubs.ufm.questions import Item, Questions
from gubs.ufm.rewards import reward_answer
from gubs.ufm.sampling import sample_seed
from gubs.ufm.settings import RewardSettings, UFMSettings
from gubs.ufm.stage import base_model, policy_folder, use_gpu

OnProgress = Callable[[int, int], None]
BASE = "base"
"""Name of the policy before any training."""

MODES = ("greedy", "sampled")
MIXES = ("natural", "balanced")

PREDICTIONS = pa.schema(
    [
        pa.field("interaction_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        ("natural", pa.bool_()),
        ("balanced", pa.bool_()),
        ("gold", pa.string()),
        ("predicted", pa.string()),
        ("failure", pa.string()),
        ("reward", pa.float64()),
        ("play_rate", pa.float64()),
        ("clicked", pa.bool_()),
        ("answer", pa.string()),
    ]
)
"""One row a target and mode. `natural`, `balanced`: the mixes that it belongs to; `reward`: R of Eq. 4, with all of its
parts, whatever training used; no gold and no reward: a skip whose reason nobody knows."""

_TEMPERATURE = {"greedy": 0.0, "sampled": 1.0}
_CHUNK = 64
"""Answers between two looks at the progress."""
_SHARE = 512
"""Answers that are worth an engine of their own."""


def make(job: StageJob, ufm: UFMSettings, evaluate: EvalSettings, seed: int) -> str:
    """Asks a policy about the test users and measures (tables predictions, metrics).

    Raises:
        ArtifactError: there is no labelled target of a test user.
    """
    policy = job.stage.removeprefix("eval-")
    folder = base_model(ufm.model) if policy == BASE else policy_folder(job.run, policy)
    questions = Questions(job.run, ufm.inputs, tastes=job.reads(PROFILES))
    items = test_items(questions, evaluate.items, seed)
    with progress("answers") as on_progress:
        rows = predictions(items, questions, folder, ufm, seed, on_progress)
    with job.writing() as out:
        out.write_table("predictions", pa.Table.from_pylist(rows, schema=PREDICTIONS))
        metrics = measure(rows, evaluate.bootstrap, seed)
        out.write_table("metrics", pa.Table.from_pylist(metrics))
        out.info = {"policy": policy, "summary": summary(rows, metrics)}
        out.summary = f"{len(rows):,} answers"
    return out.summary


def test_items(questions: Questions, count: int, seed: int) -> list[tuple[Item, dict[str, bool]]]:
    """The targets to be judged, of all tasks, and which mixes each is in.

    The natural mix is `count` targets drawn at random (0 = all) a task, those among them whose reason nobody knows; the
    balanced one has as many of every option, at most `count` in all, drawn from all test targets. So the union of both
    is judged.
    """
    found = []
    for number, task in enumerate(Task):
        items = questions.items(task, Split.TEST, unexplained=True)
        order = np.random.default_rng([seed, 41, number]).permutation(len(items))
        natural = set(order[: count or len(items)].tolist())
        balanced = _balanced(items, order.tolist(), count, task)
        found += [(items[i], {"natural": i in natural, "balanced": i in balanced}) for i in sorted(natural | balanced)]
    if not found:
        raise ArtifactError(f"{questions.ifvr.uri} has no labelled targets of test users: see splits.test_users")
    return found


def predictions(
    items: Sequence[tuple[Item, dict[str, bool]]],
    questions: Questions,
    folder: Path,
    ufm: UFMSettings,
    seed: int,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Rows of `PREDICTIONS`: what the policy in a folder says about the items, by mode and item."""
    total, rows = len(MODES) * len(items), {}
    gpu = use_gpu(ufm.workers)
    engines = min(ufm.workers.count, math.ceil(total / _SHARE)) if gpu else 1
    pictures = ufm.inputs.vision and questions.pictures
    with Predictor(folder, ufm, pictures=pictures, engines=engines, gpu=gpu) as predictor:
        for prediction in predictor.stream(_queries(items, questions, seed)):
            mode, number = prediction.key
            rows[prediction.key] = _row(items[number], MODES[mode], prediction)
            if on_progress and (len(rows) % _CHUNK == 0 or len(rows) == total):
                on_progress(len(rows), total)
    return [rows[key] for key in sorted(rows)]


def measure(rows: Sequence[dict[str, Any]], resamples: int, seed: int) -> list[dict[str, Any]]:
    """The metrics with all baselines beside them, by task, mix and mode."""
    found = []
    for task in Task:
        for mix in MIXES:
            for mode in MODES:
                mine = [r for r in rows if r["task"] == task and r["mode"] == mode and r[mix]]
                if mine:
                    said = as_predictions(mine, task)
                    found += [
                        {"task": str(task), "mix": mix, "mode": mode, **m}
                        for m in table(said, "model", resamples=resamples, seed=seed)
                    ]
    return found


def summary(rows: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures that one looks at first, `task/mix/mode/name`; the mean raw reward among them."""
    wanted = ("judge_f1", "judge_acc", "judge_balanced_acc", "reason_f1", "reason_f1_B", "reason_acc", "click_f1")
    found = {
        f"{m['task']}/{m['mix']}/{m['mode']}/{m['name']}": m["value"]
        for m in metrics
        if m["method"] == "model" and m["name"] in (*wanted, "click_balanced_acc", "share_kept", "total_play_rate")
    }
    for task in Task:
        for mix in MIXES:
            for mode in MODES:
                mine = [r["reward"] for r in rows if r["task"] == task and r["mode"] == mode and r[mix]]
                if rewards := [r for r in mine if r is not None]:
                    found[f"{task}/{mix}/{mode}/reward"] = float(np.mean(rewards))
    return found


def as_predictions(rows: Sequence[dict[str, Any]], task: Task) -> Predictions:
    """Rows of one task as the metrics take them."""
    return Predictions(
        user=[r["user_id"] for r in rows],
        gold=[r["gold"] for r in rows],
        predicted=[r["predicted"] for r in rows],
        task=task,
        play_rate=[r["play_rate"] for r in rows] if task == Task.SEQUENTIAL else None,
        clicked=[r["clicked"] for r in rows] if task == Task.CLICK else None,
    )


def _queries(items: Sequence[tuple[Item, dict[str, bool]]], questions: Questions, seed: int) -> Iterator[Query]:
    """Each item's question in each mode; the key is (number of the mode, number of the item)."""
    for m, mode in enumerate(MODES):
        for k, (item, _) in enumerate(items):
            prompt = questions.about_user(item.task, item.user_id, item.video_id)
            yield Query((m, k), prompt, sample_seed(seed, 0, k, mode, 0), _TEMPERATURE[mode])


def _balanced(items: Sequence[Item], order: Sequence[int], count: int, task: Task) -> set[int]:
    by_option = {o: [i for i in order if items[i].gold == o] for o in TASK_OPTIONS[task]}
    there = [found for found in by_option.values() if found]
    if not there:
        return set()
    size = min(map(len, there))
    if count:
        size = min(size, math.ceil(count / len(there)))
    return {i for found in there for i in found[:size]}


def _row(asked: tuple[Item, dict[str, bool]], mode: str, prediction: Prediction) -> dict[str, Any]:
    item, mixes = asked
    answer: dict[str, Any] = {"predicted": None, "failure": "too_long", "reward": 0.0 if item.gold else None}
    if prediction.text is not None:
        gold = item.gold or Option.B  # an unexplained skip: what is rewarded is not kept
        parts, reading = reward_answer(prediction.text, gold, item.task, RewardSettings(), prediction.finished)
        answer = {
            "predicted": str(reading.option) if reading.option else None,
            "failure": str(reading.failure) if reading.failure else None,
            "reward": parts.total if item.gold else None,
        }
    return {
        "interaction_id": item.interaction_id,
        "user_id": item.user_id,
        "task": str(item.task),
        "mode": mode,
        **mixes,
        "gold": str(item.gold) if item.gold else None,
        **answer,
        "play_rate": item.play_rate,
        "clicked": item.gold == Option.A if item.task == Task.CLICK else None,
        "answer": prediction.text,
    }
