"""The service's log of decisions against what test users did: what a deployed filter drops, and how well it ranks.

A log knows users and videos, not interactions, so its rows are matched with the test targets by user, video and task.
A target is judged once by each version and mode: by the latest decision about it, with versions in shadow apart.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa

from gubs.artifacts import JsonObject
from gubs.data.ifvr import IFVR
from gubs.errors import ArtifactError, InputError
from gubs.evaluate.feedback import Bools, Floats
from gubs.evaluate.metrics import over_users
from gubs.evaluate.scores import auc
from gubs.evaluate.sheets import Sheet, SheetRow, per_cent
from gubs.records import FAST_SKIP_BELOW, Split, Task

COLUMNS = ("time_ms", "user_id", "video_id", "task", "mode", "version", "acted", "decision", "skip_probability")
"""What is read of the log."""
_PAIR = ["task", "user_id", "video_id"]
_DROP = "drop"
_NONE = {"value": float("nan"), "low": float("nan"), "high": float("nan")}
_BAD = {Task.SEQUENTIAL: ("skips", "watched"), Task.CLICK: ("not clicked", "clicked")}
"""What a filter should drop, and what it should keep."""


@dataclass(frozen=True)
class Logged:
    """How the decisions of one version, mode and task fit what happened. Shares are 0-1."""

    version: str
    mode: str
    shadow: bool
    """It was asked, and did not act."""
    task: str
    decisions: int
    """Rows of the log."""
    sent: int
    """Rows about users who came with the request: nothing is known of them."""
    matched: int
    """Rows about a test target."""
    targets: int
    """Test targets with a decision."""
    users: int
    unjudged: int
    """Of these targets, those without a P(skip): they had an error and were kept."""
    coverage: float
    """Share of the task's test targets that have a decision."""
    bad_dropped: dict[str, float]
    """Share dropped of what was skipped (not clicked): `value`, `low`, `high` (95 % interval over users)."""
    good_dropped: dict[str, float]
    """The same of what was watched (clicked)."""
    auc: dict[str, float]
    """Of P(skip); a constant has 0.5."""
    brier: float
    """Mean squared error of P(skip)."""
    brier_constant: float
    """Of the share of skips among the same targets, for each of them."""

    @property
    def name(self) -> str:
        """Version, mode, and whether it was in shadow."""
        return f"{self.version}, {self.mode}{', shadow' if self.shadow else ''}"

    def to_json(self) -> JsonObject:
        """As plain JSON."""
        return asdict(self)


def happened(ifvr: IFVR) -> pd.DataFrame:
    """What test users did: task, user_id, video_id, `bad` (skipped, or not clicked); a pair's earliest target.

    Raises:
        ArtifactError: the data set has no test target with a known outcome.
    """
    outcomes = [_outcomes(ifvr.targets(task, [Split.TEST]).to_pandas(), task) for task in Task]
    frame = pd.concat(outcomes, ignore_index=True)
    if frame.empty:
        raise ArtifactError(f"{ifvr.uri} has no targets of test users: see splits.test_users")
    return frame


def figures(log: pa.Table, truth: pd.DataFrame, *, resamples: int, seed: int) -> list[Logged]:
    """How each version, mode and task of a log fits what happened; versions that act come first.

    Args:
        log: has `COLUMNS`; a row is a decision.
        truth: see `happened`.
        resamples: of users, for the intervals.
        seed: of the resamples.

    Raises:
        InputError: the log is empty.
    """
    if not log.num_rows:
        raise InputError("the log has no decisions: is it the folder of serving.log_dir?")
    frame = log.select(list(COLUMNS)).to_pandas().sort_values("time_ms", kind="stable")
    frame = frame.merge(truth, on=_PAIR, how="left")
    totals = truth["task"].value_counts()
    logged = []
    for (task, acted, version, mode), rows in frame.groupby(["task", "acted", "version", "mode"], sort=True):
        matched = rows[rows["bad"].notna()]
        latest = matched.drop_duplicates(_PAIR, keep="last")
        logged.append(
            Logged(
                version=version,
                mode=mode,
                shadow=not acted,
                task=task,
                decisions=len(rows),
                sent=int(rows["user_id"].isna().sum()),
                matched=len(matched),
                targets=len(latest),
                users=int(latest["user_id"].nunique()),
                unjudged=int(latest["skip_probability"].isna().sum()),
                coverage=len(latest) / int(totals.get(task, 0)) if task in totals else float("nan"),
                **_dropped(latest, resamples, seed),
                **_ranked(latest, resamples, seed),
            )
        )
    tasks = list(Task)
    return sorted(logged, key=lambda f: (tasks.index(Task(f.task)), f.shadow))


