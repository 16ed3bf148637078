"""What the arms of an ablation are worth: policies of several worlds and trainings, each arm against the first.

A *cell* is one policy: an arm in a world (a data set made with a seed of its own), trained with a seed. An arm's figure
pools the answers of all its cells; the interval draws users again, a user of a world with the answers of all trainings
together. How much trainings differ by chance alone is told apart from it, as the standard deviation over their seeds
within worlds, and how much worlds differ as that over the worlds' means: the interval has neither. Arms are compared by
user, on the same targets (`verdicts`). Such a test says that these policies differ on other users; that the *methods*
differ is only shown if it happens again with other seeds, so the number of cells with the same sign stands beside it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gubs.errors import ArtifactError
from gubs.evaluate.judge import CALIBRATED, FILTER, MIXES, SAMPLED, Row, as_predictions
from gubs.evaluate.metrics import (
    Bools,
    Floats,
    Statistic,
    bootstrap_weights,
    statistic_of,
    user_sums,
    well_formed_rewards,
)
from gubs.evaluate.scores import auc
from gubs.evaluate.verdicts import Verdict, compared, exchanges_for, paired, with_holm
from gubs.records import TASK_OPTIONS, Option, Task

NATURAL, BALANCED = MIXES
REWARD, AUC = "reward", "auc"
CONSTANTS = {Task.SEQUENTIAL: ("never skip", "always skip"), Task.CLICK: ("always click", "never click")}
"""Answers that need no model: option A to everything, and the commonest other option."""

Part = tuple[str, str, str]
"""Task, mix of options, mode."""
Key = tuple[int, int]
"""World and training seed."""
Answers = Mapping[Part, "Asked"]
"""What one policy answered."""
Arms = Mapping[str, Mapping[Key, Answers]]
"""Answers by arm and cell; the first arm is what the others are compared with."""


@dataclass(frozen=True)
class Measure:
    """One figure of the table."""

    name: str
    label: str
    mix: str
    mode: str
    task: Task = Task.SEQUENTIAL
    tested: bool = True
    """Whether arms are compared in it."""

    @property
    def part(self) -> Part:
        """The answers that it is about."""
        return str(self.task), self.mix, self.mode

    @property
    def key(self) -> str:
        """As in `judge_f1 sequential natural calibrated`."""
        return " ".join((self.name, *self.part))


MEASURES = (
    Measure(REWARD, "reward", NATURAL, CALIBRATED),
    Measure(REWARD, "reward, balanced, sampled", BALANCED, SAMPLED),
    Measure("judge_f1", "judge F1", NATURAL, CALIBRATED),
    Measure("judge_acc", "judge acc", NATURAL, CALIBRATED),
    Measure("judge_balanced_acc", "balanced acc", NATURAL, CALIBRATED),
    Measure(AUC, "AUC", NATURAL, CALIBRATED),
    Measure("reason_f1", "reason F1", NATURAL, CALIBRATED),
    Measure("reason_f1", "reason F1, balanced, sampled", BALANCED, SAMPLED),
    Measure("total_play_rate", "play rate, kept", NATURAL, FILTER),
    Measure("share_kept", "kept", NATURAL, FILTER, tested=False),
    Measure("share_watched_lost", "watched lost", NATURAL, FILTER, tested=False),
    Measure("click_balanced_acc", "click, balanced acc", NATURAL, CALIBRATED, task=Task.CLICK),
)
"""The figures of an ablation's table, in order."""


@dataclass(frozen=True)
class Asked:
    """A policy's answers in one part: sums by user, and the score of each item."""

    users: tuple[str, ...]
    """Sorted."""
    sums: Mapping[str, Floats]
    """[U] each."""
    score: Floats
    """P(skip) of each item, 0 without a readable answer, [N]."""
    bad: Bools
    """Whether it was skipped (not clicked), [N]."""
    code: npt.NDArray[np.intp]
    """The item's user, [N]."""

    @classmethod
    def of(cls, rows: Sequence[Row], task: Task) -> "Asked":
        """From rows of `judge.PREDICTIONS` of one part, brought into one order."""
        rows = sorted(rows, key=lambda r: (r["user_id"], r["interaction_id"]))
        predictions = as_predictions(rows, task)
        users, code = np.unique(np.asarray(predictions.user, dtype=np.str_), return_inverse=True)
        rewarded = np.array([r["reward"] is not None for r in rows], dtype=float)
        rewards = np.array([r["reward"] or 0.0 for r in rows])
        sums = user_sums(predictions) | {
            REWARD: np.bincount(code, rewards, len(users)).astype(np.float64),
            "rewarded": np.bincount(code, rewarded, len(users)).astype(np.float64),
        }
        bad = predictions.positive if task is Task.SEQUENTIAL else ~predictions.positive
        score = np.array([math.nan if r["skip"] is None else r["skip"] for r in rows], dtype=float)
        return cls(tuple(users.tolist()), sums, np.nan_to_num(score), bad, code)

    @cached_property
    def auc_by_user(self) -> Floats:
        """The AUC within each user's items, [U]; NaN for a user with one kind of item."""
        masks = (self.code == user for user in range(len(self.users)))
        return np.array([float(auc(self.score[m], self.bad[m])) for m in masks])

    def auc(self, weights: Floats | None = None, score: Floats | None = None) -> Floats:
        """Area under the ROC curve; `weights` are of users, [..., U]."""
        by_item = None if weights is None else weights[..., self.code]
        return auc(self.score if score is None else score, self.bad, by_item)


