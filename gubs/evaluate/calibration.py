"""How often a target is skipped when the policy says P(skip) = p. Pure: neither Ray nor vLLM.

A policy is trained on balanced options, so its probabilities do not fit the natural mix. They are calibrated on
training users (see `held_out`): by Platt scaling, whose intercept also corrects the share of skips, or by isotonic
regression, or not at all, whichever has the lowest Brier score on users that it was not fitted on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gubs.records import Option
from gubs.ufm.labels import OptionProbabilities

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_EDGE = 1e-4
"""Probabilities are kept this far from 0 and 1: their logits stay finite, and no method may be certain."""
_ENDS = (-float(np.log((1 - _EDGE) / _EDGE)), float(np.log((1 - _EDGE) / _EDGE)))
"""Logits of the smallest and the largest probability."""
_FOLDS = 5
_BINS = 10


@dataclass(frozen=True)
class Bin:
    """One bin of the reliability curve, of users that the calibration was not fitted on."""

    predicted: float
    """Mean calibrated P(skip)."""
    happened: float
    """Share of skips."""
    n: int


@dataclass(frozen=True)
class Curve:
    """A map between logits of P(skip), piecewise linear between its knots."""

    raw: tuple[float, ...]
    """The policy's logits, ascending."""
    calibrated: tuple[float, ...]

    def __call__(self, skip: npt.ArrayLike) -> Floats:
        """Calibrated P(skip), in the shape of `skip`."""
        return _expit(np.interp(_logit(skip), self.raw, self.calibrated))


@dataclass(frozen=True)
class Calibration:
    """From the policy's P(skip) to the share of such targets that are skipped, with how well it does so."""

    method: str
    """`platt`, `isotonic` or `none`."""
    curve: Curve
    reasons: Mapping[str, float]
    """Option of a skip -> factor for its probability among the skips; empty where the held-out targets tell nothing."""
    brier: float
    """Mean squared error of the calibrated P(skip), each user by a fit without that user."""
    brier_raw: float
    """Of the policy's own P(skip)."""
    brier_constant: float
    """Of the share of skips, for every target."""
    reliability: tuple[Bin, ...]
    n: int

    def options(self, raw: OptionProbabilities) -> OptionProbabilities:
        """Calibrated probabilities of all options: the skips keep their order among each other, but for `reasons`."""
        skip = float(self.curve(raw.skip))
        weights = {o: p * self.reasons.get(str(o), 1.0) for o, p in raw.options.items() if o != Option.A}
        total = sum(weights.values())
        shares = {o: w / total if total else 1 / len(weights) for o, w in weights.items()}
        named = {o: 1 - skip if o == Option.A else skip * shares[o] for o in raw.options}
        return dataclasses.replace(raw, options=named)


def fit(
    skip: Sequence[float],
    skipped: Sequence[bool],
    users: Sequence[str],
    options: Sequence[OptionProbabilities] = (),
    golds: Sequence[Option | None] = (),
) -> Calibration:
    """Fits all methods and keeps the best.

    Args:
        skip: the policy's P(skip) of each held-out target, in the natural mix.
        skipped: what happened.
        users: whose targets they are; folds never divide a user.
        options: the policy's probabilities, to correct the shares of the reasons; may be empty.
        golds: the gold options beside them; None where unknown.

    Raises:
        ValueError: the targets are all skipped, or none is, or they are of one user.
    """
    raw, truth = np.asarray(skip, float), np.asarray(skipped, bool)
    if truth.all() or not truth.any() or len(set(users)) < 2:
        raise ValueError("a calibration needs targets of several users, some skipped and some not")
    crossed = {name: cross_fitted(name, raw, truth, users) for name in _METHODS}
    scores = {name: _brier(values, truth) for name, values in crossed.items()}
    best = min(scores, key=lambda name: scores[name])
    return Calibration(
        method=best,
        curve=_METHODS[best](raw, truth),
        reasons=_reason_factors(options, golds),
        brier=scores[best],
        brier_raw=_brier(raw, truth),
        brier_constant=_brier(np.full(len(truth), truth.mean()), truth),
        reliability=reliability(crossed[best], truth),
        n=len(truth),
    )


def cross_fitted(method: str, skip: npt.ArrayLike, skipped: npt.ArrayLike, users: Sequence[str]) -> Floats:
    """Calibrated P(skip) of each held-out target, each user by a fit without that user, [N].

    Args:
        method: as in `Calibration`.
        skip: the policy's P(skip), [N].
        skipped: what happened, [N].
        users: whose targets they are, at least two.
    """
    from sklearn.model_selection import GroupKFold

    raw, truth = np.asarray(skip, float), np.asarray(skipped, bool)
    values = np.empty(len(raw))
    for train, test in GroupKFold(min(_FOLDS, len(set(users)))).split(raw, truth, users):
        values[test] = _METHODS[method](raw[train], truth[train])(raw[test])
    return values


def reliability(skip: Floats, skipped: Bools, bins: int = _BINS) -> tuple[Bin, ...]:
    """The reliability curve: targets in bins of equal size, by P(skip) [N]."""
    order = np.argsort(skip, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    return tuple(Bin(float(skip[p].mean()), float(skipped[p].mean()), len(p)) for p in parts)


def best_answer(options: OptionProbabilities) -> Option:
    """The option with the highest expected reward of Eq. 4: a right judgement counts 1, the right option 1 more."""
    skip = options.skip

    def reward(option: Option) -> float:
        p = options.options[option]
        return 2 * p if option == Option.A else skip + p

    return max(options.options, key=reward)


def _none(_: Floats, __: Bools) -> Curve:
    return Curve(_ENDS, _ENDS)


def _platt(raw: Floats, truth: Bools) -> Curve:
    from sklearn.linear_model import LogisticRegression

    if truth.all() or not truth.any():
        return _none(raw, truth)
    model = LogisticRegression(C=100.0).fit(_logit(raw)[:, None], truth)
    low, high = model.decision_function(np.array(_ENDS)[:, None]).tolist()
    return Curve(_ENDS, (low, high))


def _isotonic(raw: Floats, truth: Bools) -> Curve:
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=_EDGE, y_max=1 - _EDGE).fit(_logit(raw), truth)
    return Curve(tuple(model.X_thresholds_.tolist()), tuple(_logit(model.y_thresholds_).tolist()))


_METHODS: dict[str, Callable[[Floats, Bools], Curve]] = {"none": _none, "platt": _platt, "isotonic": _isotonic}


def _reason_factors(options: Sequence[OptionProbabilities], golds: Sequence[Option | None]) -> dict[str, float]:
    """Share of each reason among the held-out skips, by the mean probability that the policy gives it there."""
    skips = [(p, g) for p, g in zip(options, golds, strict=True) if g is not None and g != Option.A and p.skip > 0]
    if not skips:
        return {}
    reasons = [o for o in skips[0][0].options if o != Option.A]
    predicted = {o: float(np.mean([p.options[o] / p.skip for p, _ in skips])) for o in reasons}
    gold = {o: (sum(g == o for _, g in skips) + 1) / (len(skips) + len(reasons)) for o in reasons}
    return {str(o): gold[o] / max(predicted[o], _EDGE) for o in reasons}


def _brier(skip: Floats, truth: Bools) -> float:
    return float(np.mean((skip - truth) ** 2))


def _logit(p: npt.ArrayLike) -> Floats:
    clipped = np.clip(np.asarray(p, float), _EDGE, 1 - _EDGE)
    return np.log(clipped / (1 - clipped))


def _expit(x: npt.ArrayLike) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.asarray(x, float))))
