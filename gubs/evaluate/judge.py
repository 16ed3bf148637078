"""The stage `eval-<policy>`: a policy's answers about the test users' targets, and their metrics.

Each target is asked twice, greedy and sampled, with the user's own prompt (as in use); the metrics are computed on the
natural mix of options and on a balanced one, since a policy trained on balanced batches may do well on only one. Two
more modes take the mean option probabilities of several sampled answers (`evaluate.decision.thoughts`), calibrated on
training users (see `held_out`). `calibrated` names the option with the highest expected reward; `filter` decides by the
threshold that was chosen there for a stated goal.
"""

import itertools
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gubs.artifacts import StageJob, code_version
from gubs.console import progress
from gubs.data.ifvr import PROFILES
from gubs.data.work import attempt_key
from gubs.errors import ArtifactError
from gubs.evaluate.answers import AnswerLog, OnProgress, Question
from gubs.evaluate.calibration import best_answer
from gubs.evaluate.held_out import DecisionRule, decision_rule, held_out_items, rule_from, skipped
from gubs.evaluate.metrics import Predictions, table
from gubs.evaluate.settings import DecisionSettings, EvalSettings
from gubs.records import TASK_OPTIONS, Option, Split, Task
from gubs.ufm.held_out import HeldOut
from gubs.ufm.inputs import Inputs
from gubs.ufm.labels import Labels, OptionProbabilities, mean_options
from gubs.ufm.predict import Prediction, Query
from gubs.ufm.questions import Item, Questions
from gubs.ufm.rewards import outcome_only, reward_answer, skip_right
from gubs.ufm.sampling import sample_seed
from gubs.ufm.settings import RewardSettings, UFMSettings
from gubs.ufm.stage import BASE as BASE
from gubs.ufm.stage import policy_or_base

Row = dict[str, Any]
Answers = dict[Question, Prediction]
"""By mode and number of the item."""
_Target = tuple[Item, dict[str, bool]]
"""An item, and whether it is in each mix."""
STAGE_PREFIX = "eval-"
GREEDY, SAMPLED, CALIBRATED, FILTER = "greedy", "sampled", "calibrated", "filter"
MODES = (GREEDY, SAMPLED, CALIBRATED, FILTER)
MIXES = ("natural", "balanced")
SAME_ANSWERS_SINCE = 2
"""Version of the stage since which an evaluation has the same answers and calibration; later ones only choose another
threshold (`decided_again`)."""

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
        ("skip", pa.float64()),
        ("reward", pa.float64()),
        ("play_rate", pa.float64()),
        ("clicked", pa.bool_()),
        ("answer", pa.string()),
    ]
)
"""One row per target and mode. `natural`, `balanced`: the mixes that it belongs to; `reward`: R of Eq. 4 with all its
parts, whatever training used (without r_choice where no reason is known); `skip`: P(skip), calibrated in the modes that
are (null: the answer names no option). A skip whose reason alone is unknown has neither gold nor reward."""