@dataclass(frozen=True)
class Result:
    """One figure of one arm."""

    measure: Measure
    arm: str
    value: float
    """Of the answers of all cells together (AUC: mean over the cells)."""
    low: float
    high: float
    """95 % interval over users."""
    seeds: float
    """Standard deviation over training seeds, within worlds; NaN with one seed."""
    worlds: float
    """Standard deviation of the worlds' means; NaN with one world."""
    cells: Mapping[Key, float]
    users: int
    bar: bool = False
    """It is no policy: a constant, or a regression."""

    def to_row(self) -> dict[str, Any]:
        """As a table's row; the cells have a table of their own."""
        names = ("arm", "value", "low", "high", "seeds", "worlds", "users", "bar")
        return {"measure": self.measure.key, **{n: getattr(self, n) for n in names}}


@dataclass(frozen=True)
class Difference:
    """An arm against the first one, or one of a pair against the other."""

    measure: Measure
    verdict: Verdict
    """`first` is the arm, `second` what it is compared with."""
    agree: int
    """Cells in which the difference has the sign of the whole."""
    cells: int

    def to_row(self) -> dict[str, Any]:
        """As a table's row."""
        own = {"measure": self.measure.key, "agree": self.agree, "cells": self.cells}
        return own | {n: v for n, v in self.verdict.to_row().items() if n != "metric"}


@dataclass(frozen=True)
class Comparison:
    """The whole table."""

    results: tuple[Result, ...]
    differences: tuple[Difference, ...]


def read_answers(rows: Iterable[Row]) -> dict[Part, Asked]:
    """The answers of a policy, from rows of `judge.PREDICTIONS`: only those that a measure is about."""
    by_part: dict[Part, list[Row]] = {m.part: [] for m in MEASURES}
    for row in rows:
        for task, mix, mode in by_part:
            if row["task"] == task and row["mode"] == mode and row[mix]:
                by_part[task, mix, mode].append(row)
    return {part: Asked.of(of_part, Task(part[0])) for part, of_part in by_part.items() if of_part}


