"""The stage `sensitivity-<policy>`: what a policy's answers depend on.

The first test targets that `gubs judge` draws are asked about once more, greedily, each under the conditions of
`conditions`. Table `answers` has what was asked and said; `figures` has each condition's quality and the share of
answers that it changes; `verdicts` compares it with the user's own prompt on the same targets, paired by user.
"""

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.artifacts import StageJob, code_version
from gubs.console import progress
from gubs.data.ifvr import PROFILES
from gubs.data.work import attempt_key
from gubs.errors import ArtifactError
from gubs.evaluate.answers import AnswerLog, Question
from gubs.evaluate.conditions import CHANGES, WHY_NOT, Condition, Subject, prompts, rotated
from gubs.evaluate.judge import as_predictions, item_order, judged_items
from gubs.evaluate.metrics import Bools, Floats, Predictions, judge_metrics, over_users, statistic_of, user_sums
from gubs.evaluate.scores import auc_over_users
from gubs.evaluate.settings import EvalSettings
from gubs.evaluate.table import VERDICT_METRIC
from gubs.evaluate.verdicts import Verdict, exchanges_for, paired, with_holm
from gubs.prompts.answers import read_answer
from gubs.prompts.question import meant
from gubs.records import TASK_OPTIONS, Option, Task
from gubs.ufm.inputs import Inputs, Prompt
from gubs.ufm.labels import Labels
from gubs.ufm.predict import Prediction, Query
from gubs.ufm.questions import UGM, Item, Questions
from gubs.ufm.sampling import profile_sampling, sample_seed
from gubs.ufm.settings import UFMSettings
from gubs.ufm.stage import policy_or_base

