"""The metrics of IF-VR, each with its contract: what is positive, how it is averaged, what 0/0 and no answer count as.

Every metric is a function of sums over items, kept per user. So a bootstrap over users only reweighs the users' sums:
1,000 resamples of all metrics together are one matrix product.

Rules for all metrics:

- Sequential task: positive is a fast skip (gold is not A; play_rate < 0.3 where there is no gold option). Click task:
  positive is a click (gold A).
- An unanswered item (no readable option) is wrong in every judge and reason metric, whatever the gold is. The filter
  keeps it: without an answer there is no ground to drop a video.
- The filter keeps what is predicted to be watched (sequential) or clicked (click).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gubs.records import FAST_SKIP_BELOW, FINISH_ABOVE, TASK_OPTIONS, Option, Task

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Sums = Mapping[str, Floats]
"""Sums of item columns by name: [...] of any leading shape (none: the data; [R]: resamples)."""
Statistic = Callable[[Sums], Floats]

UNANSWERED_WRONG = "wrong"
UNANSWERED_KEPT = "kept"
ZERO, UNDEFINED = "0/0 = 0", "0/0 undefined (NaN)"
REASONS = (Option.B, Option.C, Option.D)
_INTERVAL = (2.5, 97.5)
_BLOCK = 4_000_000
"""Most resample weights held in memory at once."""


@dataclass(frozen=True)
class Predictions:
    """What was predicted for the items of the test users, and what happened. Rows are items, [N] each.

    Raises:
        ValueError: lengths differ, an option is none of the task's, the task is `click` and neither gold nor clicked is
            known, or `sequential` and neither gold nor play rate is, or a gold contradicts what happened.
    """

    user: Sequence[str]
    gold: Sequence[str | None]
    """Gold option; None if the reason of a skip is unknown (such items count for the judge, not for the reason)."""
    predicted: Sequence[str | None]
    """Predicted option; None if unanswered (no answer, or an unreadable one)."""
    task: Task = Task.SEQUENTIAL
    play_rate: Sequence[float | None] | None = None
    """Watched share, 0-1; None if unknown (such items are left out of the play-rate metrics)."""
    clicked: Sequence[bool | None] | None = None
    """Click task: what the user did; gold A means the same."""

    def __post_init__(self) -> None:
        for name in ("gold", "predicted", "play_rate", "clicked"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.user):
                raise ValueError(f"{name} has {len(values)} items, user has {len(self.user)}")
        _ = self.positive, self.kept  # refuses contradictory items at once

    def __len__(self) -> int:
        return len(self.user)

    @functools.cached_property
    def gold_code(self) -> npt.NDArray[np.int8]:
        """Index of the gold option among the task's, -1 for None."""
        return _codes("gold", self.gold, self.task)

    @functools.cached_property
    def said_code(self) -> npt.NDArray[np.int8]:
        """Index of the predicted option among the task's, -1 for unanswered."""
        return _codes("predicted", self.predicted, self.task)

    @functools.cached_property
    def rate(self) -> Floats:
        """Play rate, NaN if unknown."""
        return _floats(self.play_rate, len(self))

    @functools.cached_property
    def positive(self) -> Bools:
        """The truth: fast skip (sequential) or click (click)."""
        if self.task is Task.CLICK:
            happened, positive_gold = _floats(self.clicked, len(self)), self.gold_code == 0
        else:
            rate = self.rate
            happened = np.where(np.isnan(rate), np.nan, (rate < FAST_SKIP_BELOW).astype(float))
            positive_gold = self.gold_code > 0
        return _truth(self.gold_code >= 0, positive_gold, happened, self.user)

    @property
    def bad(self) -> Bools:
        """What a filter should drop: fast skips, or what is not clicked."""
        return ~self.positive if self.task is Task.CLICK else self.positive

    @functools.cached_property
    def answered(self) -> Bools:
        """Items with a readable answer."""
        return self.said_code >= 0

    @functools.cached_property
    def said_positive(self) -> Bools:
        """Predicted fast skip (sequential) or click (click); False where unanswered."""
        return self.said_code == 0 if self.task is Task.CLICK else self.said_code > 0

    @functools.cached_property
    def kept(self) -> Bools:
        """Items that the filter keeps."""
        passes = self.said_positive if self.task is Task.CLICK else ~self.said_positive
        return passes | ~self.answered


