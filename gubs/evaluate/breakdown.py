"""Where a judged policy is right and where not: gold by predicted option, slices of the users, calibration. As sheets.

All of it is computed from the stored predictions of `eval-<policy>`, on targets in their natural mix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gubs.artifacts import JsonObject
from gubs.data.ifvr import IFVR
from gubs.evaluate.calibration import Bin, reliability
from gubs.evaluate.judge import FILTER, GREEDY, as_predictions
from gubs.evaluate.metrics import Bools, Floats, evaluate
from gubs.evaluate.scores import auc_over_users
from gubs.evaluate.sheets import Sheet, SheetRow, per_cent
from gubs.evaluate.table import VERDICT_METRIC
from gubs.records import TASK_OPTIONS, Split, Task, User
from gubs.ufm.questions import SKIP

Row = dict[str, Any]
Facts = dict[str, list[str]]
"""Slices of each user: `age: 18 to 24`."""
COLD_VIEWS = 10
"""Users with fewer history records are a cold start."""
COLD, WARM = f"history: fewer than {COLD_VIEWS} records (cold start)", f"history: {COLD_VIEWS} records or more"
_AGES = (18, 25, 35, 50)
_NONE = "no option"
OPTION_WORDS = {
    Task.SEQUENTIAL: {"A": "watched on", "B": "skip: content", "C": "skip: recommendation", "D": "skip: the moment"},
    Task.CLICK: {"A": "click", "B": "no click"},
}


@dataclass(frozen=True)
class Judged:
    """One task's answers of a policy about the natural mix, by mode."""

    task: Task
    by_mode: Mapping[str, Sequence[Row]]
    """Rows of `gubs.evaluate.judge.PREDICTIONS`, the same targets in each mode."""
    decision: JsonObject | None
    """Calibration and threshold (`DecisionRule`); None if the task has none."""

    @classmethod
    def of(cls, rows: Sequence[Row], decisions: Mapping[str, JsonObject]) -> "Iterator[Judged]":
        """Each task of an evaluation.

        Args:
            rows: its table `predictions`.
            decisions: its manifest's.
        """
        for task in Task:
            of_task = [r for r in rows if r["task"] == task and r["natural"]]
            modes = dict.fromkeys(r["mode"] for r in of_task)
            if of_task:
                yield cls(task, {m: [r for r in of_task if r["mode"] == m] for m in modes}, decisions.get(str(task)))

    def scored(self) -> tuple[Floats, Bools]:
        """Calibrated P(skip) and what happened (skipped, not clicked), [n] each; targets with a readable answer."""
        rows = self.by_mode[FILTER]
        readable = np.array([r["skip"] is not None for r in rows])
        bad = as_predictions(rows, self.task).bad[readable]
        return np.array([r["skip"] for r in rows if r["skip"] is not None], float), bad


def confusion_sheet(judged: Judged, mode: str) -> Sheet:
    """Gold options (rows) by the predicted ones, in counts and shares of the row."""
    rows, options = judged.by_mode[mode], [str(o) for o in TASK_OPTIONS[judged.task]]
    words = OPTION_WORDS[judged.task]
    sheet_rows = []
    for gold in [*options, SKIP]:
        predicted = [r["predicted"] or _NONE for r in rows if (r["gold"] or SKIP) == gold]
        cells = [
            f"{predicted.count(o):,} ({100 * predicted.count(o) / len(predicted):.0f} %)"
            for o in (*options, _NONE)
            if predicted
        ]
        if predicted:
            name = f"{gold}: {words[gold]}" if gold in words else "skip, for a reason that is not known"
            sheet_rows.append(SheetRow(name, [f"{len(predicted):,}", *cells]))
    title = f"{judged.task}, {mode}: gold option (rows) by predicted option, {len(rows):,} targets"
    return Sheet(title, ["targets", *(f"said {o}" for o in options), _NONE], sheet_rows, [])


def calibration_sheet(judged: Judged) -> Sheet:
    """The Brier score of P(skip): calibrated, as the policy says it, and of a constant."""
    decision = judged.decision or {}
    calibration = decision["calibration"]
    skip, bad = judged.scored()
    cells = [f"{calibration['n']:,}", *(f"{calibration[n]:.3f}" for n in ("brier", "brier_raw", "brier_constant"))]
    rows = [SheetRow("held-out training users", cells)]
    if len(skip):
        brier, constant = np.mean((skip - bad) ** 2), np.mean((bad.mean() - bad) ** 2)
        rows.append(SheetRow("test users", [f"{len(skip):,}", f"{brier:.3f}", "–", f"{constant:.3f}"]))
    columns = ["targets", f"calibrated ({calibration['method']})", "as the policy says it", "their share of skips"]
    return Sheet(f"{judged.task}: Brier score of P(skip), less is better", columns, rows, [])