HELD_OUT = pa.schema(
    [
        pa.field("interaction_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("skipped", pa.bool_(), nullable=False),
        ("gold", pa.string()),
        ("options", pa.list_(pa.float64())),
    ]
)
"""Targets of held-out training users, which calibrations and thresholds are made from. `options`: mean probabilities
over the thoughts, in the order of `TASK_OPTIONS`; null: no answer names an option."""
_HELD_OUT = "held out"
Rules = dict[Task, DecisionRule]


def make(job: StageJob, ufm: UFMSettings, evaluate: EvalSettings, seed: int) -> str:
    """Asks a policy about the test users' targets and writes the tables `predictions`, `held_out` and `metrics`.

    Raises:
        ArtifactError: there is no labelled target of a test user.
    """
    policy = job.stage.removeprefix(STAGE_PREFIX)
    folder = policy_or_base(job.run, policy, ufm)
    questions = Questions(job.run, ufm.inputs, tastes=job.reads(PROFILES))
    items = test_items(questions, evaluate.items, seed)
    held_out = held_out_items(questions, tuple(Task), HeldOut(ufm.held_out, seed), evaluate.decision, seed)
    key = attempt_key(job.recipe.fingerprint(job.kind), code_version())
    with job.writing(resume_key=key) as out:
        log = AnswerLog(out.run.fs, out.path("answers"))
        with progress("answers") as on_progress:
            ask(items, held_out, questions, folder, ufm, evaluate.decision.thoughts, seed, log, on_progress)
        answers = log.answers
        options = held_out_options(held_out, answers, evaluate.decision.thoughts)
        rules = decision_rules(held_out, options, evaluate.decision)
        out.write_table("held_out", held_out_table(held_out, options))
        rows = predictions(items, answers, rules, evaluate.decision.thoughts)
        out.write_table("predictions", pa.Table.from_pylist(rows, schema=PREDICTIONS))
        metrics = measure(rows, evaluate.bootstrap, seed)
        out.write_table("metrics", pa.Table.from_pylist(metrics))
        decisions = {str(task): asdict(rule) for task, rule in rules.items()}
        out.info = {"policy": policy, "summary": summary(rows, metrics), "decisions": decisions}
        earlier = f", {log.answered_before:,} of them from an earlier attempt" if log.answered_before else ""
        out.summary = f"{len(answers):,} answers{earlier}" + _uncalibrated(items, rules)
        out.remove("answers")  # last: killed before, the next attempt still finds them
    return out.summary


def test_items(questions: Questions, count: int, seed: int) -> list[_Target]:
    """The targets to judge, of all tasks, and the mixes each is in.

    Per task, the natural mix is `count` targets drawn at random (0 = all), with those whose reason is unknown; the
    balanced mix has equally many of each option, at most `count` in all, drawn from all test targets.
    """
    targets: list[_Target] = []
    for task in Task:
        items = judged_items(questions, task)
        order = item_order(len(items), task, seed)
        natural = set(order[: count or len(items)].tolist())
        balanced = _balanced(items, order.tolist(), count, task)
        targets += [
            (items[i], {"natural": i in natural, "balanced": i in balanced}) for i in sorted(natural | balanced)
        ]
    if not targets:
        raise ArtifactError(f"{questions.ifvr.uri} has no labelled targets of test users: see splits.test_users")
    return targets


def judged_items(questions: Questions, task: Task) -> list[Item]:
    """All targets of test users whose outcome is known."""
    items = questions.outcomes(task, Split.TEST)
    return questions.items(task, Split.TEST, unexplained=True) if all(i.reasons_known for i in items) else items


def item_order(count: int, task: Task, seed: int) -> npt.NDArray[np.int64]:
    """The order in which so many targets of a task are drawn: numbers of the targets."""
    return np.random.default_rng([seed, 41, list(Task).index(task)]).permutation(count)


def ask(
    items: Sequence[_Target],
    held_out: Sequence[Item],
    questions: Questions,
    folder: Path,
    ufm: UFMSettings,
    thoughts: int,
    seed: int,
    log: AnswerLog,
    on_progress: OnProgress | None = None,
) -> None:
    """Asks the policy in `folder` about the test targets, greedy and sampled, and about the held-out ones.

    What the log has answers to is not asked again; new answers are added. `thoughts`: see `DecisionSettings`.
    """
    total = len(_ways(thoughts)) * len(items) + len(_held_out_ways(thoughts)) * len(held_out)
    if len(log.answers) == total:
        return
    queries = _queries(items, held_out, questions, Inputs(folder, ufm.inputs), thoughts, seed, frozenset(log.answers))
    log.fill(queries, total, folder, ufm, questions, on_progress)


def held_out_options(held_out: Sequence[Item], answers: Answers, thoughts: int) -> list[OptionProbabilities | None]:
    """The mean probabilities over the thoughts about each held-out target; None where no answer names an option."""
    ways = _held_out_ways(thoughts)
    return [mean_options(answers[way, k].options for way in ways) for k in range(len(held_out))]


def held_out_table(held_out: Sequence[Item], options: Sequence[OptionProbabilities | None]) -> pa.Table:
    """The table `held_out`, from the targets and the policy's probabilities of each."""
    rows = [
        {
            "interaction_id": item.interaction_id,
            "user_id": item.user_id,
            "task": str(item.task),
            "skipped": skipped(item),
            "gold": str(item.gold) if item.gold else None,
            "options": [probabilities.options[o] for o in TASK_OPTIONS[item.task]] if probabilities else None,
        }
        for item, probabilities in zip(held_out, options, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=HELD_OUT)


def decision_rules(
    held_out: Sequence[Item], options: Sequence[OptionProbabilities | None], settings: DecisionSettings
) -> Rules:
    """Calibration and threshold of each task, from the held-out targets; tasks that allow none are left out."""
    rules = {task: decision_rule(held_out, options, task, settings) for task in Task}
    return {task: rule for task, rule in rules.items() if rule}


def predictions(items: Sequence[_Target], answers: Answers, rules: Rules, thoughts: int = 1) -> list[Row]:
    """The answers as rows of `PREDICTIONS`, ordered by mode and item."""
    asked = {mode: [_row(t, mode, answers[mode, k]) for k, t in enumerate(items)] for mode in (GREEDY, SAMPLED)}
    ways = [way for way in _ways(thoughts) if way != GREEDY] if thoughts > 1 else [GREEDY]
    options = [mean_options(answers[way, k].options for way in ways) for k in range(len(items))]
    decided = [
        _decided(mode, target, row, options[k], rules.get(target[0].task))
        for mode in (CALIBRATED, FILTER)
        for k, (target, row) in enumerate(zip(items, asked[GREEDY], strict=True))
    ]
    return [*asked[GREEDY], *asked[SAMPLED], *decided]


def decided_again(rows: Sequence[Row], held_out: Sequence[Row], settings: DecisionSettings) -> list[Row]:
    """The rows of an evaluation as the filter decides today, without asking the policy again.

    What is dropped now and was not before has option B: which reason the policy would name was not stored, and its
    reward is unknown.

    Args:
        rows: of `PREDICTIONS`.
        held_out: of `HELD_OUT`, of the same evaluation.
        settings: the goal.
    """
    rules = {task: rule for task in Task if (rule := _stored_rule(held_out, task, settings))}
    return [_decided_at(r, rules[Task(r["task"])].threshold.value) if _has_rule(r, rules) else r for r in rows]


def _has_rule(row: Row, rules: Rules) -> bool:
    return row["mode"] == FILTER and row["skip"] is not None and Task(row["task"]) in rules


def _decided_at(row: Row, threshold: float) -> Row:
    dropped, before = row["skip"] >= threshold, row["predicted"] != Option.A
    return row if dropped == before else row | {"predicted": str(Option.B if dropped else Option.A), "reward": None}


def _stored_rule(held_out: Sequence[Row], task: Task, settings: DecisionSettings) -> DecisionRule | None:
    read = [r for r in held_out if r["task"] == task and r["options"]]
    options = [OptionProbabilities(dict(zip(TASK_OPTIONS[task], r["options"], strict=True)), 1.0) for r in read]
    golds = [Option(r["gold"]) if r["gold"] else None for r in read]
    return rule_from(options, [r["skipped"] for r in read], [r["user_id"] for r in read], golds, settings)


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


def _queries(
    items: Sequence[_Target],
    held_out: Sequence[Item],
    questions: Questions,
    inputs: Inputs,
    thoughts: int,
    seed: int,
    answered: Container[Question],
) -> Iterator[Query]:
    """Each question in each way, but those that are answered; the key is (way, number of the item)."""
    labels = {task: Labels.of(inputs, task) for task in Task}
    asked = (([item for item, _ in items], _ways(thoughts)), (held_out, _held_out_ways(thoughts)))
    for targets, ways in asked:
        for k, item in enumerate(targets):  # all ways of a target one after the other: they share its prompt
            if all((way, k) in answered for way in ways):
                continue
            prompt = questions.about_user(item.task, item.user_id, item.video_id)
            for way, temperature in ways.items():
                if (way, k) not in answered:
                    yield Query((way, k), prompt, sample_seed(seed, 0, k, way, 0), temperature, labels[item.task])


def _ways(thoughts: int) -> dict[str, float]:
    """How test targets are asked -> temperature."""
    return {GREEDY: 0.0, SAMPLED: 1.0} | {f"{SAMPLED} {n}": 1.0 for n in range(2, thoughts + 1)}


def _held_out_ways(thoughts: int) -> dict[str, float]:
    """As `_ways`, of held-out targets: only what decides."""
    return {f"{_HELD_OUT} {n}": 1.0 for n in range(1, thoughts + 1)} if thoughts > 1 else {_HELD_OUT: 0.0}


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
        "skip": prediction.options.skip if prediction.options else None,
        "play_rate": item.play_rate,
        "clicked": item.gold == Option.A if item.task == Task.CLICK else None,
        "answer": prediction.text,
    }


def _decided(
    mode: str, target: _Target, greedy: Row, raw: OptionProbabilities | None, rule: DecisionRule | None
) -> Row:
    """The greedy row with the option that a decision names; unchanged if no option can be read, or there is no rule."""
    row = {**greedy, "mode": mode}
    if raw is None or rule is None:
        return row
    item, options = target[0], rule.calibration.options(raw)
    threshold = rule.threshold.value if mode == FILTER else 0.5
    chosen = best_answer(options) if mode == CALIBRATED and item.reasons_known else options.at(threshold)
    row |= {"predicted": str(chosen), "skip": options.skip}
    if greedy["reward"] is not None:
        before = Option(greedy["predicted"]) if greedy["predicted"] else None
        row["reward"] = greedy["reward"] - _of_option(before, item) + _of_option(chosen, item)
    return row


def _uncalibrated(items: Sequence[_Target], rules: Rules) -> str:
    """Says for which tasks the modes `calibrated` and `filter` are only the greedy answers."""
    tasks = sorted({str(item.task) for item, _ in items if item.task not in rules})
    if not tasks:
        return ""
    return f"; not calibrated, so modes {CALIBRATED} and {FILTER} are the greedy answers: {', '.join(tasks)}"


def _of_option(option: Option | None, item: Item) -> float:
    """What an option adds to the reward: the judgement, and the choice where reasons are known."""
    return float(skip_right(option, item.gold)) + float(
        item.reasons_known and option is not None and option == item.gold
    )