def constant_answers(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The same targets answered without a model, by the names in `CONSTANTS`."""
    rows = list(rows)
    answers: dict[str, list[Row]] = {}
    for task, names in CONSTANTS.items():
        of_task = [r for r in rows if r["task"] == task]
        others = [r["gold"] for r in of_task if r["gold"] not in (None, Option.A)]
        rest = [o for o in TASK_OPTIONS[task] if o != Option.A]
        for name, option in zip(names, (Option.A, max(rest, key=others.count)), strict=True):
            answers[name] = _answered(of_task, [(str(option), None)] * len(of_task))
    return answers


def bar_answers(rows: Iterable[Row], bars: Mapping[str, Mapping[str, Row]]) -> dict[str, list[Row]]:
    """The same targets answered by the bars that choose options.

    Args:
        rows: of `judge.PREDICTIONS`.
        bars: by name and interaction, `predicted` and `score`.
    """
    rows, answers = list(rows), {}
    for name, bar in bars.items():
        covered = [r for r in rows if r["interaction_id"] in bar]
        choices = [(bar[r["interaction_id"]]["predicted"], bar[r["interaction_id"]]["score"]) for r in covered]
        answers[name] = _answered(covered, choices)
    return answers


def _answered(rows: Sequence[Row], choices: Sequence[tuple[str, float | None]]) -> list[Row]:
    """The targets of rows with other answers, well-formed ones: the option and P(skip) of each."""
    rows = [r | {"predicted": option, "skip": skip} for r, (option, skip) in zip(rows, choices, strict=True)]
    for task in Task:
        of_task = [r for r in rows if r["task"] == task]
        for row, reward in zip(of_task, well_formed_rewards(as_predictions(of_task, task)).tolist(), strict=True):
            row["reward"] = None if math.isnan(reward) else reward
    return rows


def compare_arms(
    arms: Arms, bars: Arms, *, resamples: int, seed: int, pairs: Sequence[tuple[str, str]] = ()
) -> Comparison:
    """All figures of all arms, every arm against the first, and the pairs.

    Args:
        arms: the answers; every arm has the same cells.
        bars: answers without a policy, in the same form (one cell per world is enough).
        resamples: of users, for intervals and tests.
        seed: of the draws.
        pairs: more arms to compare, (arm, with which).

    Raises:
        ArtifactError: the policies of a world were judged on different targets.
    """
    results: list[Result] = []
    differences: list[Difference] = []
    against_first = [(arm, next(iter(arms))) for arm in list(arms)[1:]]
    for measure in MEASURES:
        pools = {arm: Pool.of(measure, cells) for arm, cells in arms.items()}
        if not all(p.cells for p in pools.values()):
            continue
        of_arms = [pool.result(arm, resamples, seed) for arm, pool in pools.items()]
        results += of_arms
        results += [
            replace(pool.result(name, resamples if pool.ranks else 0, seed), bar=True)
            for name, cells in bars.items()
            if (pool := Pool.of(measure, cells)).cells and (measure.name != AUC or pool.ranks)
        ]
        if measure.tested and resamples:
            compared_arms = dict.fromkeys((*against_first, *pairs))
            differences += _differences(pools, {r.arm: r for r in of_arms}, list(compared_arms), resamples, seed)
    return Comparison(tuple(results), tuple(differences))


def _differences(
    pools: Mapping[str, "Pool"],
    results: Mapping[str, Result],
    pairs: Sequence[tuple[str, str]],
    resamples: int,
    seed: int,
) -> list[Difference]:
    """The pairs of arms in one measure; Holm's correction is over all of them."""
    fine = {"resamples": resamples, "exchanges": exchanges_for(len(pairs)), "seed": seed}
    raw = []
    for arm, other in pairs:
        verdict = pools[arm].against(pools[other], **fine)
        raw.append(replace(verdict, metric=pools[arm].measure.name, first=arm, second=other))
    made = []
    for verdict in with_holm(raw):
        one, two = results[verdict.first].cells, results[verdict.second].cells
        signs = [(one[k] - two[k]) * verdict.difference > 0 for k in one]
        made.append(Difference(pools[verdict.first].measure, verdict, sum(signs), len(signs)))
    return made


@dataclass(frozen=True)
class Pool:
    """The answers of one arm in one measure."""

    measure: Measure
    cells: Mapping[Key, Asked]
    """Sorted by world."""

    @classmethod
    def of(cls, measure: Measure, cells: Mapping[Key, Answers]) -> "Pool":
        """From the cells of an arm; empty if one has no such answers."""
        answers = {key: cells[key].get(measure.part) for key in sorted(cells)}
        return cls(measure, {k: a for k, a in answers.items() if a} if all(answers.values()) else {})

    @property
    def ranks(self) -> bool:
        """Whether the answers come with scores."""
        return all(a.score.any() for a in self.cells.values())

    @cached_property
    def users(self) -> dict[int, tuple[str, ...]]:
        """World -> its users.

        Raises:
            ArtifactError: the policies of a world were asked about different users.
        """
        users: dict[int, tuple[str, ...]] = {}
        for (world, _), asked in self.cells.items():
            if users.setdefault(world, asked.users) != asked.users:
                raise ArtifactError(f"world {world}: two policies were judged on different users")
        return users

    @cached_property
    def sums(self) -> dict[str, Floats]:
        """Sums by user of all worlds, over the trainings, [U] each."""
        names = next(iter(self.cells.values())).sums
        by_world = [[a.sums for (w, _), a in self.cells.items() if w == world] for world in self.users]
        return {n: np.concatenate([np.sum([s[n] for s in trainings], axis=0) for trainings in by_world]) for n in names}

    @property
    def statistic(self) -> Statistic:
        """How the figure follows from sums (AUC does not)."""
        if self.measure.name == REWARD:
            return lambda s: np.asarray(np.divide(s[REWARD], s["rewarded"]))
        return statistic_of(self.measure.name, self.measure.task)

    def result(self, arm: str, resamples: int, seed: int) -> Result:
        """The figure, its interval and spreads."""
        cells = {key: self._of_cell(asked) for key, asked in self.cells.items()}
        drawn = np.concatenate([np.zeros(0), *(self.figure(w) for w in self._weights(resamples, seed))])
        low, high = np.nanpercentile(drawn, (2.5, 97.5)) if len(drawn) else (math.nan, math.nan)
        value = float(self.figure(np.ones(self._count)))
        seeds, worlds = _spreads(cells)
        return Result(self.measure, arm, value, float(low), float(high), seeds, worlds, cells, self._count)

    def figure(self, weights: Floats, scores: Mapping[Key, Floats] | None = None) -> Floats:
        """The figure with these weights of users, [..., U] -> [...]; `scores` replace those of the cells (AUC)."""
        if self.measure.name == AUC:
            parts = self._by_world(weights)
            aucs = [a.auc(parts[key[0]], (scores or {}).get(key)) for key, a in self.cells.items()]
            return np.asarray(np.mean(aucs, axis=0))
        return self.statistic({n: weights @ values for n, values in self.sums.items()})

    def against(self, other: "Pool", *, resamples: int, exchanges: int, seed: int) -> Verdict:
        """This arm against another on the same targets; p is not yet corrected.

        Raises:
            ArtifactError: they were judged on other targets.
        """
        self._check(other)
        if self.measure.name != AUC:
            fine = {"resamples": resamples, "exchanges": exchanges, "seed": seed}
            return paired(self.sums, other.sums, self.statistic, **fine)
        rng, even = np.random.default_rng([seed, 31]), np.ones(self._count)
        drawn = [self.figure(w) - other.figure(w) for w in self._weights(resamples, seed)]

        def exchanged(count: int) -> Floats:
            return np.array([self._exchanged(other, rng.integers(0, 2, self._count)) for _ in range(count)])

        observed = float(self.figure(even) - other.figure(even))
        return compared(
            observed,
            np.concatenate(drawn),
            exchanged,
            self._by_user() - other._by_user(),
            resamples=resamples,
            exchanges=exchanges,
        )

    def _by_user(self) -> Floats:
        """Each user's own AUC, the mean over the trainings, [U]; NaN for a user with one kind of item."""
        return np.concatenate(
            [np.mean([a.auc_by_user for (w, _), a in self.cells.items() if w == world], axis=0) for world in self.users]
        )

    def _exchanged(self, other: "Pool", flips: npt.NDArray[np.int64]) -> float:
        """The difference in AUC after some users' scores have changed places."""
        parts, even = self._by_world(flips.astype(bool)), np.ones(self._count)
        own_scores, other_scores = {}, {}
        for key, a in self.cells.items():
            b, moved = other.cells[key], parts[key[0]][a.code]
            own_scores[key], other_scores[key] = np.where(moved, b.score, a.score), np.where(moved, a.score, b.score)
        return float(self.figure(even, own_scores) - other.figure(even, other_scores))

    def _of_cell(self, asked: Asked) -> float:
        if self.measure.name == AUC:
            return float(asked.auc())
        return float(self.statistic({n: values.sum() for n, values in asked.sums.items()}))

    def _check(self, other: "Pool") -> None:
        for key, asked in self.cells.items():
            theirs = other.cells.get(key)
            if theirs is None or not _same_items(asked, theirs):
                raise ArtifactError(f"world {key[0]}, training {key[1]}: two arms were judged on different targets")

    @property
    def _count(self) -> int:
        return sum(map(len, self.users.values()))

    def _weights(self, resamples: int, seed: int) -> Iterable[Floats]:
        items = sum(len(a.score) for a in self.cells.values()) if self.measure.name == AUC else 0
        return bootstrap_weights(self._count, resamples, seed, items) if self._count > 1 else ()

    def _by_world(self, values: npt.NDArray[Any]) -> dict[int, npt.NDArray[Any]]:
        """Values of all users, [..., U], cut by world."""
        ends = np.cumsum([len(u) for u in self.users.values()])
        return dict(zip(self.users, np.split(values, ends[:-1], axis=-1), strict=True))


def _same_items(one: Asked, other: Asked) -> bool:
    return one.users == other.users and np.array_equal(one.code, other.code) and np.array_equal(one.bad, other.bad)


def _spreads(cells: Mapping[Key, float]) -> tuple[float, float]:
    """Standard deviation over the seeds within worlds, and over the worlds' means; NaN where there is one only."""
    by_world: dict[int, list[float]] = {}
    for (world, _), value in cells.items():
        by_world.setdefault(world, []).append(value)
    within = [float(np.var(v, ddof=1)) for v in by_world.values() if len(v) > 1]
    means = [float(np.mean(v)) for v in by_world.values()]
    seeds = math.sqrt(float(np.mean(within))) if within else math.nan
    return seeds, float(np.std(means, ddof=1)) if len(means) > 1 else math.nan
