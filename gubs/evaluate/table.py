"""The IF-VR table: any predictor's stored predictions in the columns of the paper's Table 2, with bars beside them.

Rows are policies (`eval-<policy>`), baselines (`bars`) and files of predictions from elsewhere; all are compared on the
targets that every one of them answered. Judging is shown with what filtering costs: the share kept, the watched videos
lost, and a random drop of the same share. A predictor that gives a score has a curve over all shares kept too, and
stands beside the others at the same share.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gubs.artifacts import JsonObject, Run
from gubs.errors import ArtifactError
from gubs.evaluate.bars import BARS
from gubs.evaluate.baselines.statistics import LEARNERS
from gubs.evaluate.compare import CONSTANTS
from gubs.evaluate.judge import CALIBRATED
from gubs.evaluate.metrics import (
    UNANSWERED_KEPT,
    UNANSWERED_WRONG,
    UNDEFINED,
    Floats,
    Metric,
    Predictions,
    Sums,
    baselines,
    evaluate,
    over_users,
    ratio,
    well_formed_rewards,
)
from gubs.evaluate.predictors import KEYS, REWARD, Stored, collect, evaluations
from gubs.evaluate.scores import RANDOM, auc_over_users, curve, figures_at, verdicts_at, without_repeats
from gubs.evaluate.verdicts import Verdict, exchanges_for, paired, verdicts, with_holm
from gubs.records import FAST_SKIP_BELOW, TASK_OPTIONS, Option, Task

ORIGINAL = "Original recommendation"
COLUMNS = {
    Task.SEQUENTIAL: (
        *("person_play_rate", "total_play_rate", "finish_rate", "play_rate_above_30", "judge_f1", "judge_acc"),
        *("judge_balanced_acc", "judge_mcc", "auc", "reason_f1", "reason_acc", "reward"),
        *("share_kept", "share_watched_lost", "users_without_video"),
    ),
    Task.CLICK: (
        *("click_rate", "click_f1", "click_acc", "click_balanced_acc", "click_mcc", "auc", "reward", "share_kept"),
        *("share_clicked_lost", "users_without_video"),
    ),
}
"""Columns of a task's table, in order."""
COUNTS = frozenset({"users_without_video"})
"""Columns that are numbers of users, not shares."""
VERDICT_METRIC = {Task.SEQUENTIAL: "judge_balanced_acc", Task.CLICK: "click_balanced_acc"}
"""What predictors are compared by."""
_SCORED: Mapping[str, JsonObject] = {
    "auc": {
        "averaging": "pooled, equal scores count half",
        "empty": UNDEFINED,
        "unanswered": UNANSWERED_KEPT,
        "base_rate": 0.5,
    },
    REWARD: {"positive": "R of Eq. 4", "averaging": "pooled", "empty": UNDEFINED, "unanswered": UNANSWERED_WRONG},
}
"""The contract of the columns that are no metric of answers alone."""
Answers = Mapping[str, tuple[Predictions, Floats]]
"""By predictor: its answers about the same items, and their scores [n]."""


@dataclass(frozen=True)
class TableRow:
    """One row of the table."""

    name: str
    kind: str
    values: Mapping[str, Mapping[str, float]]
    """column -> value, low, high; columns that do not apply are left out."""
    random_drop: Mapping[str, float]
    """The filter's columns if as many videos were dropped at random."""


@dataclass(frozen=True)
class Table:
    """One task's table."""

    task: str
    items: int
    users: int
    base_rate: float
    """Share of skips (clicks)."""
    rows: tuple[TableRow, ...]
    curves: Mapping[str, Sequence[Mapping[str, float]]]
    """predictor -> points; see `curve`."""
    at_share: Mapping[str, Mapping[str, Mapping[str, float]]]
    """predictor -> figure -> value, low, high, where all keep the same share; see `figures_at`."""
    verdicts: tuple[Verdict, ...]
    contracts: tuple[Mapping[str, Any], ...]
    """Of each column: name, positive, averaging, empty, unanswered, base_rate; see `Metric`."""
    notes: tuple[str, ...]

    def to_json(self) -> JsonObject:
        """As plain JSON."""
        return asdict(self)

    @property
    def policies(self) -> frozenset[str]:
        """Names of the rows that are policies."""
        return frozenset(row.name for row in self.rows if row.kind == "policy")


def rewards_in_words(table: Table, policies: Sequence[str]) -> str:
    """The mean rewards of policies' calibrated answers, of the baselines that choose options and of the constant that
    drops nothing, in one line; those that the table does not have are left out.
    """
    rows = {p: f"{p}, {CALIBRATED}" for p in policies} | {learner: f"{learner}, by reward" for learner in LEARNERS}
    constant = CONSTANTS[Task(table.task)][1]
    rewards = {r.name: r.values[REWARD]["value"] for r in table.rows if REWARD in r.values}
    rows[constant] = constant
    shown = ", ".join(f"{name} {rewards[row]:.2f}" for name, row in rows.items() if row in rewards)
    return f"    mean reward (0-3), calibrated: {shown}"


