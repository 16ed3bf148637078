"""What scores are worth: the area under the ROC curve, and what is kept at a share that is the same for everybody.

A filter that keeps fewer videos keeps better ones, so filters that keep different shares cannot be compared. Here each
predictor keeps the videos with the lowest scores, up to a share of all. Where equal scores stand at the border, each of
these videos is kept in part, as if chance chose among them: neither their order nor their users' ids may count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from gubs.evaluate.metrics import Bools, Floats, Predictions, Statistic, Sums, over_users, ratio
from gubs.evaluate.verdicts import Verdict, exchanges_for, paired, with_holm
from gubs.records import Task

SHARE = 0.7
"""Share of videos kept at which predictors are compared."""
SHARES = tuple(round(0.05 * k, 2) for k in range(1, 21))
"""Shares of videos kept at which a curve is measured."""
RANDOM = "random drop"
"""Keeps the same part of every video: what a drop at random is expected to keep."""
_AUC_RESAMPLES = 200
"""Of users, for the intervals of AUC, which sorts all items in each."""
Figures = dict[str, dict[str, float]]
"""Name of a figure -> value, low, high."""


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


def auc_over_users(truth: Predictions, score: Floats, *, resamples: int, seed: int) -> dict[str, float]:
    """AUC of a score [n] that grows with what a filter should drop, with its interval: `value`, `low`, `high`."""
    fine = {"resamples": min(resamples, _AUC_RESAMPLES), "seed": seed}
    return over_users(truth.user, partial(auc, score, truth.bad), **fine)


def kept_parts(score: Floats, share: float) -> Floats:
    """How much of each item is kept if those with the lowest scores are, up to a share of all items: 1, 0, or where
    equal scores stand at the border, the part of them for which there is room; [n].
    """
    _, code, counts = np.unique(score, return_inverse=True, return_counts=True)
    room = share * len(score) - (np.cumsum(counts) - counts)
    return np.clip(room / counts, 0.0, 1.0)[code]


def share_sums(score: Floats, truth: Predictions, share: float) -> dict[str, Floats]:
    """The sums by user (sorted) that figures at a share follow from, [U] each; see `statistics_at`."""
    users, code = np.unique(np.asarray(truth.user, dtype=np.str_), return_inverse=True)
    part, good, rated = kept_parts(score, share), ~truth.bad, ~np.isnan(truth.rate)
    columns = {
        "items": np.ones(len(part)),
        "kept": part,
        "rated": part * rated,
        "rate": part * np.nan_to_num(truth.rate),
        "good": part * good,
        "all_good": good.astype(np.float64),
    }
    return {name: np.bincount(code, values, len(users)).astype(np.float64) for name, values in columns.items()}


def statistics_at(task: Task) -> dict[str, Statistic]:
    """The figures of what is kept: `total_play_rate`, `play_rate_above_30` (sequential) or `click_rate` (click); and
    `lost`, the share of the watched (clicked) videos that are dropped. NaN where there is none.
    """
    if task is Task.CLICK:
        return {"click_rate": _good_rate, "lost": _lost}
    return {"total_play_rate": _play_rate, "play_rate_above_30": _good_rate, "lost": _lost}


def curve(score: Floats, truth: Predictions) -> list[dict[str, float]]:
    """The figures of what is kept at each share of `SHARES`, and `share_kept`."""
    points = []
    for share in SHARES:
        sums = {name: values.sum() for name, values in share_sums(score, truth, share).items()}
        figures = {name: float(statistic(sums)) for name, statistic in statistics_at(truth.task).items()}
        points.append({"share_kept": share} | figures)
    return points


def figures_at(score: Floats, truth: Predictions, share: float = SHARE, *, resamples: int, seed: int) -> Figures:
    """The figures of what is kept at one share, with intervals over users. The rule that keeps this share of all items
    stays the same in every resample.
    """
    sums = share_sums(score, truth, share)
    users = [str(n) for n in range(len(sums["items"]))]

    def of(statistic: Statistic, weights: Floats) -> Floats:
        return statistic({name: weights @ values for name, values in sums.items()})

    fine = {"resamples": resamples, "seed": seed}
    return {name: over_users(users, partial(of, s), **fine) for name, s in statistics_at(truth.task).items()}


def compared_by(task: Task, share: float = SHARE) -> dict[str, Statistic]:
    """What predictors are compared in at a share, by the name that a verdict has; more is better."""
    at = f"at {100 * share:.0f} % kept"
    if task is Task.CLICK:
        return {f"click rate {at}": _good_rate}
    return {f"play rate {at}": _play_rate, f"watched videos kept {at}": _good_kept}


def verdicts_at(
    scores: Mapping[str, Floats],
    pairs: Sequence[tuple[str, str]],
    truth: Predictions,
    share: float = SHARE,
    *,
    resamples: int,
    seed: int,
) -> list[Verdict]:
    """Compares predictors at the same share of videos kept, by all of `compared_by`; Holm's correction is over all.

    Args:
        scores: of the same items by predictor, [n] each; `RANDOM` needs none.
        pairs: (first, second) to compare.
        truth: what happened to the items.
        share: of the videos kept.
        resamples: of users, for the intervals.
        seed: of all that is drawn.
    """
    scores = {**scores, RANDOM: np.zeros(len(truth))}
    names = dict.fromkeys(name for pair in pairs for name in pair)
    sums = {name: share_sums(scores[name], truth, share) for name in names}
    metrics = compared_by(truth.task, share)
    fine = {"resamples": resamples, "exchanges": exchanges_for(len(pairs) * len(metrics)), "seed": seed}
    raw = [
        replace(paired(sums[a], sums[b], statistic, **fine), metric=metric, first=a, second=b)
        for metric, statistic in metrics.items()
        for a, b in pairs
    ]
    return with_holm([v for v in raw if not np.isnan(v.difference)])


def without_repeats(scores: Mapping[str, Floats], names: Sequence[str]) -> list[str]:
    """The names without those that rank all items as an earlier one does: they would be compared twice."""
    distinct: dict[bytes, str] = {}
    for name in names:
        distinct.setdefault(np.unique(scores[name], return_inverse=True)[1].tobytes(), name)
    return list(distinct.values())


def _of(total: str, count: str) -> Callable[[Sums], Floats]:
    return lambda sums: ratio(sums[total], sums[count])


_play_rate, _good_rate, _good_kept = _of("rate", "rated"), _of("good", "kept"), _of("good", "all_good")


def _lost(sums: Sums) -> Floats:
    return 1 - _good_kept(sums)