STAGE_PREFIX = "sensitivity-"
ANSWERS = pa.schema(
    [
        pa.field("interaction_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("condition", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        ("shown", pa.string()),
        ("gold", pa.string()),
        ("play_rate", pa.float64()),
        ("clicked", pa.bool_()),
        ("predicted", pa.string()),
        ("skip", pa.float64()),
        ("failure", pa.string()),
        ("answer", pa.string()),
        ("prompt", pa.string()),
    ]
)
"""One row per target and condition. `shown`: id of the user or group that the prompt is about; null for nobody's.
`predicted`, `skip` (the raw P(skip) at the letter): of permuted letters, what they stand for. `answer`: as it was
written."""
AUC, CHANGED, TURNED = "auc", "changed", "turned"
"""Figures: AUC of P(skip); share of answers that name another option than the own prompt's (no option is one too);
share of decisions that are turned around."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A target, and what was drawn for it."""

    item: Item
    similar: str | None
    """Another member of one of the user's groups."""
    group: str | None
    """A group of the user."""
    order: tuple[Option, ...]
    """Of the options, with permuted letters."""

    def shown(self, condition: Condition) -> str | None:
        """Whom the prompt is about: id of a user or a group; None = nobody."""
        other = {Condition.SIMILAR: self.similar, Condition.GROUP: self.group, Condition.NOBODY: None}
        return other.get(condition, self.item.user_id)


def drawn_targets(questions: Questions, count: int, seed: int, *, groups: bool) -> list[Target]:
    """The targets that are asked about: of each task, the first that `gubs judge` draws in the natural mix.

    Args:
        questions: of the run.
        count: most targets of each task.
        seed: of all that is drawn.
        groups: the run's groups may be used.
    """
    memberships, targets = questions.memberships if groups else {}, []
    for task in Task:
        items, members = judged_items(questions, task), questions.members(task) if groups else {}
        for number in item_order(len(items), task, seed)[:count]:
            item = items[number]
            draw = sample_seed(seed, 0, item.interaction_id, "sensitivity", 0)
            sampling = profile_sampling(item.user_id, draw, memberships, members)
            targets.append(Target(item, sampling.similar, sampling.group, rotated(task, draw)))
    return targets


def prompts_about(target: Target, questions: Questions) -> dict[Condition, Prompt]:
    """The prompts about a target by condition; its pictures are read for them."""
    item, people = target.item, questions.people(target.item.task)
    subject = Subject(
        task=item.task,
        person=people[item.user_id],
        video=questions.ifvr.videos[item.video_id],
        clip=questions.clip(item.task, item.video_id),
        cover=questions.clip(Task.CLICK, item.video_id),
        similar=people[target.similar].before(item.timestamp) if target.similar else None,
        group=questions.groups[target.group] if target.group else None,
        order=target.order,
    )
    return prompts(subject, questions.prompts)


def make(job: StageJob, ufm: UFMSettings, evaluate: EvalSettings, seed: int) -> str:
    """Asks a policy about test targets under every condition; writes `answers`, `figures` and `verdicts`.

    Raises:
        ArtifactError: there is no labelled target of a test user.
    """
    policy = job.stage.removeprefix(STAGE_PREFIX)
    folder = policy_or_base(job.run, policy, ufm)
    questions = Questions(job.run, ufm.inputs, tastes=job.reads(PROFILES))
    targets = drawn_targets(questions, evaluate.sensitivity.items, seed, groups=job.reads(UGM))
    if not targets:
        raise ArtifactError(f"{questions.ifvr.uri} has no labelled targets of test users: see splits.test_users")
    asked = {(c, n): p.text for n, target in enumerate(targets) for c, p in prompts_about(target, questions).items()}
    with job.writing(resume_key=attempt_key(job.recipe.fingerprint(job.kind), code_version())) as out:
        log = AnswerLog(out.run.fs, out.path("answers"))
        with progress("answers") as on_progress:
            if len(log.answers) < len(asked):
                new = queries(targets, questions, Inputs(folder, ufm.inputs), frozenset(log.answers), seed)
                log.fill(new, len(asked), folder, ufm, questions, on_progress)
        rows = [row(targets[n], c, text, log.answers[c, n], ufm) for (c, n), text in asked.items()]
        fine = {"resamples": evaluate.bootstrap, "seed": seed}
        out.write_table("answers", pa.Table.from_pylist(rows, schema=ANSWERS))
        out.write_table("figures", pa.Table.from_pylist(figures(rows, **fine)))
        out.write_table("verdicts", pa.Table.from_pylist(verdicts(rows, **fine)))
        out.info = {"policy": policy, "left_out": left_out(rows), "style": ufm.inputs.style}
        out.summary = f"{len(targets):,} targets, {len(rows):,} answers"
        out.remove("answers")  # last: killed before, the next attempt still finds them
    return out.summary


def queries(
    targets: Sequence[Target], questions: Questions, inputs: Inputs, answered: Container[Question], seed: int
) -> Iterator[Query]:
    """What is not answered; the key is (condition, number of the target)."""
    labels = {task: Labels.of(inputs, task) for task in Task}
    for number, target in enumerate(targets):
        for condition, prompt in prompts_about(target, questions).items():
            if (condition, number) not in answered:
                draw = sample_seed(seed, 0, number, condition, 0)
                yield Query((condition, number), prompt, draw, labels=labels[target.item.task])


def row(target: Target, condition: Condition, prompt: str, prediction: Prediction, ufm: UFMSettings) -> Row:
    """One answer as a row of `ANSWERS`."""
    item, order = target.item, target.order if condition is Condition.LETTERS else ()

    def stands_for(letter: Option) -> Option:
        return meant(letter, item.task, order, ufm.inputs.style)

    options, reading = prediction.options, None
    if options:
        options = replace(options, options={stands_for(letter): p for letter, p in options.options.items()})
    if prediction.text is not None:
        reading = read_answer(prediction.text, TASK_OPTIONS[item.task], finished=prediction.finished)
    return {
        "interaction_id": item.interaction_id,
        "task": str(item.task),
        "condition": str(condition),
        "user_id": item.user_id,
        "video_id": item.video_id,
        "shown": target.shown(condition),
        "gold": str(item.gold) if item.gold else None,
        "play_rate": item.play_rate,
        "clicked": item.gold == Option.A if item.task == Task.CLICK else None,
        "predicted": str(stands_for(reading.option)) if reading and reading.option else None,
        "skip": options.skip if options else None,
        "failure": "too_long" if reading is None else str(reading.failure) if reading.failure else None,
        "answer": prediction.text,
        "prompt": prompt,
    }


def figures(rows: Sequence[Row], *, resamples: int, seed: int) -> list[Row]:
    """Quality of each condition and share of changed answers: task, condition, name, value, low, high, n, users."""
    figure_rows = []
    for task, condition, part, own in _beside_own(rows):
        answers = as_predictions(part, task)
        values = _quality(answers, part, resamples, seed)
        if condition is not Condition.OWN:
            values |= _changes(answers, as_predictions(own, task), resamples, seed)
        about = {"task": str(task), "condition": str(condition), "n": len(part), "users": len(set(answers.user))}
        figure_rows += [{**about, "name": name, **value} for name, value in values.items()]
    return figure_rows


def verdicts(rows: Sequence[Row], *, resamples: int, seed: int) -> list[Row]:
    """Each condition against the own prompt in balanced accuracy; Holm's correction is over those of a task."""
    by_task: dict[Task, list[Verdict]] = defaultdict(list)
    for task, condition, part, own in _beside_own(rows):
        if condition is Condition.OWN:
            continue
        metric = VERDICT_METRIC[task]
        fine = {"resamples": resamples, "exchanges": exchanges_for(len(CHANGES)), "seed": seed}
        changed, before = (user_sums(as_predictions(answers, task)) for answers in (part, own))
        verdict = paired(changed, before, statistic_of(metric, task), **fine)
        by_task[task].append(replace(verdict, metric=metric, first=str(condition), second=str(Condition.OWN)))
    return [{"task": str(task), **v.to_row()} for task, made in by_task.items() for v in with_holm(made)]


def left_out(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Conditions under which no target of a task could be asked about, with the reason."""
    asked = {(r["task"], r["condition"]) for r in rows}
    return {
        task: missing
        for task in dict.fromkeys(r["task"] for r in rows)
        if (missing := {str(c): _why_not(c) for c in CHANGES if (task, str(c)) not in asked})
    }


def _why_not(condition: Condition) -> str:
    return WHY_NOT.get(condition, "the prompts would be the users' own")


def _beside_own(rows: Sequence[Row]) -> Iterator[tuple[Task, Condition, list[Row], list[Row]]]:
    """The answers of each task and condition, and those to the own prompt about the same targets."""
    parts: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for r in rows:
        parts[r["task"], r["condition"]].append(r)
    for task in Task:
        own = {r["interaction_id"]: r for r in parts[task, Condition.OWN]}
        for condition in Condition:
            if part := parts[task, condition]:
                yield task, condition, part, [own[r["interaction_id"]] for r in part]


def _quality(answers: Predictions, rows: Sequence[Row], resamples: int, seed: int) -> dict[str, dict[str, float]]:
    metrics = judge_metrics(answers, resamples=resamples, seed=seed)
    judged = next(m for m in metrics if m.name == VERDICT_METRIC[answers.task])
    score = np.array([r["skip"] or 0.0 for r in rows])  # without a readable answer a video is kept
    ranked = auc_over_users(answers, score, resamples=resamples, seed=seed)
    return {judged.name: {"value": judged.value, "low": judged.low, "high": judged.high}, AUC: ranked}


def _changes(answers: Predictions, own: Predictions, resamples: int, seed: int) -> dict[str, dict[str, float]]:
    changed = {CHANGED: answers.said_code != own.said_code, TURNED: answers.kept != own.kept}
    fine = {"resamples": resamples, "seed": seed}
    return {name: over_users(answers.user, partial(_share, which), **fine) for name, which in changed.items()}


def _share(which: Bools, weights: Floats) -> Floats:
    return np.asarray((weights * which).sum(axis=-1) / weights.sum(axis=-1))