def tables(run: Run, files: Mapping[str, str], *, least_users: int, resamples: int, seed: int) -> list[Table]:
    """One table per task that the run has baselines for.

    Args:
        run: has the artifact `bars`, and `eval-<policy>` of each policy.
        files: predictions from elsewhere (see `read_file`), by name.
        least_users: tables about fewer users are flagged.
        resamples: of the intervals and the verdicts.
        seed: of the resamples.

    Raises:
        ArtifactError: the run has no baselines, predictors have no target in common, or gold options differ.
        InputError: a file cannot be used.
    """
    made = []
    left_out = [
        f"{e.stage} is left out: it was made from another {', '.join(e.remade_inputs())}"
        for e in evaluations(run)
        if e.remade_inputs()
    ]
    for task in Task:
        predictors, happened = collect(run, task, files)
        if predictors:
            table = build(predictors, happened, task, least_users=least_users, resamples=resamples, seed=seed)
            trained_on = run.artifact(BARS).manifest.info[str(task)]["videos_trained_on"]
            note = f"{100 * trained_on:.0f} % of the test targets are about videos that training targets are about too"
            made.append(replace(table, notes=(*table.notes, note, *left_out)))
    return made


def build(
    predictors: Sequence[Stored],
    happened: pd.DataFrame,
    task: Task,
    *,
    least_users: int,
    resamples: int,
    seed: int,
) -> Table:
    """The table of one task, on the targets that all predictors answered.

    Raises:
        ArtifactError: there is none.
    """
    fine: dict[str, Any] = {"resamples": resamples, "seed": seed}
    truth = _common(predictors, happened, task)
    answers = {p.name: _aligned(p, truth, task) for p in predictors}
    first = next(iter(answers.values()))[0]
    rewards = _constant_rewards(first) | _rewards(predictors, answers, truth)
    rows = [_original(truth, task, **fine), *_constants(first, **fine)]
    rows += [_row(p, *answers[p.name], **fine) for p in predictors]
    scored = {name: score for name, (_, score) in answers.items() if np.isfinite(score).all()}
    at_share = {RANDOM: np.zeros(len(truth)), **scored}
    return Table(
        task=str(task),
        items=len(truth),
        users=len(truth["user_id"].unique()),
        base_rate=float(first.positive.mean()),
        rows=tuple(_with_reward(row, rewards.get(row.name), first.user, **fine) for row in rows),
        curves={name: curve(score, first) for name, score in scored.items()},
        at_share={name: figures_at(score, first, **fine) for name, score in at_share.items()},
        verdicts=(
            *_verdicts(predictors, answers, task, **fine),
            *_reward_verdicts(predictors, rewards, first.user, **fine),
            *_share_verdicts(predictors, scored, first, **fine),
        ),
        contracts=tuple(_contracts(first)),
        notes=(*_notes(truth, first, least_users, happened), *_unanswered(predictors, truth)),
    )


def _common(predictors: Sequence[Stored], happened: pd.DataFrame, task: Task) -> pd.DataFrame:
    """What happened to the targets that all predictors answered, by user.

    Raises:
        ArtifactError: there is none.
    """
    common = set.intersection(*(set(p.frame["interaction_id"]) for p in predictors))
    if not common:
        raise ArtifactError(f"{task}: no target was answered by all of {', '.join(p.name for p in predictors)}")
    base = predictors[0].frame
    truth = base.loc[base["interaction_id"].isin(common), ["interaction_id", "user_id"]].merge(happened)
    return truth.sort_values(["user_id", "interaction_id"], ignore_index=True)


def _aligned(predictor: Stored, truth: pd.DataFrame, task: Task) -> tuple[Predictions, Floats]:
    """A predictor's answers in the order of the truth, and its scores."""
    frame = predictor.frame.set_index("interaction_id").loc[truth["interaction_id"]]
    rate = [None if v is None or v != v else float(v) for v in truth["play_rate"].tolist()]
    clicked = [None if v is None or v != v else bool(v) for v in truth["clicked"].tolist()]
    sequential = task is Task.SEQUENTIAL
    predictions = Predictions(
        user=truth["user_id"].tolist(),
        gold=_options(truth["gold"]),
        predicted=_options(frame["predicted"]),
        task=task,
        play_rate=rate if sequential else None,
        clicked=None if sequential else clicked,
    )
    return predictions, frame["score"].to_numpy(dtype=float)


def _options(column: pd.Series) -> list[str | None]:
    """Option letters; None for what pandas has for null, which depends on the column's type."""
    return [value if isinstance(value, str) else None for value in column]


