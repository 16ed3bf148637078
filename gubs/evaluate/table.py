"""The IF-VR table: any predictor's stored predictions in the columns of the paper's Table 2, with bars beside them.

Rows are policies (`eval-<policy>`), baselines (`bars`) and files of predictions from elsewhere; all are compared on the
targets that every one of them answered. Judging is shown with what filtering costs: the share kept, the watched videos
lost, and a random drop of the same share. A predictor that gives a score has a curve over all thresholds too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from gubs.artifacts import Artifact, JsonObject, Run
from gubs.errors import ArtifactError, InputError
from gubs.evaluate.bars import BARS
from gubs.evaluate.compare import CONSTANTS
from gubs.evaluate.feedback import Bools, Floats
from gubs.evaluate.judge import CALIBRATED, FILTER, GREEDY, STAGE_PREFIX
from gubs.evaluate.metrics import Metric, Predictions, Sums, baselines, evaluate, over_users, well_formed_rewards
from gubs.evaluate.verdicts import Verdict, exchanges_for, paired, verdicts, with_holm
from gubs.records import FAST_SKIP_BELOW, TASK_OPTIONS, Option, Task

ORIGINAL, RANDOM = "Original recommendation", "random drop of the same share"
COLUMNS = {
    Task.SEQUENTIAL: (
        *("person_play_rate", "total_play_rate", "finish_rate", "play_rate_above_30", "judge_f1", "judge_acc"),
        *("judge_balanced_acc", "auc", "reason_f1", "reason_acc", "reward", "share_kept", "share_watched_lost"),
    ),
    Task.CLICK: (
        *("click_rate", "click_f1", "click_acc", "click_balanced_acc", "auc", "reward", "share_kept"),
        "share_clicked_lost",
    ),
}
"""Columns of a task's table, in order."""
REWARD = "reward"
"""R of Eq. 4, from 0 to 3 (to 2 where no reason of a skip is known). Without a model an answer is well-formed."""
VERDICT_METRIC = {Task.SEQUENTIAL: "judge_balanced_acc", Task.CLICK: "click_balanced_acc"}
"""What predictors are compared by."""
_MODES = {GREEDY: "", CALIBRATED: ", calibrated", FILTER: ", filter"}
"""Modes of a policy's answers that take a row each, and what their names end with."""
_CURVE = tuple(round(0.05 * k, 2) for k in range(1, 21))
"""Shares of videos kept at which a curve is measured."""
_AUC_RESAMPLES = 200
"""Of users, for the intervals of AUC, which sorts all items in each."""
_KEYS = ["interaction_id", "user_id", "predicted", "score", REWARD]


@dataclass(frozen=True)
class Stored:
    """What one predictor said about targets of one task."""

    name: str
    frame: pd.DataFrame
    """interaction_id, user_id, predicted (option or None), score (or NaN), reward (NaN: none was given)."""
    reasons: bool
    """Whether it names reasons of skips, as far as they are known."""
    kind: str
    """`policy`, `baseline` or `file`."""


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
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    def to_json(self) -> JsonObject:
        """As plain JSON."""
        return asdict(self)


def tables(run: Run, files: Mapping[str, str], *, least_users: int, resamples: int, seed: int) -> list[Table]:
    """One table per task that the run has baselines for.

    Args:
        run: has the artifact `bars`, and `eval-<policy>` of each policy.
        files: predictions from elsewhere (see `read_file`), by name.
        least_users: tables about fewer users are flagged.
        resamples: of the intervals and the verdicts.
        seed: of the resamples.

    Raises:
        ArtifactError: the run has no baselines, or predictors have no target in common.
    """
    found = []
    left_out = [
        f"{e.stage} is left out: it was made from another {', '.join(e.remade_inputs())}"
        for e in _evaluations(run)
        if e.remade_inputs()
    ]
    for task in Task:
        predictors, happened = collect(run, task, files)
        if predictors:
            table = build(predictors, happened, task, least_users=least_users, resamples=resamples, seed=seed)
            known = run.artifact(BARS).manifest.info[str(task)]["videos_trained_on"]
            note = f"{100 * known:.0f} % of the test targets are about videos that training targets are about too"
            found.append(replace(table, notes=(*table.notes, note, *left_out)))
    return found


def _evaluations(run: Run) -> list[Artifact]:
    return [run.artifact(stage) for stage in run.stages() if stage.startswith(STAGE_PREFIX)]


