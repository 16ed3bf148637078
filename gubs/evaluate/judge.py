"""The stage `eval-<policy>`: a policy's answers about the test users' targets, and their metrics.

Each target is asked twice, greedy and sampled, with the user's own prompt (as in use); the metrics are computed on the
natural mix of options and on a balanced one, since a policy trained on balanced batches may do well on only one.
"""

import itertools
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
from gubs.ufm.rewards import outcome_only, reward_answer
from gubs.ufm.sampling import sample_seed
from gubs.ufm.settings import RewardSettings, UFMSettings
from gubs.ufm.stage import BASE as BASE
from gubs.ufm.stage import policy_or_base, use_gpu

OnProgress = Callable[[int, int], None]
Row = dict[str, Any]
_Target = tuple[Item, dict[str, bool]]
"""An item, and whether it is in each mix."""
STAGE_PREFIX = "eval-"
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
"""One row per target and mode. `natural`, `balanced`: the mixes that it belongs to; `reward`: R of Eq. 4 with all its
parts, whatever training used (without r_choice where no reason is known). A skip whose reason alone is unknown has
neither gold nor reward."""

_TEMPERATURE = {"greedy": 0.0, "sampled": 1.0}
_REPORT_EVERY = 64
"""Answers between two progress reports."""
_ANSWERS_PER_ENGINE = 512
"""Another engine is started only for this many more answers."""


def make(job: StageJob, ufm: UFMSettings, evaluate: EvalSettings, seed: int) -> str:
    """Asks a policy about the test users' targets and writes the tables `predictions` and `metrics`.

    Raises:
        ArtifactError: there is no labelled target of a test user.
    """
    policy = job.stage.removeprefix(STAGE_PREFIX)
    folder = policy_or_base(job.run, policy, ufm)
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


def test_items(questions: Questions, count: int, seed: int) -> list[_Target]:
    """The targets to judge, of all tasks, and the mixes each is in.

    Per task, the natural mix is `count` targets drawn at random (0 = all), with those whose reason is unknown; the
    balanced mix has equally many of each option, at most `count` in all, drawn from all test targets.
    """
    targets: list[_Target] = []
    for number, task in enumerate(Task):
        items = _judged(questions, task)
        order = np.random.default_rng([seed, 41, number]).permutation(len(items))
        natural = set(order[: count or len(items)].tolist())
        balanced = _balanced(items, order.tolist(), count, task)
        targets += [
            (items[i], {"natural": i in natural, "balanced": i in balanced}) for i in sorted(natural | balanced)
        ]
    if not targets:
        raise ArtifactError(f"{questions.ifvr.uri} has no labelled targets of test users: see splits.test_users")
    return targets


def _judged(questions: Questions, task: Task) -> list[Item]:
    """All targets of test users whose outcome is known."""
    items = questions.outcomes(task, Split.TEST)
    return questions.items(task, Split.TEST, unexplained=True) if all(i.reasons_known for i in items) else items


def predictions(
    items: Sequence[_Target],
    questions: Questions,
    folder: Path,
    ufm: UFMSettings,
    seed: int,
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """The answers of the policy in `folder` as rows of `PREDICTIONS`, ordered by mode and item."""
    total, rows = len(MODES) * len(items), {}
    gpu = use_gpu(ufm.workers)
    engines = min(ufm.workers.count, math.ceil(total / _ANSWERS_PER_ENGINE)) if gpu else 1
    pictures = ufm.inputs.vision and questions.pictures
    largest = questions.largest
    with Predictor(folder, ufm, pictures=pictures, largest=largest, engines=engines, gpu=gpu) as predictor:
        for prediction in predictor.stream(_queries(items, questions, seed)):
            mode, number = prediction.key
            rows[prediction.key] = _row(items[number], MODES[mode], prediction)
            if on_progress and (len(rows) % _REPORT_EVERY == 0 or len(rows) == total):
                on_progress(len(rows), total)
    return [rows[key] for key in sorted(rows)]


def measure(rows: Sequence[Row], resamples: int, seed: int) -> list[Row]:
    """The metrics and all baselines, by task, mix and mode."""
    return [
        {"task": str(task), "mix": mix, "mode": mode, **metric}
        for task, mix, mode, part in _parts(rows)
        for metric in table(as_predictions(part, task), "model", resamples=resamples, seed=seed)
    ]


def summary(rows: Sequence[Row], metrics: Sequence[Row]) -> dict[str, float]:
    """The main metrics and the mean reward, by `task/mix/mode/name`."""
    wanted = ("judge_f1", "judge_acc", "judge_balanced_acc", "reason_f1", "reason_f1_B", "reason_acc", "click_f1")
    figures = {
        f"{m['task']}/{m['mix']}/{m['mode']}/{m['name']}": m["value"]
        for m in metrics
        if m["method"] == "model" and m["name"] in (*wanted, "click_balanced_acc", "share_kept", "total_play_rate")
    }
    for task, mix, mode, part in _parts(rows):
        if rewards := [r["reward"] for r in part if r["reward"] is not None]:
            figures[f"{task}/{mix}/{mode}/reward"] = float(np.mean(rewards))
    return figures


def _parts(rows: Sequence[Row]) -> Iterator[tuple[Task, str, str, list[Row]]]:
    """The rows by task, mix and mode, without the empty parts."""
    for task, mix, mode in itertools.product(Task, MIXES, MODES):
        if part := [r for r in rows if r["task"] == task and r["mode"] == mode and r[mix]]:
            yield task, mix, mode, part


def as_predictions(rows: Sequence[Row], task: Task) -> Predictions:
    """Rows of one task in the form that the metrics read."""
    return Predictions(
        user=[r["user_id"] for r in rows],
        gold=[r["gold"] for r in rows],
        predicted=[r["predicted"] for r in rows],
        task=task,
        play_rate=[r["play_rate"] for r in rows] if task == Task.SEQUENTIAL else None,
        clicked=[r["clicked"] for r in rows] if task == Task.CLICK else None,
    )


def _queries(items: Sequence[_Target], questions: Questions, seed: int) -> Iterator[Query]:
    """Each item's question in each mode; the key is (number of the mode, number of the item)."""
    for m, mode in enumerate(MODES):
        for k, (item, _) in enumerate(items):
            prompt = questions.about_user(item.task, item.user_id, item.video_id)
            yield Query((m, k), prompt, sample_seed(seed, 0, k, mode, 0), _TEMPERATURE[mode])


def _balanced(items: Sequence[Item], order: Sequence[int], count: int, task: Task) -> set[int]:
    by_option = {o: [i for i in order if items[i].gold == o] for o in TASK_OPTIONS[task]}
    options = [numbers for numbers in by_option.values() if numbers]
    if not all(i.reasons_known for i in items):
        options.append([i for i in order if items[i].gold is None])
    if not options:
        return set()
    size = min(map(len, options))
    if count:
        size = min(size, math.ceil(count / len(options)))
    return {i for numbers in options for i in numbers[:size]}


def _row(target: _Target, mode: str, prediction: Prediction) -> Row:
    item, mixes = target
    rewarded = bool(item.gold) or not item.reasons_known
    answer: Row = {"predicted": None, "failure": "too_long", "reward": 0.0 if rewarded else None}
    if prediction.text is not None:
        rewards = RewardSettings() if item.reasons_known else outcome_only(RewardSettings())
        parts, reading = reward_answer(prediction.text, item.gold, item.task, rewards, prediction.finished)
        answer = {
            "predicted": str(reading.option) if reading.option else None,
            "failure": str(reading.failure) if reading.failure else None,
            "reward": parts.total if rewarded else None,
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
