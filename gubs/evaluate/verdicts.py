"""Whether one predictor is better than another on the same items: paired by user, corrected for many comparisons.

Users are drawn again for the interval, and the two predictors change places at random user by user for the p-value
(a sign-flip test); both take ratios such as F1 as they are. p-values are Holm's. A verdict is given only above the
difference that this many users can show (80 % power at 5 %); below it, the data cannot tell. Wilcoxon and sign tests
have inflated errors at these sizes and are not offered.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from gubs.evaluate.metrics import Floats, Predictions, Statistic, bootstrap_weights, statistic_of, user_sums

ALPHA = 0.05
POWER = 1.959964 + 0.841621
"""Standard errors that a difference must have to be found in 80 % of samples at 5 %, two-sided."""


_FINENESS = 20
"""p-values must be this many times finer than Holm's correction divides 5 %."""
_EXCHANGES = 500
"""Exchanges held at once."""


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
    """Compares predictors with each other; not at all where the metric is undefined, as the balanced accuracy of
    targets of one class is.

    Args:
        predictions: of the same items, by predictor.
        pairs: (first, second) to compare; Holm's correction is over all of them.
        metric: name of a metric, as `click_acc`.
        resamples: of users; at least as many random exchanges.
        seed: of both.

    Raises:
        ValueError: two predictors answered other users, or there is no such metric.
    """
    statistic, sums = statistic_of(metric, next(iter(predictions.values())).task), {}
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        sums[name] = user_sums(predictions[name])
    fine = {"resamples": resamples, "exchanges": exchanges_for(len(pairs)), "seed": seed}
    tested = [replace(paired(sums[a], sums[b], statistic, **fine), metric=metric, first=a, second=b) for a, b in pairs]
    return with_holm([v for v in tested if not math.isnan(v.difference)])


def exchanges_for(comparisons: int) -> int:
    """How many random exchanges a p-value needs if it is to survive Holm's correction for so many comparisons."""
    return math.ceil(_FINENESS * comparisons / ALPHA)


def paired(
    first: Mapping[str, Floats],
    second: Mapping[str, Floats],
    statistic: Statistic,
    *,
    resamples: int = 1000,
    exchanges: int = 0,
    seed: int = 0,
) -> Verdict:
    """Compares two predictors by their users' sums, [U] each, in one order of users; p is not yet corrected.

    There are `resamples` exchanges, and up to `exchanges` where these leave p below 5 %: with few, no p-value is small
    enough for Holm's correction.

    Raises:
        ValueError: the two have different users or items.
    """
    if not np.array_equal(first["items"], second["items"]):
        raise ValueError("two predictors must have answered the same items to be compared")
    names, users = _needed(statistic, first), len(first["items"])
    a, b = (np.stack([s[n] for n in names], axis=1) for s in (first, second))

    def value(matrix: Floats) -> Floats:
        return statistic({name: matrix[..., k] for k, name in enumerate(names)})

    rng = np.random.default_rng([seed, 31])
    observed = float(value(a.sum(axis=0)) - value(b.sum(axis=0)))
    drawn = [value(weights @ a) - value(weights @ b) for weights in bootstrap_weights(users, resamples, seed)]

    def exchanged(count: int) -> Floats:
        moved = _coins(rng, count, users) @ (b - a)
        return value(a.sum(axis=0) + moved) - value(b.sum(axis=0) - moved)

    differences = np.concatenate([np.zeros(0), *drawn])
    return compared(observed, differences, exchanged, value(a) - value(b), resamples=resamples, exchanges=exchanges)