def well_formed_rewards(p: Predictions) -> Floats:
    """R of Eq. 4 if every answer were well-formed, [N]: 1, and 1 each for the right judgement and the right option.

    Where no reason of a skip is known, the option counts nothing; where reasons are known, a skip without one is NaN.
    All are NaN if no option is known at all.
    """
    reasons_known = bool((p.gold_code > 0).any())
    judged = p.answered & (p.said_positive == p.positive)
    chosen = p.answered & (p.said_code == p.gold_code) & reasons_known
    rewarded = p.gold_code >= 0 if reasons_known else np.full(len(p), bool((p.gold_code >= 0).any()))
    return np.where(rewarded, 1.0 + judged + chosen, np.nan)


@dataclass(frozen=True, slots=True)
class Metric:
    """A number with its contract."""

    name: str
    value: float
    """NaN if undefined."""
    n: int
    """Number of items (for metrics per user: users)."""
    base_rate: float
    """The value without a model: the share of positives, of the most frequent reason, or the unfiltered value."""
    low: float
    high: float
    """95 % percentile bootstrap interval over users; NaN with fewer than two users."""
    positive: str
    """What counts as positive."""
    averaging: str
    """`pooled` (over items), `per user` (mean of users' means), `per class` (mean of classes) or `count`."""
    empty: str
    """What 0/0 counts as."""
    unanswered: str
    """What an unanswered item counts as: `wrong` or `kept`."""
    n_unanswered: int
    """Number of unanswered items that the metric covers."""


@dataclass(frozen=True, slots=True)
class _Spec:
    """How one metric is computed and what its contract says."""

    name: str
    statistic: Statistic
    over: str
    """Name of the sum that is n."""
    base: Statistic
    positive: str
    averaging: str = "pooled"
    empty: str = UNDEFINED
    unanswered: str = UNANSWERED_WRONG
    blank: str = "unanswered"
    """Name of the sum that is n_unanswered."""


def judge_metrics(predictions: Predictions, *, resamples: int = 1000, seed: int = 0) -> list[Metric]:
    """Accuracy, F1, balanced accuracy and MCC of skip or no skip (sequential), click or no click (click)."""
    return _evaluate(predictions, _judge_specs(predictions.task), resamples, seed)


def reason_metrics(predictions: Predictions, *, resamples: int = 1000, seed: int = 0) -> list[Metric]:
    """Right option among gold skips with a known reason: accuracy, macro F1 and F1 of B, C, D. Sequential only."""
    return _evaluate(predictions, _reason_specs(), resamples, seed) if predictions.task is Task.SEQUENTIAL else []


def filter_metrics(predictions: Predictions, *, resamples: int = 1000, seed: int = 0) -> list[Metric]:
    """Play and click rates of the videos that the filter keeps, the share kept and the share of good videos lost."""
    return _evaluate(predictions, _filter_specs(predictions.task), resamples, seed)


def evaluate(predictions: Predictions, *, resamples: int = 1000, seed: int = 0) -> list[Metric]:
    """All metrics of the predictions' task.

    Args:
        predictions: items of the test users.
        resamples: bootstrap resamples of users; 0 leaves the intervals NaN.
        seed: of the bootstrap.
    """
    reasons = _reason_specs() if predictions.task is Task.SEQUENTIAL else []
    specs = [*_judge_specs(predictions.task), *reasons, *_filter_specs(predictions.task)]
    return _evaluate(predictions, specs, resamples, seed)


def choice_metrics(predictions: Predictions, *, resamples: int = 1000, seed: int = 0) -> list[Metric]:
    """What the "10 + 10" tables show of yes or no answers: pooled, and as means of users' values. Click task only."""
    return _evaluate(predictions, _choice_specs(), resamples, seed)