def collect(run: Run, task: Task, files: Mapping[str, str]) -> tuple[list[Stored], pd.DataFrame]:
    """All predictors of a task, and what happened: interaction_id, play_rate, clicked, gold."""
    bars = run.artifact(BARS).table("predictions").to_pandas()
    bars = bars[bars["task"] == str(task)]
    if bars.empty:
        return [], bars
    bars[REWARD], by_reward = np.nan, run.artifact(BARS).manifest.info[str(task)].get("by_reward", [])
    predictors = [Stored(str(n), f[_KEYS], n in by_reward, "baseline") for n, f in bars.groupby("method", sort=False)]
    happened = bars.drop_duplicates("interaction_id")[["interaction_id", "play_rate", "clicked"]]
    happened = happened.assign(gold=None)
    for evaluation in (e for e in _evaluations(run) if not e.remade_inputs()):
        frame = evaluation.table("predictions").to_pandas()
        frame = frame[(frame["task"] == str(task)) & frame["natural"]]
        frame = frame.assign(score=frame["skip"].fillna(0.0))  # without a readable answer a video is kept
        for mode, suffix in _MODES.items():
            part = frame[frame["mode"] == mode]
            if len(part):
                golds = part.set_index("interaction_id")["gold"]
                happened["gold"] = happened["interaction_id"].map(golds)
                name = evaluation.stage.removeprefix(STAGE_PREFIX) + suffix
                predictors.append(Stored(name, part[_KEYS], True, "policy"))
    predictors += [Stored(n, read_file(path, task, happened), True, "file") for n, path in files.items()]
    return predictors, happened


def read_file(path: str, task: Task, happened: pd.DataFrame) -> pd.DataFrame:
    """Predictions from elsewhere: Parquet with interaction_id, predicted (an option or null) and, if known, score.

    Raises:
        InputError: a column is missing, or no row is about a target of this run.
    """
    frame = pq.read_table(path).to_pandas()
    missing = {"interaction_id", "predicted"} - set(frame.columns)
    if missing:
        raise InputError(f"{path}: no column {', '.join(sorted(missing))}; it needs interaction_id and predicted")
    frame = frame[frame["task"] == str(task)] if "task" in frame else frame
    frame = frame[frame["interaction_id"].isin(happened["interaction_id"])].drop_duplicates("interaction_id")
    if frame.empty:
        raise InputError(f"{path}: no row is about a {task} target of this run's test users")
    frame = frame if "score" in frame else frame.assign(score=np.nan)
    return frame.assign(user_id="", **{REWARD: np.nan})[_KEYS]


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
    common = set.intersection(*(set(p.frame["interaction_id"]) for p in predictors))
    if not common:
        raise ArtifactError(f"{task}: no target was answered by all of {', '.join(p.name for p in predictors)}")
    base = predictors[0].frame
    truth = base.loc[base["interaction_id"].isin(common), ["interaction_id", "user_id"]].merge(happened)
    truth = truth.sort_values(["user_id", "interaction_id"], ignore_index=True)
    said = {p.name: _aligned(p, truth, task) for p in predictors}
    first = next(iter(said.values()))[0]
    fine: dict[str, Any] = {"resamples": resamples, "seed": seed}
    rewards = _constant_rewards(first) | _rewards(predictors, {n: p for n, (p, _) in said.items()}, truth)
    rows = [_original(truth, task, resamples, seed), *_constants(first, resamples, seed)]
    rows += [_row(p, *said[p.name], **fine) for p in predictors]
    rows = [_with_reward(row, rewards.get(row.name), first.user, **fine) for row in rows]
    scored = {name: score for name, (_, score) in said.items() if np.isfinite(score).all()}
    users = len(truth["user_id"].unique())
    return Table(
        task=str(task),
        items=len(truth),
        users=users,
        base_rate=float(first.positive.mean()),
        rows=tuple(rows),
        curves={name: curve(score, first) for name, score in scored.items()},
        verdicts=(
            *_verdicts(predictors, {n: p for n, (p, _) in said.items()}, task, resamples, seed),
            *_reward_verdicts(predictors, rewards, first.user, resamples, seed),
        ),
        notes=tuple(_notes(truth, first, least_users, happened)),
    )


def curve(score: Floats, truth: Predictions) -> list[dict[str, float]]:
    """What is kept when the videos with the lowest scores are kept, at each share; ties in the order of the items.

    Points: share_kept; play_rate_above_30 and total_play_rate (sequential) or click_rate (click) of what is kept;
    lost, the share of watched (clicked) videos that are dropped.
    """
    good = ~truth.bad
    order, rate = np.argsort(score, kind="stable"), np.nan_to_num(truth.rate)
    kept_good, kept_rate = np.cumsum(good[order]), np.cumsum(rate[order])
    points = []
    for share in _CURVE:
        n = max(1, round(share * len(score)))
        point = {"share_kept": n / len(score), "lost": float(1 - kept_good[n - 1] / max(1, good.sum()))}
        if truth.task is Task.CLICK:
            point["click_rate"] = float(kept_good[n - 1] / n)
        else:
            point |= {"play_rate_above_30": float(kept_good[n - 1] / n), "total_play_rate": float(kept_rate[n - 1] / n)}
        points.append(point)
    return points