def _coins(rng: np.random.Generator, count: int, users: int) -> Floats:
    """Zeros and ones at random, [count, users]; a random byte gives eight."""
    drawn = np.frombuffer(rng.bytes(-(-count * users // 8)), np.uint8)
    return np.unpackbits(drawn, count=count * users).reshape(count, users).astype(np.float64)


class _Noted(dict[str, Floats]):
    """Notes which sums are looked at."""

    def __init__(self, sums: Mapping[str, Floats]):
        super().__init__(sums)
        self.looked_at: dict[str, None] = {}

    def __getitem__(self, name: str) -> Floats:
        self.looked_at[name] = None
        return super().__getitem__(name)


def _needed(statistic: Statistic, sums: Mapping[str, Floats]) -> list[str]:
    """The sums that a statistic follows from; with all of them, exchanges would take many times as long."""
    noted = _Noted(sums)
    statistic(noted)
    return list(noted.looked_at)


def compared(
    observed: float,
    drawn: Floats,
    exchanged: Callable[[int], Floats],
    by_user: Floats,
    *,
    resamples: int,
    exchanges: int,
) -> Verdict:
    """A verdict from differences, for any statistic.

    Args:
        observed: the difference.
        drawn: differences of the resamples.
        exchanged: makes so many differences in which the two predictors changed places at random, user by user.
        by_user: difference of each user.
        resamples: exchanges that are made in any case.
        exchanges: most of them; see `paired`.
    """
    p = _p_value(observed, exchanged, resamples, exchanges)
    return _verdict(observed, drawn, p, by_user)


def _p_value(observed: float, exchanged: Callable[[int], Floats], least: int, most: int) -> float:
    """Share of exchanges with a difference as large as the observed one, which counts as one of them."""
    made = defined = larger = 0
    wanted = least
    while made < wanted:
        flipped = exchanged(min(_EXCHANGES, wanted - made))
        made += len(flipped)
        defined += int((~np.isnan(flipped)).sum())
        larger += int((np.abs(flipped) >= abs(observed) - 1e-12).sum())
        if made == least and (1 + larger) / (1 + defined) < ALPHA:
            wanted = max(least, most)
    return (1 + larger) / (1 + defined)


def _verdict(observed: float, drawn: Floats, p: float, by_user: Floats) -> Verdict:
    users = len(by_user)  # with those of whom alone the metric is undefined: they count in the difference
    drawn, by_user = (v[~np.isnan(v)] for v in (drawn, by_user))
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
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
        p,
        p,
        effect,
        detectable,
        users,
        Word.UNKNOWN,
    )


def by_predictor(made: Sequence[Verdict]) -> list[str]:
    """The verdicts in one line per first predictor and metric."""
    lines = []
    for first, metric in dict.fromkeys((v.first, v.metric) for v in made):
        own = [v for v in made if (v.first, v.metric) == (first, metric)]
        parts = [
            f"{phrase} {', '.join(f'{v.second} ({v.difference:+.3f})' for v in named)}"
            for word, phrase in (
                (Word.BETTER, "better than"),
                (Word.WORSE, "worse than"),
                (Word.UNKNOWN, "cannot be told from"),
            )
            if (named := [v for v in own if v.word is word])
        ]
        least = max(v.detectable for v in own)
        power = f"5 %, Holm; {own[0].users} users can show differences of {least:.3f}"
        lines.append(f"{first}, {metric}: {'; '.join(parts)} ({power})")
    return lines


def by_pair(made: Sequence[Verdict]) -> list[str]:
    """The verdicts in one line per pair of predictors: what the first gained over the second, in every metric."""
    lines = []
    for first, second in dict.fromkeys((v.first, v.second) for v in made):
        own = [v for v in made if (v.first, v.second) == (first, second)]
        parts = [f"{v.metric} {v.difference:+.3f}, {_in_words(v)}" for v in own]
        lines.append(f"{first} against {second}: {'; '.join(parts)} (5 %, Holm; {own[0].users} users)")
    return lines


def _in_words(v: Verdict) -> str:
    return f"cannot tell ({v.detectable:.3f} would show)" if v.word is Word.UNKNOWN else str(v.word)


def with_holm(raw: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts with corrected p-values, and what they say."""
    corrected = holm([v.p for v in raw])
    return [replace(v, p_holm=p, word=_word(v, p)) for v, p in zip(raw, corrected, strict=True)]


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