def over_users(
    users: Sequence[str], value: Callable[[Floats], Floats], *, resamples: int, seed: int
) -> dict[str, float]:
    """A figure of items with its 95 % interval over users: `value`, `low`, `high`.

    Args:
        users: of the items, [N].
        value: the figure of weighted items: [..., N] -> [...]; NaN where it is undefined.
        resamples: of users; without any, or with one user, the interval is NaN.
        seed: of the resamples.
    """
    names, codes = np.unique(np.asarray(users, dtype=np.str_), return_inverse=True)
    drawn = [value(w[:, codes]) for w in bootstrap_weights(len(names), resamples, seed, len(codes))]
    low, high = _interval(np.concatenate(drawn)) if drawn and len(names) > 1 else (float("nan"), float("nan"))
    return {"value": float(value(np.ones(len(codes)))), "low": low, "high": high}


def user_sums(predictions: Predictions) -> dict[str, Floats]:
    """The sums that every metric is a function of, by user (sorted), [U] each."""
    return _user_sums(predictions)


def statistic_of(name: str, task: Task) -> Statistic:
    """How a metric follows from sums.

    Raises:
        ValueError: the task has no such metric.
    """
    reasons = _reason_specs() if task is Task.SEQUENTIAL else _choice_specs()
    specs = {s.name: s for s in (*_judge_specs(task), *reasons, *_filter_specs(task))}
    if name not in specs:
        raise ValueError(f"{name!r} is not a metric of the {task} task")
    return specs[name].statistic


def baselines(predictions: Predictions, *, resamples: int = 1000, seed: int = 0) -> dict[str, list[Metric]]:
    """Metrics of predictions without a model: both constants, a coin with the base rate, and random drops.

    The constant skip names the most frequent reason, the coin draws reasons as they are distributed. `random drop`
    keeps as many videos as the predictions do, drawn with the seed; `random drop, expected` is its expectation (each
    video dropped independently; without intervals).
    """
    rng = np.random.default_rng(seed)
    rows = {
        name: evaluate(_with_answers(predictions, codes), resamples=resamples, seed=seed)
        for name, codes in _constant_answers(predictions, rng).items()
    }
    drop = _random_drop(predictions, rng)
    return rows | {
        "random drop": filter_metrics(drop, resamples=resamples, seed=seed),
        "random drop, expected": _expected_drop(predictions),
    }