# Rows


def _row(predictor: Stored, answers: Predictions, score: Floats, *, resamples: int, seed: int) -> TableRow:
    values = _values(evaluate(answers, resamples=resamples, seed=seed), answers.task)
    if not predictor.reasons or not (answers.gold_code > 0).any():
        values = {name: v for name, v in values.items() if not name.startswith("reason")}
    if np.isfinite(score).all():
        values["auc"] = auc_over_users(answers, score, resamples=resamples, seed=seed)
    drop = baselines(answers, resamples=0, seed=seed)["random drop, expected"]
    return TableRow(predictor.name, predictor.kind, values, {m.name: m.value for m in drop})


def _original(truth: pd.DataFrame, task: Task, resamples: int, seed: int) -> TableRow:
    """Everything is kept: what the recommender offers."""
    everything = Stored(ORIGINAL, truth.assign(predicted="A", score=np.nan, reward=np.nan)[KEYS], False, "baseline")
    answers, _ = _aligned(everything, truth, task)
    values = _values(evaluate(answers, resamples=resamples, seed=seed), task)
    judged = ("judge", "reason", "click_f1", "click_acc", "click_balanced", "click_mcc")
    return TableRow(ORIGINAL, "baseline", {n: v for n, v in values.items() if not n.startswith(judged)}, {})


def _constants(truth: Predictions, resamples: int, seed: int) -> list[TableRow]:
    """Both constants and the coin: what judging is worth without looking."""
    rows = baselines(truth, resamples=resamples, seed=seed)
    values = {name: _values(rows[name], truth.task) for name in CONSTANTS[truth.task]}
    return [
        TableRow(name, "baseline", {n: v for n, v in of_row.items() if not n.startswith("reason")}, {})
        for name, of_row in values.items()
    ]


def _values(metrics: Sequence[Metric], task: Task) -> dict[str, dict[str, float]]:
    return {m.name: {"value": m.value, "low": m.low, "high": m.high} for m in metrics if m.name in COLUMNS[task]}


def _contracts(truth: Predictions) -> Iterable[dict[str, Any]]:
    """What each column means, in the order of the columns."""
    fields = ("name", "positive", "averaging", "empty", "unanswered", "base_rate")
    of_metric = {m.name: {f: getattr(m, f) for f in fields} for m in evaluate(truth, resamples=0)}
    dropped = "fast skip" if truth.task is Task.SEQUENTIAL else "no click"
    of_score = {name: {"name": name, "positive": dropped, "base_rate": math.nan, **c} for name, c in _SCORED.items()}
    return ((of_metric | of_score)[column] for column in COLUMNS[truth.task])


# Rewards


def _rewards(predictors: Sequence[Stored], answers: Answers, truth: pd.DataFrame) -> dict[str, Floats]:
    """The reward of each answer, [N], of predictors that are rewarded; NaN where the reason of a skip is unknown."""
    rewards = {}
    for predictor in predictors:
        if predictor.kind == "policy":
            given = predictor.frame.set_index("interaction_id")[REWARD].loc[truth["interaction_id"]]
            rewards[predictor.name] = given.to_numpy(dtype=float)
        elif predictor.kind == "baseline" and predictor.reasons:
            rewards[predictor.name] = well_formed_rewards(answers[predictor.name][0])
    return rewards


def _constant_rewards(truth: Predictions) -> dict[str, Floats]:
    """The rewards of both constants, [N] each: A, or the commonest other option, to everything."""
    options = TASK_OPTIONS[truth.task]
    others = [truth.gold.count(o) for o in options[1:]]
    commonest = options[1 + int(np.argmax(others))]
    no, yes = (Option.A, commonest) if truth.task is Task.SEQUENTIAL else (commonest, Option.A)
    named = zip(CONSTANTS[truth.task], (yes, no), strict=False)
    return {name: well_formed_rewards(replace(truth, predicted=[option] * len(truth))) for name, option in named}


def _with_reward(row: TableRow, rewards: Floats | None, users: Sequence[str], *, resamples: int, seed: int) -> TableRow:
    given = np.zeros(0, bool) if rewards is None else ~np.isnan(rewards)
    if rewards is None or not given.any():
        return row
    mean = partial(_weighted_mean, rewards[given])
    figure = over_users(np.asarray(users)[given].tolist(), mean, resamples=resamples, seed=seed)
    return replace(row, values={**row.values, REWARD: figure})


def _weighted_mean(values: Floats, weights: Floats) -> Floats:
    return np.asarray((weights @ values) / weights.sum(axis=-1))