def sheets(logged: Sequence[Logged]) -> list[Sheet]:
    """The figures as one sheet per task, with what a constant would get."""
    return [_sheet(task, [f for f in logged if f.task == task]) for task in dict.fromkeys(f.task for f in logged)]


def _outcomes(targets: pd.DataFrame, task: Task) -> pd.DataFrame:
    column = "clicked" if task is Task.CLICK else "play_rate"
    labelled = targets[targets[column].notna()].sort_values("timestamp", kind="stable")
    bad = ~labelled[column].astype(bool) if task is Task.CLICK else labelled[column] < FAST_SKIP_BELOW
    frame = labelled[["user_id", "video_id"]].assign(task=str(task), bad=bad)
    return frame.drop_duplicates(_PAIR, keep="first")


def _dropped(rows: pd.DataFrame, resamples: int, seed: int) -> JsonObject:
    """Shares dropped of the bad and of the good targets, over users."""
    users, bad = rows["user_id"].tolist(), rows["bad"].to_numpy(dtype=bool)
    dropped = (rows["decision"] == _DROP).to_numpy(dtype=float)

    def over(part: Bools) -> dict[str, float]:
        if not part.any():
            return _NONE
        return over_users(users, partial(_mean_of, dropped, part), resamples=resamples, seed=seed)

    return {"bad_dropped": over(bad), "good_dropped": over(~bad)}


def _mean_of(values: Floats, part: Bools, weights: Floats) -> Floats:
    """Weighted mean over a part of the items: [n], [n], [..., n] -> [...]; NaN if none of it was drawn."""
    with np.errstate(invalid="ignore"):
        return np.asarray((weights * (values * part)).sum(axis=-1) / (weights * part).sum(axis=-1))


def _ranked(rows: pd.DataFrame, resamples: int, seed: int) -> JsonObject:
    """AUC and Brier scores of the targets that have a P(skip)."""
    judged = rows[rows["skip_probability"].notna()]
    if judged.empty:
        return {"auc": _NONE, "brier": float("nan"), "brier_constant": float("nan")}
    skip, bad = judged["skip_probability"].to_numpy(dtype=float), judged["bad"].to_numpy(dtype=bool)
    of_users = partial(auc, skip, bad)
    return {
        "auc": over_users(judged["user_id"].tolist(), of_users, resamples=resamples, seed=seed),
        "brier": float(np.mean((skip - bad) ** 2)),
        "brier_constant": float(np.mean((bad.mean() - bad) ** 2)),
    }


def _sheet(task: str, logged: Sequence[Logged]) -> Sheet:
    bad, good = _BAD[Task(task)]
    rows = [
        SheetRow(
            f.name,
            [
                *(f"{n:,}" for n in (f.decisions, f.matched, f.targets)),
                *map(per_cent, (_plain(f.coverage), f.bad_dropped, f.good_dropped, f.auc)),
                *("–" if x != x else f"{x:.3f}" for x in (f.brier, f.brier_constant)),
            ],
        )
        for f in logged
    ]
    columns = ("decisions", "matched", "targets", "coverage", f"{bad} dropped", f"{good} dropped", "AUC")
    notes = [note for f in logged for note in _notes(f)]
    notes.append(f"a constant has an AUC of 50; a random drop takes the same share of {bad} and of {good}")
    title = f"{task}: logged decisions about test targets; %, 95 % interval over users"
    return Sheet(title, [*columns, "Brier", "Brier of the share"], rows, notes)


def _notes(f: Logged) -> list[str]:
    """What the figures of a version leave out."""
    lost, repeated, notes = f.decisions - f.matched, f.matched - f.targets, []
    if lost:
        who = f"{f.sent:,} of users sent with the request, {lost - f.sent:,} others"
        notes.append(f"{f.name}: {lost:,} decisions match no test target ({who})")
    if repeated:
        notes.append(f"{f.name}: {repeated:,} decisions were followed by a later one about the same target")
    if f.unjudged:
        notes.append(f"{f.name}: {f.unjudged:,} targets were kept because of an error, and have no P(skip)")
    return notes


def _plain(value: float) -> dict[str, float]:
    """A figure without an interval."""
    return _NONE | {"value": value}