def table(
    predictions: Predictions, name: str = "model", *, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """The predictions' metrics and all baselines, one row per metric: `method` and the fields of `Metric`."""
    methods = {name: evaluate(predictions, resamples=resamples, seed=seed)}
    methods |= baselines(predictions, resamples=resamples, seed=seed)
    return [{"method": method, **asdict(metric)} for method, metrics in methods.items() for metric in metrics]


@dataclass(frozen=True, slots=True)
class Confusion:
    """The judge's 2x2 table: counts or shares, of any shape."""

    tp: Floats | float
    fp: Floats | float
    fn: Floats | float
    tn: Floats | float

    @property
    def accuracy(self) -> Floats:
        """Share of right judgements."""
        return ratio(self.tp + self.tn, self.tp + self.tn + self.fp + self.fn)

    @property
    def f1(self) -> Floats:
        """F1 of the positive class; 0/0 = 0."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn, 0.0)

    @property
    def balanced_accuracy(self) -> Floats:
        """Mean of the two classes' recalls; NaN where a class has no items."""
        return (ratio(self.tp, self.tp + self.fn) + ratio(self.tn, self.tn + self.fp)) / 2

    @property
    def mcc(self) -> Floats:
        """Matthews correlation; 0/0 = 0."""
        product = (self.tp + self.fp) * (self.tp + self.fn) * (self.tn + self.fp) * (self.tn + self.fn)
        return ratio(self.tp * self.tn - self.fp * self.fn, np.sqrt(product), 0.0)


def published_confusion(accuracy: float, play_rate_above_30: float, skip_rate: float) -> Confusion:
    """The judge's table, in shares of the items, from three numbers that a paper prints.

    `play_rate_above_30` of what is kept is the judge's negative predictive value, so with skip rate s the share kept is
    q = (accuracy - s) / (2 NPV - 1), FN = (1 - NPV) q and TP = s - FN.

    Args:
        accuracy: Judge Acc, 0-1.
        play_rate_above_30: share of kept videos that were not skipped, 0-1, not 0.5.
        skip_rate: share of skips among all items, 0-1.
    """
    kept = (accuracy - skip_rate) / (2 * play_rate_above_30 - 1)
    fn = (1 - play_rate_above_30) * kept
    tp = skip_rate - fn
    return Confusion(tp=tp, fp=1 - kept - tp, fn=fn, tn=kept - fn)


# --- definitions of the metrics ---------------------------------------------------------------------------------------


def _judge_specs(task: Task) -> list[_Spec]:
    positive = "click" if task is Task.CLICK else "fast skip"
    prefix = "click" if task is Task.CLICK else "judge"

    def spec(name: str, statistic: Callable[[Confusion], Floats], empty: str, averaging: str = "pooled") -> _Spec:
        return _Spec(
            f"{prefix}_{name}", lambda s: statistic(_confusion(s)), "items", _share_positive, positive, averaging, empty
        )

    return [
        spec("acc", lambda c: c.accuracy, UNDEFINED),
        spec("f1", lambda c: c.f1, ZERO),
        spec("balanced_acc", lambda c: c.balanced_accuracy, UNDEFINED, "per class"),
        spec("mcc", lambda c: c.mcc, ZERO),
    ]


def _reason_specs() -> list[_Spec]:
    def most_frequent(s: Sums) -> Floats:
        return ratio(np.maximum.reduce([s[f"gold_{o}"] for o in REASONS]), s["reasons"])

    def f1_of(option: Option) -> Statistic:
        return lambda s: ratio(2 * s[f"right_{option}"], s[f"gold_{option}"] + s[f"said_{option}"], 0.0)

    def share_of(option: Option) -> Statistic:
        return lambda s: ratio(s[f"gold_{option}"], s["reasons"])

    per_class = [
        _Spec(f"reason_f1_{o}", f1_of(o), "reasons", share_of(o), f"reason {o}", empty=ZERO, blank="reasons_unanswered")
        for o in REASONS
    ]

    def accuracy(s: Sums) -> Floats:
        return ratio(sum((s[f"right_{o}"] for o in REASONS), np.zeros(())), s["reasons"])

    def macro(s: Sums) -> Floats:
        return np.mean([f.statistic(s) for f in per_class], axis=0)

    rest = {"over": "reasons", "base": most_frequent, "blank": "reasons_unanswered"}
    return [
        _Spec("reason_acc", accuracy, positive="the gold reason", **rest),  # type: ignore[arg-type]
        _Spec("reason_f1", macro, positive="B, C, D in turn", averaging="per class", empty=ZERO, **rest),  # type: ignore[arg-type]
        *per_class,
    ]


def _choice_specs() -> list[_Spec]:
    def pooled(name: str, total: str, other: str) -> _Spec:
        def value(s: Sums) -> Floats:
            c = _confusion(s)
            return ratio(getattr(c, total), getattr(c, total) + getattr(c, other), 0.0)

        return _Spec(f"click_{name}", value, "items", _share_positive, "click", empty=ZERO)

    def per_user(name: str) -> _Spec:
        def value(s: Sums) -> Floats:
            return ratio(s[f"user_{name}"], s["users"])

        return _Spec(f"user_{name}", value, "users", _share_positive, "click", "per user", ZERO)

    return [
        *_judge_specs(Task.CLICK),
        pooled("recall", "tp", "fn"),
        pooled("precision", "tp", "fp"),
        *(per_user(name) for name in ("acc", "recall", "f1")),
    ]


def _filter_specs(task: Task) -> list[_Spec]:
    rates = [
        _rate_spec("person_play_rate", "person_rate", "persons", "play rate, capped at 1", "per user"),
        _rate_spec("total_play_rate", "rate", "rated", "play rate, capped at 1"),
        _rate_spec("finish_rate", "finished", "rated", f"play rate > {FINISH_ABOVE}"),
        _rate_spec("play_rate_above_30", "not_skipped", "rated", f"play rate >= {FAST_SKIP_BELOW} (no fast skip)"),
    ]
    clicks = [_rate_spec("click_rate", "good", "kept", "click", blank="unanswered")]
    good = "clicked" if task is Task.CLICK else "watched"
    return [
        *(clicks if task is Task.CLICK else rates),
        _kept_spec("share_kept", "kept", "items", "video kept", unfiltered=1.0),
        _kept_spec(f"share_{good}_lost", "lost", "all_good", f"{good} video dropped"),
        _kept_spec("users_without_video", "users_emptied", "users", "user with no video kept", averaging="count"),
    ]


def _rate_spec(
    name: str, total: str, count: str, positive: str, averaging: str = "pooled", blank: str = "rated_unanswered"
) -> _Spec:
    """A mean over kept items; its base rate is the mean over all items (`all_`)."""

    def value(s: Sums) -> Floats:
        return ratio(s[total], s[count])

    def unfiltered(s: Sums) -> Floats:
        return ratio(s[f"all_{total}"], s[f"all_{count}"])

    return _Spec(name, value, count, unfiltered, positive, averaging, unanswered=UNANSWERED_KEPT, blank=blank)


def _kept_spec(
    name: str, total: str, count: str, positive: str, averaging: str = "pooled", unfiltered: float = 0.0
) -> _Spec:
    """How much the filter keeps or drops: a share or a count."""

    def value(s: Sums) -> Floats:
        return s[total] if averaging == "count" else ratio(s[total], s[count])

    def base(s: Sums) -> Floats:
        return np.full(np.shape(s[total]), unfiltered)

    return _Spec(name, value, count, base, positive, averaging, unanswered=UNANSWERED_KEPT)


def _share_positive(s: Sums) -> Floats:
    return ratio(s["positive"], s["items"])


def _confusion(s: Sums) -> Confusion:
    return Confusion(tp=s["tp"], fp=s["fp"], fn=s["positive"] - s["tp"], tn=s["items"] - s["positive"] - s["fp"])


# --- from items to users' sums to values and intervals ----------------------------------------------------------------


def _item_columns(p: Predictions) -> dict[str, Bools | Floats]:
    """The columns that are summed over items, [N] each."""
    good = p.positive if p.task is Task.CLICK else ~p.positive
    rated = ~np.isnan(p.rate)
    rate = np.where(rated, p.rate, 0.0)
    columns: dict[str, Bools | Floats] = {
        "items": np.ones(len(p), dtype=bool),
        "unanswered": ~p.answered,
        "rated_unanswered": ~p.answered & rated,
        "positive": p.positive,
        "tp": p.positive & p.said_positive,
        "fp": ~p.positive & (p.said_positive | ~p.answered),  # no answer is wrong: FP here, FN among the positive
        "kept": p.kept,
        "good": p.kept & good,
        "lost": ~p.kept & good,
        "all_kept": np.ones(len(p), dtype=bool),
        "all_good": good,
    }
    for prefix, among in (("", p.kept & rated), ("all_", rated)):
        columns[f"{prefix}rated"] = among
        columns[f"{prefix}rate"] = np.where(among, rate, 0.0)
        columns[f"{prefix}finished"] = among & (rate > FINISH_ABOVE)
        columns[f"{prefix}not_skipped"] = among & (rate >= FAST_SKIP_BELOW)
    return columns | (_reason_columns(p) if p.task is Task.SEQUENTIAL else {})


def _reason_columns(p: Predictions) -> dict[str, Bools | Floats]:
    explained = p.gold_code > 0
    columns: dict[str, Bools | Floats] = {"reasons": explained, "reasons_unanswered": explained & ~p.answered}
    for code, option in enumerate(TASK_OPTIONS[Task.SEQUENTIAL]):
        columns[f"gold_{option}"] = explained & (p.gold_code == code)
        columns[f"said_{option}"] = explained & (p.said_code == code)
        columns[f"right_{option}"] = explained & (p.gold_code == code) & (p.said_code == code)
    return columns


def _user_sums(p: Predictions) -> dict[str, Floats]:
    """Sums by user, [U] each, users in sorted order."""
    users, codes = np.unique(np.asarray(p.user, dtype=np.str_), return_inverse=True)
    sums: dict[str, Floats] = {
        name: np.bincount(codes, values, minlength=len(users)).astype(np.float64)
        for name, values in _item_columns(p).items()
    }
    for prefix in ("", "all_"):
        sums[f"{prefix}persons"] = (sums[f"{prefix}rated"] > 0).astype(np.float64)
        sums[f"{prefix}person_rate"] = ratio(sums[f"{prefix}rate"], sums[f"{prefix}rated"], 0.0)
    sums["users"] = np.ones(len(users))
    sums["user_acc"] = 1 - (sums["positive"] - sums["tp"] + sums["fp"]) / sums["items"]
    sums["user_recall"] = ratio(sums["tp"], sums["positive"], 0.0)
    sums["user_f1"] = ratio(2 * sums["tp"], sums["positive"] + sums["tp"] + sums["fp"], 0.0)
    sums["users_emptied"] = (sums["kept"] == 0).astype(np.float64)
    return sums


def _evaluate(p: Predictions, specs: Sequence[_Spec], resamples: int, seed: int) -> list[Metric]:
    by_user = _user_sums(p)
    total = {name: values.sum() for name, values in by_user.items()}
    drawn = _bootstrap(by_user, resamples, seed)
    return [_metric(spec, total, drawn) for spec in specs]


def _metric(spec: _Spec, total: Sums, drawn: Sums) -> Metric:
    low, high = _interval(spec.statistic(drawn)) if drawn else (float("nan"), float("nan"))
    return Metric(
        name=spec.name,
        value=float(spec.statistic(total)),
        n=round(float(total[spec.over])),
        base_rate=float(spec.base(total)),
        low=low,
        high=high,
        positive=spec.positive,
        averaging=spec.averaging,
        empty=spec.empty,
        unanswered=spec.unanswered,
        n_unanswered=round(float(total[spec.blank])),
    )


def _bootstrap(by_user: Mapping[str, Floats], resamples: int, seed: int) -> dict[str, Floats]:
    """The sums of each resample of users, [R] each; empty with fewer than two users."""
    users = len(by_user["users"])
    if users < 2 or resamples < 1:
        return {}
    matrix = np.stack(list(by_user.values()), axis=1)
    sums = [weights @ matrix for weights in bootstrap_weights(users, resamples, seed)]
    return dict(zip(by_user, np.concatenate(sums).T, strict=True))


def bootstrap_weights(users: int, resamples: int, seed: int, width: int = 0) -> Iterator[Floats]:
    """How often each resample draws each user, [r, U], in blocks of resamples.

    Args:
        users: U.
        resamples: in all.
        seed: of the draws.
        width: numbers per resample that the caller makes of a block, if more than U.
    """
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(users, width, 1))
    for start in range(0, resamples, block):
        yield _weights(rng, min(block, resamples - start), users)