def _reward_sums(rewards: Floats, code: npt.NDArray[np.intp]) -> dict[str, Floats]:
    given = ~np.isnan(rewards)
    return {
        "items": np.bincount(code).astype(np.float64),
        REWARD: np.bincount(code, np.nan_to_num(rewards)).astype(np.float64),
        "rewarded": np.bincount(code, given).astype(np.float64),
    }


def _mean_reward(sums: Sums) -> Floats:
    return ratio(sums[REWARD], sums["rewarded"])


# Verdicts


def _pairs(rows: Sequence[Stored], names: Collection[str], bars: Iterable[str]) -> list[tuple[str, str]]:
    """Every row against every bar, and policies against those of `names` that they were trained from."""
    beside = [(row.name, rival) for row in rows for rival in row.rivals if rival in names]
    return [*beside, *((row.name, bar) for row in rows for bar in bars)]


def _verdicts(
    predictors: Sequence[Stored], answers: Answers, task: Task, *, resamples: int, seed: int
) -> list[Verdict]:
    """Every policy and file against every baseline, and policies against what they were trained from."""
    rows, bars = _rows_and_bars(predictors)
    pairs = _pairs(rows, answers, [bar.name for bar in bars])
    predictions = {name: about for name, (about, _) in answers.items()}
    return verdicts(predictions, pairs, VERDICT_METRIC[task], resamples=resamples, seed=seed) if pairs else []


def _rows_and_bars(predictors: Sequence[Stored]) -> tuple[list[Stored], list[Stored]]:
    return [p for p in predictors if p.kind != "baseline"], [p for p in predictors if p.kind == "baseline"]


def _reward_verdicts(
    predictors: Sequence[Stored], rewards: Mapping[str, Floats], users: Sequence[str], *, resamples: int, seed: int
) -> list[Verdict]:
    """Every policy's reward against that of the constants, of the baselines that have one, and of its rivals."""
    policies = [p for p in predictors if p.kind == "policy"]
    names = {p.name for p in policies}
    pairs = _pairs(policies, names, [name for name in rewards if name not in names])
    _, code = np.unique(np.asarray(users, dtype=np.str_), return_inverse=True)
    sums = {name: _reward_sums(values, code) for name, values in rewards.items()}
    fine = {"resamples": resamples, "exchanges": exchanges_for(len(pairs)), "seed": seed}
    raw = [replace(paired(sums[a], sums[b], _mean_reward, **fine), metric=REWARD, first=a, second=b) for a, b in pairs]
    return with_holm([v for v in raw if not math.isnan(v.difference)])


def _share_verdicts(
    predictors: Sequence[Stored], scored: Mapping[str, Floats], truth: Predictions, *, resamples: int, seed: int
) -> list[Verdict]:
    """Policies and files at the same share of videos kept: against a random drop, the learned baselines, and their
    rivals.
    """
    rows, bars = _rows_and_bars([p for p in predictors if p.name in scored])
    distinct = without_repeats(scored, [row.name for row in rows])
    learned = [bar.name for bar in bars if bar.name.startswith(tuple(LEARNERS))]
    pairs = _pairs([row for row in rows if row.name in distinct], scored, [RANDOM, *learned])
    return verdicts_at(scored, pairs, truth, resamples=resamples, seed=seed) if pairs else []


# Notes


def _notes(truth: pd.DataFrame, answers: Predictions, least_users: int, happened: pd.DataFrame) -> list[str]:
    notes, users = [], len(set(answers.user))
    if answers.positive.all() or not answers.positive.any():
        notes.append("all targets have the same outcome: most figures are undefined, and nothing is compared")
    if users < least_users:
        listed = f"{users} test user{'s' if users > 1 else ''}"
        notes.append(f"only {listed} (evaluate.least_users={least_users}): these figures tell little apart")
    if len(truth) < len(happened):
        notes.append(f"{len(truth):,} of {len(happened):,} targets: those that every predictor answered")
    unexplained = int((truth["gold"].isna() & (truth["play_rate"] < FAST_SKIP_BELOW)).sum())
    if unexplained and answers.task is Task.SEQUENTIAL:
        notes.append(f"{unexplained:,} skips without a known reason: they count for the judge, not for the reason")
    return notes


def _unanswered(predictors: Sequence[Stored], truth: pd.DataFrame) -> Iterable[str]:
    """How many answers of each policy cannot be read, by cause; without one of the causes, none is a cause too."""
    for predictor in predictors:
        if predictor.kind != "policy":
            continue
        frame = predictor.frame[predictor.frame["interaction_id"].isin(truth["interaction_id"])]
        unread = frame[frame["predicted"].isna()]
        causes = unread["failure"] if "failure" in unread else pd.Series([None] * len(unread), dtype=object)
        counts = causes.fillna("not told").value_counts()
        listed = ", ".join(f"{cause} {n:,}" for cause, n in sorted(counts.items()))
        yield f"without a readable answer, {predictor.name}: {listed or 'none'}"
