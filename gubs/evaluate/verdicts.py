"""Whether one predictor is better than another on the same items: paired by user, corrected for many comparisons.

Users are drawn again for the interval, and the two predictors change places at random user by user for the p-value
(a sign-flip test); both take ratios such as F1 as they are. p-values are Holm's. A verdict is given only above the
difference that this many users can show (80 % power at 5 %); below it, the data cannot tell. Wilcoxon and sign tests
have inflated errors at these sizes and are not offered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from gubs.evaluate.metrics import Floats, Predictions, Statistic, bootstrap_weights, statistic_of, user_sums

ALPHA = 0.05
POWER = 1.959964 + 0.841621
"""Standard errors that a difference must have to be found in 80 % of samples at 5 %, two-sided."""


class Word(StrEnum):
    """What a comparison says."""

    BETTER = "better"
    WORSE = "worse"
    UNKNOWN = "cannot tell"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How `first` differs from `second` in one metric."""

    metric: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    """95 % interval over users, paired."""
    p: float
    p_holm: float
    """Corrected for all comparisons that were made together."""
    effect: float
    """Mean difference per user in standard deviations of these differences (Cohen's d_z)."""
    detectable: float
    """Smallest difference that this many users show in 80 % of samples."""
    users: int
    word: Word

    def to_row(self) -> dict[str, Any]:
        """As a table's row."""
        return asdict(self)

    @property
    def text(self) -> str:
        """The verdict in one line."""
        return (
            f"{self.first} against {self.second}, {self.metric}: {self.difference:+.3f} "
            f"({self.low:+.3f} to {self.high:+.3f}), p {self.p_holm:.3f} (Holm), d {self.effect:+.2f}, "
            f"detectable {self.detectable:.3f}: {self.word}"
        )


def verdicts(
    predictions: Mapping[str, Predictions],
    pairs: Sequence[tuple[str, str]],
    metric: str,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Verdict]:
    """Compares predictors with each other.

    Args:
        predictions: of the same items, by predictor.
        pairs: (first, second) to compare; Holm's correction is over all of them.
        metric: name of a metric, as `click_acc`.
        resamples: of users, and random exchanges.
        seed: of both.

    Raises:
        ValueError: two predictors answered other users, or there is no such metric.
    """
    statistic, sums = statistic_of(metric, next(iter(predictions.values())).task), {}
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        sums[name] = user_sums(predictions[name])
    found = [
        replace(paired(sums[a], sums[b], statistic, resamples=resamples, seed=seed), metric=metric, first=a, second=b)
        for a, b in pairs
    ]
    return with_holm(found)


def paired(
    first: Mapping[str, Floats],
    second: Mapping[str, Floats],
    statistic: Statistic,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Verdict:
    """Compares two predictors by their users' sums, [U] each, in one order of users; p is not yet corrected.

    Raises:
        ValueError: the two have different users or items.
    """
    if not np.array_equal(first["items"], second["items"]):
        raise ValueError("two predictors must have answered the same items to be compared")
    names, users = list(first), len(first["items"])
    a, b = (np.stack([s[n] for n in names], axis=1) for s in (first, second))

    def value(matrix: Floats) -> Floats:
        return statistic({name: matrix[..., k] for k, name in enumerate(names)})

    rng = np.random.default_rng([seed, 31])
    observed = float(value(a.sum(axis=0)) - value(b.sum(axis=0)))
    drawn, flipped = [np.zeros(0)], [np.zeros(0)]
    for weights in bootstrap_weights(users, resamples, seed):
        drawn.append(value(weights @ a) - value(weights @ b))
        swap = rng.integers(0, 2, size=weights.shape).astype(np.float64)
        moved = swap @ (b - a)
        flipped.append(value(a.sum(axis=0) + moved) - value(b.sum(axis=0) - moved))
    return _verdict(observed, np.concatenate(drawn), np.concatenate(flipped), value(a) - value(b))


def _verdict(observed: float, drawn: Floats, flipped: Floats, by_user: Floats) -> Verdict:
    drawn, flipped, by_user = (v[~np.isnan(v)] for v in (drawn, flipped, by_user))
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
    p = (1 + (np.abs(flipped) >= abs(observed) - 1e-12).sum()) / (1 + len(flipped))
    spread = by_user.std(ddof=1) if len(by_user) > 1 else 0.0
    effect = float(by_user.mean() / spread) if spread > 0 else 0.0
    detectable = POWER * float(drawn.std(ddof=1)) if len(drawn) > 1 else float("nan")
    return Verdict(
        "",
        "",
        "",
        observed,
        float(low),
        float(high),
        float(p),
        float(p),
        effect,
        detectable,
        len(by_user),
        Word.UNKNOWN,
    )


def with_holm(found: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts with corrected p-values, and what they say."""
    corrected = holm([v.p for v in found])
    return [replace(v, p_holm=p, word=_word(v, p)) for v, p in zip(found, corrected, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the given order."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    stepped = np.maximum.accumulate(np.minimum(1.0, np.asarray(p_values, dtype=float)[order] * factors))
    corrected = np.empty(len(p_values))
    corrected[order] = stepped
    return [float(p) for p in corrected]


def _word(v: Verdict, p: float) -> Word:
    if not (p < ALPHA and abs(v.difference) >= v.detectable):
        return Word.UNKNOWN
    return Word.BETTER if v.difference > 0 else Word.WORSE