def _weights(rng: np.random.Generator, resamples: int, users: int) -> Floats:
    drawn = rng.integers(users, size=(resamples, users)) + users * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * users).reshape(resamples, users).astype(np.float64)


def _interval(values: Floats) -> tuple[float, float]:
    """Percentiles over the resamples in which the metric is defined."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, _INTERVAL)
    return float(low), float(high)


# --- baselines --------------------------------------------------------------------------------------------------------


def _constant_answers(p: Predictions, rng: np.random.Generator) -> dict[str, npt.NDArray[np.int64]]:
    """Codes of the options that each baseline answers, [N] each."""
    coin = rng.random(len(p)) < (p.positive.mean() if len(p) else 0.0)
    if p.task is Task.CLICK:
        answers = {"always click": np.zeros(len(p)), "never click": np.ones(len(p)), "coin": np.where(coin, 0, 1)}
        return {name: codes.astype(np.int64) for name, codes in answers.items()}
    counts = np.bincount(p.gold_code[p.gold_code > 0], minlength=4)[1:]
    chances = counts / counts.sum() if counts.sum() else np.full(3, 1 / 3)
    reasons = 1 + rng.choice(3, size=len(p), p=chances)
    return {
        "always skip": np.full(len(p), 1 + int(counts.argmax())),
        "never skip": np.zeros(len(p), dtype=np.int64),
        "coin": np.where(coin, reasons, 0),
    }


def _with_answers(p: Predictions, codes: npt.NDArray[np.int64]) -> Predictions:
    """The same items with the answers `codes`."""
    options = TASK_OPTIONS[p.task]
    return Predictions(p.user, p.gold, [options[c] for c in codes], p.task, p.play_rate, p.clicked)


def _random_drop(p: Predictions, rng: np.random.Generator) -> Predictions:
    """Predictions that drop equally many items, chosen at random."""
    dropped = np.zeros(len(p), dtype=bool)
    dropped[rng.permutation(len(p))[: int((~p.kept).sum())]] = True
    return _with_answers(p, dropped.astype(np.int64))  # click: B is dropped; sequential: B is any skip


def _expected_drop(p: Predictions) -> list[Metric]:
    """Filter metrics expected when each item is dropped independently, at the drop rate d of the predictions.

    The expectation of a mean over kept items is the unfiltered value. All m items of a user are dropped
    with probability d ** m; Person Play Rate is the expected sum of users' means over that of remaining users.
    """
    by_user = _user_sums(_with_answers(p, np.full(len(p), 0)))
    drop = float((~p.kept).mean()) if len(p) else 0.0
    remaining = 1 - drop ** by_user["all_rated"]
    total = {name: values.sum() for name, values in by_user.items()}
    expected = dict(total)
    for name in ("rate", "rated", "finished", "not_skipped", "good", "kept"):
        expected[name] = total[f"all_{name}"] * (1 - drop)
    expected |= {"lost": total["all_good"] * drop, "users_emptied": (drop ** by_user["items"]).sum()}
    expected |= {"persons": remaining.sum(), "person_rate": (remaining * by_user["all_person_rate"]).sum()}
    return [_metric(spec, expected, {}) for spec in _filter_specs(p.task)]


# --- helpers ----------------------------------------------------------------------------------------------------------


def _codes(name: str, values: Sequence[str | None], task: Task) -> npt.NDArray[np.int8]:
    codes: dict[str | None, int] = {o.value: i for i, o in enumerate(TASK_OPTIONS[task])} | {None: -1}
    try:
        return np.fromiter((codes[v] for v in values), dtype=np.int8, count=len(values))
    except KeyError as e:
        raise ValueError(f"{name}: {e.args[0]!r} is not an option of the {task} task; use None for no answer") from None


def _floats(values: Sequence[float | None] | None, n: int) -> Floats:
    return np.full(n, np.nan) if values is None else np.array([np.nan if v is None else float(v) for v in values])


def _truth(labelled: Bools, by_gold: Bools, happened: Floats, user: Sequence[str]) -> Bools:
    """The truth by the gold option if known, otherwise by what happened; both must agree."""
    observed = ~np.isnan(happened)
    wrong = np.flatnonzero(labelled & observed & (by_gold != (happened == 1)))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} gold options contradict what happened, first item {wrong[0]} (user {user[wrong[0]]!r})"
        )
    missing = np.flatnonzero(~(labelled | observed))
    if len(missing):
        raise ValueError(
            f"{len(missing)} items have neither a gold option nor a known outcome, first item {missing[0]}"
        )
    return np.where(labelled, by_gold, happened == 1)


def ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike, empty: float = float("nan")) -> Floats:
    """Quotient, `empty` where the denominator is 0."""
    above, below = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(above, below, out=np.full(np.broadcast(above, below).shape, empty), where=below != 0)