def auc(score: Floats, bad: Bools, weights: Floats | None = None) -> Floats:
    """Area under the ROC curve: how often a bad item has the higher score; equal scores count half.

    Args:
        score: [n].
        bad: [n].
        weights: of the items, [..., n]; default 1.

    Returns:
        [...]; NaN where there is only one class.
    """
    weights = np.ones(len(score)) if weights is None else weights
    order = np.argsort(score, kind="stable")
    ranked, labels = score[order], bad[order]
    group = np.flatnonzero(np.concatenate([[True], ranked[1:] > ranked[:-1]]))
    yes, no = (np.add.reduceat(weights[..., order] * mask, group, axis=-1) for mask in (labels, ~labels))
    below = np.cumsum(no, axis=-1) - 0.5 * no
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((yes * below).sum(axis=-1) / (yes.sum(axis=-1) * no.sum(axis=-1)))


def auc_over_users(said: Predictions, score: Floats, *, resamples: int, seed: int) -> dict[str, float]:
    """AUC of a score [n] that grows with what a filter should drop, with its interval: `value`, `low`, `high`."""
    fine = {"resamples": min(resamples, _AUC_RESAMPLES), "seed": seed}
    return over_users(said.user, partial(auc, score, said.bad), **fine)


def _aligned(predictor: Stored, truth: pd.DataFrame, task: Task) -> tuple[Predictions, Floats]:
    """A predictor's answers in the order of the truth, and its scores."""
    frame = predictor.frame.set_index("interaction_id").loc[truth["interaction_id"]]
    gold, said = _options(truth["gold"]), _options(frame["predicted"])
    rate = [None if v is None or v != v else float(v) for v in truth["play_rate"].tolist()]
    clicked = [None if v is None or v != v else bool(v) for v in truth["clicked"].tolist()]
    sequential = task is Task.SEQUENTIAL
    predictions = Predictions(
        user=truth["user_id"].tolist(),
        gold=gold,
        predicted=said,
        task=task,
        play_rate=rate if sequential else None,
        clicked=None if sequential else clicked,
    )
    return predictions, frame["score"].to_numpy(dtype=float)


def _options(column: pd.Series) -> list[str | None]:
    """Option letters; None for what pandas has for null, which depends on the column's type."""
    return [value if isinstance(value, str) else None for value in column]


def _row(predictor: Stored, said: Predictions, score: Floats, *, resamples: int, seed: int) -> TableRow:
    values = _values(evaluate(said, resamples=resamples, seed=seed), said.task)
    if not predictor.reasons or not (said.gold_code > 0).any():
        values = {name: v for name, v in values.items() if not name.startswith("reason")}
    if np.isfinite(score).all():
        values["auc"] = auc_over_users(said, score, resamples=resamples, seed=seed)
    drop = baselines(said, resamples=0, seed=seed)["random drop, expected"]
    return TableRow(predictor.name, predictor.kind, values, {m.name: m.value for m in drop})


def _original(truth: pd.DataFrame, task: Task, resamples: int, seed: int) -> TableRow:
    """Everything is kept: what the recommender offers."""
    everything = Stored(ORIGINAL, truth.assign(predicted="A", score=np.nan, reward=np.nan)[_KEYS], False, "baseline")
    said, _ = _aligned(everything, truth, task)
    values = _values(evaluate(said, resamples=resamples, seed=seed), task)
    judged = ("judge", "reason", "click_f1", "click_acc", "click_balanced")
    return TableRow(ORIGINAL, "baseline", {n: v for n, v in values.items() if not n.startswith(judged)}, {})


def _constants(truth: Predictions, resamples: int, seed: int) -> list[TableRow]:
    """Both constants and the coin: what judging is worth without looking."""
    rows = baselines(truth, resamples=resamples, seed=seed)
    said = {name: _values(rows[name], truth.task) for name in CONSTANTS[truth.task]}
    return [
        TableRow(name, "baseline", {n: v for n, v in values.items() if not n.startswith("reason")}, {})
        for name, values in said.items()
    ]


def _values(metrics: Sequence[Metric], task: Task) -> dict[str, dict[str, float]]:
    return {m.name: {"value": m.value, "low": m.low, "high": m.high} for m in metrics if m.name in COLUMNS[task]}