def reliability_curves(judged: Judged) -> dict[str, tuple[Bin, ...]]:
    """Calibrated P(skip) against what happened: of held-out training users, and of the test users."""
    held_out = tuple(Bin(**b) for b in (judged.decision or {})["calibration"]["reliability"])
    return {"held-out training users": held_out, "test users": reliability(*judged.scored())}


def thresholds(judged: Judged) -> dict[str, Floats]:
    """What a filter keeps at each threshold of P(skip), [101] each: `threshold`, `kept`, `lost` (of what is watched or
    clicked), `good` (share of good ones among those kept; NaN where none is).
    """
    skip, bad = judged.scored()
    at = np.linspace(0, 1, 101)
    kept = skip[None, :] < at[:, None]
    with np.errstate(invalid="ignore"):
        good = (kept & ~bad).sum(axis=1) / kept.sum(axis=1)
        lost = (~kept & ~bad).sum(axis=1) / (~bad).sum()
    return {"threshold": at, "kept": kept.mean(axis=1), "lost": lost, "good": good}


def facts(ifvr: IFVR, task: Task, groups: Mapping[str, Sequence[str]]) -> Facts:
    """Slices that the test users of a task are in, in the order in which they are shown.

    Args:
        ifvr: the data set.
        task: whose histories count.
        groups: names of the groups of each user.
    """
    table = ifvr.user_splits.to_pylist()
    views = {r["user_id"]: r["n_history"] for r in table if r["task"] == task and r["split"] == Split.TEST}
    thirds = np.quantile(list(views.values()), (1 / 3, 2 / 3)) if views else np.zeros(2)
    return {
        user: [
            *_about(ifvr.users[user]),
            f"activity: {('least', 'middle', 'most')[int(np.searchsorted(thirds, n))]} active third",
            COLD if n < COLD_VIEWS else WARM,
            *(f"group: {name}" for name in groups.get(user, ["none"])),
        ]
        for user, n in views.items()
    }


def slices_sheet(judged: Judged, facts: Facts, *, least: int, resamples: int, seed: int) -> Sheet:
    """Figures of each slice of the users, with intervals over its users.

    Args:
        judged: the policy's answers.
        facts: slices of each user.
        least: slices with fewer targets are left out, and named.
        resamples: of users.
        seed: of the resamples.
    """
    rows, small = [], []
    names = sorted({name for user in facts.values() for name in user}, key=_place)
    for name in ["all", *names]:
        part = {
            m: [r for r in rows if name == "all" or name in facts.get(r["user_id"], ())]
            for m, rows in judged.by_mode.items()
        }
        if name == "all" or len(part[GREEDY]) >= least:
            rows.append(SheetRow(name, _cells(part, judged.task, resamples, seed)))
        elif part[GREEDY]:
            small.append(f"{name} ({len(part[GREEDY]):,})")
    bad = "skips" if judged.task is Task.SEQUENTIAL else "clicks"
    good = "watched" if judged.task is Task.SEQUENTIAL else "clicked"
    columns = ["users", "targets", bad, "balanced acc, greedy", "AUC", "kept, filter", f"{good} lost, filter"]
    notes = [f"fewer than {least} targets (evaluate.least_slice), so not shown: {', '.join(small)}"] if small else []
    return Sheet(f"{judged.task}: slices of the test users; %", columns, rows, notes)


def _about(user: User) -> Iterator[str]:
    if user.age is not None:
        place = int(np.searchsorted(_AGES, user.age, side="right"))
        low, high = ("", *_AGES)[place], (*_AGES, "")[place]
        yield f"age: {f'{low} to {int(high) - 1}' if low and high else f'under {high}' if high else f'{low} and over'}"
    if user.gender:
        yield f"gender: {user.gender}"


def _place(name: str) -> tuple[int, int, str]:
    """Slices of a kind stand together; ages ascend."""
    kind, _, value = name.partition(": ")
    order = ("age", "gender", "activity", "history", "group").index(kind)
    within = 0 if value.startswith(("under", "least", "fewer")) else 1 if value.startswith("middle") else 2
    return order, within, value


def _cells(part: Mapping[str, Sequence[Row]], task: Task, resamples: int, seed: int) -> list[str]:
    greedy, filtered = (as_predictions(part[mode], task) for mode in (GREEDY, FILTER))
    score = np.array([r["skip"] or 0.0 for r in part[FILTER]])
    of_greedy, of_filter = (
        {m.name: asdict(m) for m in evaluate(p, resamples=resamples, seed=seed)} for p in (greedy, filtered)
    )
    lost = "share_clicked_lost" if task is Task.CLICK else "share_watched_lost"
    return [
        f"{len(set(greedy.user)):,}",
        f"{len(greedy):,}",
        f"{100 * greedy.positive.mean():.1f}",
        per_cent(of_greedy[VERDICT_METRIC[task]]),
        per_cent(auc_over_users(filtered, score, resamples=resamples, seed=seed)),
        per_cent(of_filter["share_kept"]),
        per_cent(of_filter[lost]),
    ]