def _verdicts(
    predictors: Sequence[Stored], said: Mapping[str, Predictions], task: Task, resamples: int, seed: int
) -> list[Verdict]:
    """Every policy and file against every baseline; without any, the best baseline against the others."""
    bars = [p.name for p in predictors if p.kind == "baseline"]
    rows = [p.name for p in predictors if p.kind != "baseline"]
    pairs = [(row, bar) for row in rows for bar in bars]
    return verdicts(said, pairs, VERDICT_METRIC[task], resamples=resamples, seed=seed) if pairs else []


def _rewards(predictors: Sequence[Stored], said: Mapping[str, Predictions], truth: pd.DataFrame) -> dict[str, Floats]:
    """The reward of each answer, [N], of predictors that are rewarded; NaN where the reason of a skip is unknown."""
    found = {}
    for predictor in predictors:
        if predictor.kind == "policy":
            rewards = predictor.frame.set_index("interaction_id")[REWARD].loc[truth["interaction_id"]]
            found[predictor.name] = rewards.to_numpy(dtype=float)
        elif predictor.kind == "baseline" and predictor.reasons:
            found[predictor.name] = well_formed_rewards(said[predictor.name])
    return found


def _constant_rewards(truth: Predictions) -> dict[str, Floats]:
    """The rewards of both constants, [N] each: A, or the commonest other option, to everything."""
    options = TASK_OPTIONS[truth.task]
    others = [truth.gold.count(o) for o in options[1:]]
    commonest = options[1 + int(np.argmax(others))]
    no, yes = (Option.A, commonest) if truth.task is Task.SEQUENTIAL else (commonest, Option.A)
    named = zip(CONSTANTS[truth.task], (yes, no), strict=False)
    return {name: well_formed_rewards(replace(truth, predicted=[option] * len(truth))) for name, option in named}


def _with_reward(row: TableRow, rewards: Floats | None, users: Sequence[str], *, resamples: int, seed: int) -> TableRow:
    known = np.zeros(0, bool) if rewards is None else ~np.isnan(rewards)
    if rewards is None or not known.any():
        return row
    mean = partial(_weighted_mean, rewards[known])
    figure = over_users(np.asarray(users)[known].tolist(), mean, resamples=resamples, seed=seed)
    return replace(row, values={**row.values, REWARD: figure})


def _weighted_mean(values: Floats, weights: Floats) -> Floats:
    return np.asarray((weights @ values) / weights.sum(axis=-1))


def _reward_verdicts(
    predictors: Sequence[Stored], rewards: Mapping[str, Floats], users: Sequence[str], resamples: int, seed: int
) -> list[Verdict]:
    """Every policy's reward against that of the constants and of the baselines that have one."""
    policies = [p.name for p in predictors if p.kind == "policy"]
    pairs = [(policy, bar) for policy in policies for bar in rewards if bar not in policies]
    _, code = np.unique(np.asarray(users, dtype=np.str_), return_inverse=True)
    sums = {name: _reward_sums(values, code) for name, values in rewards.items()}
    fine = {"resamples": resamples, "exchanges": exchanges_for(len(pairs)), "seed": seed}
    found = [
        replace(paired(sums[a], sums[b], _mean_reward, **fine), metric=REWARD, first=a, second=b) for a, b in pairs
    ]
    return with_holm([v for v in found if not math.isnan(v.difference)])


def _reward_sums(rewards: Floats, code: npt.NDArray[np.intp]) -> dict[str, Floats]:
    known = ~np.isnan(rewards)
    return {
        "items": np.bincount(code).astype(np.float64),
        REWARD: np.bincount(code, np.nan_to_num(rewards)).astype(np.float64),
        "rewarded": np.bincount(code, known).astype(np.float64),
    }


def _mean_reward(sums: Sums) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[REWARD] / sums["rewarded"])


def _notes(truth: pd.DataFrame, said: Predictions, least_users: int, happened: pd.DataFrame) -> list[str]:
    notes, users = [], len(set(said.user))
    if said.positive.all() or not said.positive.any():
        notes.append("all targets have the same outcome: most figures are undefined, and nothing is compared")
    if users < least_users:
        listed = f"{users} test user{'s' if users > 1 else ''}"
        notes.append(f"only {listed} (evaluate.least_users={least_users}): these figures tell little apart")
    if len(truth) < len(happened):
        notes.append(f"{len(truth):,} of {len(happened):,} targets: those that every predictor answered")
    unexplained = int((truth["gold"].isna() & (truth["play_rate"] < FAST_SKIP_BELOW)).sum())
    if unexplained and said.task is Task.SEQUENTIAL:
        notes.append(f"{unexplained:,} skips without a known reason: they count for the judge, not for the reason")
    return notes
