"""GA-GRPO's advantages: six rewards of one group (four T, one S, one G) become six advantages.

Everything is vectorised over groups by `group_id`; the order of the samples does not matter, to the last bit, so load
balancing and data-parallel splits cannot change a result. Plain GRPO is the same with T samples only.

Three rules, one function each (`RULES`), with w = W of the sample's role:

- `paper`: R := R * w, then A = (R - mean) / (std + eps) over the group's samples. Taken literally it punishes right
  answers: six equal rewards above 0 give S and G -1.29.
- `weighted`: mean and std of the *raw* rewards with w as sampling weights, then A * w / mean(w).
- `anchored`: mean and std of the T samples' raw rewards, then A * w / mean(w).

Standard deviations have ddof 1. A missing sample is simply not in the arrays: means, deviations and mean(w) are over
those that are there. A group with one sample left gives 0.

Zero variance is decided by comparing rewards, never by a small deviation. `weighted` and `anchored` give exactly 0
where all raw rewards are equal. `paper` must not (its golden values are not 0 there); it gives 0 where all *weighted*
rewards are equal, since its formula is then 0/0: all rewards 0, or equal rewards and one role only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from gubs.ufm.settings import AdvantageSettings

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_SAME = 1e-12
"""Weighted rewards closer than this share of the largest are equal: 0.6 * 1 is 0.2 * 3, but not in floating point."""


MEASURED: Mapping[str, str] = {
    "paper": "one third of the right answers get a negative advantage, at any accuracy from .3 to .9 (`weighted` and "
    "`anchored`: none)",
}
"""Rule -> what was measured of it, for pages and logs beside a training that uses it; tests measure it again."""


class SampleRole(StrEnum):
    """Whose profile a sample's prompt showed (the paper's profile sampling)."""

    T = "T"
    """The training user u_T."""
    S = "S"
    """A similar user u_S: another member of one of u_T's groups."""
    G = "G"
    """A group profile P_g."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of a batch and the figures that are always logged."""

    values: Floats
    """Advantage of each sample, in the order of the input, [N]."""
    reward_raw: Mapping[SampleRole, float]
    """Mean raw reward, for each role that has samples."""
    reward_weighted: Mapping[SampleRole, float]
    """Mean of R * W, for each role that has samples."""
    advantage: Mapping[SampleRole, float]
    """Mean advantage, for each role that has samples."""
    frac_zero_variance: float
    """Share of groups whose raw rewards are all equal (one sample left counts too)."""
    frac_right_pushed_down: float
    """Share of the samples with the right option whose advantage is below 0; 0 where none is right."""
    frac_wrong_pushed_up: float
    """Share of the samples without the right option whose advantage is above 0; 0 where none is wrong."""

    def figures(self) -> dict[str, float]:
        """The figures by their logged names. A role without samples has none."""
        by_role = {
            f"{name}/{role}": value
            for name in ("reward_raw", "reward_weighted", "advantage")
            for role, value in getattr(self, name).items()
        }
        fractions = ("frac_zero_variance", "frac_right_pushed_down", "frac_wrong_pushed_up")
        return by_role | {name: getattr(self, name) for name in fractions}


def advantages(
    raw: npt.ArrayLike,
    role: Sequence[SampleRole] | Sequence[str] | npt.NDArray[np.str_],
    group_id: Sequence[int] | Sequence[str] | npt.NDArray[np.generic],
    settings: AdvantageSettings,
    *,
    right: npt.ArrayLike,
) -> Advantages:
    """Advantages of a batch of samples by the rule that the settings name.

    Args:
        raw: raw rewards R(o) of Eq. 4, [N].
        role: T, S or G of each sample, [N].
        group_id: the group of each sample, any integers or strings, [N].
        settings: rule, weights (Table 11), eps.
        right: whether the sample chose the right option, [N]; for the health figures only.

    Raises:
        ValueError: lengths differ, a role is unknown, or a reward is not finite (drop a sample that has none).
    """
    rewards = np.asarray(raw, dtype=np.float64)
    roles = np.asarray([SampleRole(r) for r in role], dtype=np.str_)
    ids, is_right = np.asarray(group_id), np.asarray(right, dtype=bool)
    if not rewards.shape == roles.shape == ids.shape == is_right.shape or rewards.ndim != 1:
        shapes = [a.shape for a in (rewards, roles, ids, is_right)]
        raise ValueError(f"raw, role, group_id and right must be of one length, not {shapes}")
    if not np.isfinite(rewards).all():
        raise ValueError(f"rewards {np.flatnonzero(~np.isfinite(rewards)).tolist()} are not finite")
    weight = _weights(roles, settings)
    order, groups = _grouped(rewards, roles, ids)
    values = np.zeros_like(rewards)
    if len(rewards):
        anchor = roles[order] == SampleRole.T
        values[order] = RULES[settings.rule](rewards[order], weight[order], anchor, groups, settings.eps)
    return _with_health(values, rewards, rewards * weight, roles, ids, is_right)


def contradicted(opposite: npt.ArrayLike, group_id: Sequence[int], share: float) -> Bools:
    """Samples of groups whose label is probably wrong: at least this share of the group's answers says the opposite.

    Args:
        opposite: whether an answer says the opposite of the label about skip or not, [N]; one without an option does
            not.
        group_id: the group of each sample, [N].
        share: see `GRPOSettings.doubt`; 0 = no label is doubted.

    Returns:
        [N]
    """
    against = np.asarray(opposite, dtype=bool)
    if not share or not len(against):
        return np.zeros(len(against), dtype=bool)
    _, inverse = np.unique(np.asarray(group_id), return_inverse=True)
    doubtful: Bools = np.bincount(inverse, against) >= share * np.bincount(inverse) - _SAME
    return doubtful[inverse]


def paper_rule(raw: Floats, weight: Floats, anchor: Bools, groups: "Groups", eps: float) -> Floats:  # noqa: ARG001
    """Rewards times W, standardised over the group (the paper's advantage equation)."""
    weighted = raw * weight
    low, high = groups.spread(weighted)
    same = high - low <= _SAME * np.maximum(np.abs(low), np.abs(high))
    one = np.ones_like(raw)
    return _standardised(weighted, *_moments(weighted, one, groups), ~same, groups, eps)


def weighted_rule(raw: Floats, weight: Floats, anchor: Bools, groups: "Groups", eps: float) -> Floats:  # noqa: ARG001
    """Raw rewards standardised with w as sampling weights, then times w / mean(w). Sums to 0 over a group.

    The deviation is the unbiased one for weights that say how much a sample counts,
    sum w (R - mean)^2 / (sum w - sum w^2 / sum w): ddof 1 where all weights are equal, that of the T samples alone
    where the others weigh 0.
    """
    counts = weight > 0
    low, high = groups.spread(raw, where=counts)
    values = _standardised(raw, *_moments(raw, weight, groups), high > low, groups, eps)
    return values * _relative(weight, groups)


def anchored_rule(raw: Floats, weight: Floats, anchor: Bools, groups: "Groups", eps: float) -> Floats:
    """Raw rewards measured against the T samples' mean and std, then times w / mean(w).

    Where the T samples give no deviation (one of them left, or all equal) S and G are still measured against their
    mean, on the scale of the whole group's deviation: dividing by eps instead would give advantages of tens of
    thousands, and 0 would discard the only samples that say something. Without a T sample there is no anchor: 0.
    """
    mean, std = _moments(raw, anchor.astype(np.float64), groups)
    low, high = groups.spread(raw, where=anchor)
    whole = _moments(raw, np.ones_like(raw), groups)[1]
    scale = np.where(high > low, std, whole)
    lowest, highest = groups.spread(raw)
    informed = (highest > lowest) & (groups.total(anchor.astype(np.float64)) > 0)
    return _standardised(raw, mean, scale, informed, groups, eps) * _relative(weight, groups)


Rule = Callable[[Floats, Floats, Bools, "Groups", float], Floats]
"""(raw, weight, is T, groups, eps) -> advantages; samples sorted by group."""

RULES: dict[str, Rule] = {"paper": paper_rule, "weighted": weighted_rule, "anchored": anchored_rule}


@dataclass(frozen=True)
class Groups:
    """Segments of samples that are sorted by group."""

    of: npt.NDArray[np.intp]
    """Group index of each sample, ascending, [N]."""
    starts: npt.NDArray[np.intp]
    """First sample of each group, [K]."""

    def total(self, values: Floats) -> Floats:
        """Sum over each group, [K]."""
        return np.add.reduceat(values, self.starts)

    def spread(self, values: Floats, where: Bools | None = None) -> tuple[Floats, Floats]:
        """Lowest and highest value of each group, [K] each; (inf, -inf) where a group has none."""
        low = values if where is None else np.where(where, values, np.inf)
        high = values if where is None else np.where(where, values, -np.inf)
        return np.minimum.reduceat(low, self.starts), np.maximum.reduceat(high, self.starts)


def _grouped(raw: Floats, roles: npt.NDArray[np.str_], ids: npt.NDArray[np.generic]) -> tuple[npt.NDArray, Groups]:
    """The order that sorts samples by group, and the groups in it.

    Within a group samples are sorted by role and reward, so that sums are added up in one order whatever the input's.
    """
    _, inverse = np.unique(ids, return_inverse=True)
    order = np.lexsort((raw, roles, inverse))
    of = inverse[order]
    return order, Groups(of, np.flatnonzero(np.diff(of, prepend=-1)))


def _weights(roles: npt.NDArray[np.str_], settings: AdvantageSettings) -> Floats:
    """W of each sample, [N]."""
    by_role = {
        SampleRole.T: settings.weight_user,
        SampleRole.S: settings.weight_similar,
        SampleRole.G: settings.weight_group,
    }
    return np.array([by_role[SampleRole(r)] for r in roles], dtype=np.float64)


def _moments(values: Floats, weight: Floats, groups: Groups) -> tuple[Floats, Floats]:
    """Weighted mean and unbiased deviation of each group, [K] each; 0 where the weights do not determine them."""
    total = groups.total(weight)
    mean = _ratio(groups.total(weight * values), total)
    squares = groups.total(weight * (values - mean[groups.of]) ** 2)
    freedom = total - _ratio(groups.total(weight**2), total)
    # A single sample's freedom is 0 in theory and an ulp in practice.
    return mean, np.sqrt(_ratio(squares, np.where(freedom > _SAME * total, freedom, 0.0)))


def _standardised(values: Floats, mean: Floats, std: Floats, informed: Bools, groups: Groups, eps: float) -> Floats:
    """(value - mean) / (std + eps), exactly 0 in groups that are not `informed`."""
    scale = np.where(informed & (std > 0), std + eps, np.inf)
    return (values - mean[groups.of]) / scale[groups.of]


def _relative(weight: Floats, groups: Groups) -> Floats:
    """The factor w / mean(w) over the group's samples, [N]; 0 where all of them weigh 0."""
    mean = groups.total(weight) / groups.total(np.ones_like(weight))
    return _ratio(weight, mean[groups.of])


def _ratio(over: Floats, under: Floats) -> Floats:
    """Quotient over / under, 0 where under is 0."""
    return np.divide(over, under, out=np.zeros_like(over), where=under != 0)


def _with_health(
    values: Floats,
    raw: Floats,
    weighted: Floats,
    roles: npt.NDArray[np.str_],
    ids: npt.NDArray[np.generic],
    right: Bools,
) -> Advantages:
    """The advantages with the figures that are always logged."""
    present = [r for r in SampleRole if (roles == r).any()]
    order, groups = _grouped(raw, roles, ids)
    low, high = groups.spread(raw[order]) if len(raw) else (raw, raw)
    return Advantages(
        values=values,
        reward_raw={r: float(raw[roles == r].mean()) for r in present},
        reward_weighted={r: float(weighted[roles == r].mean()) for r in present},
        advantage={r: float(values[roles == r].mean()) for r in present},
        frac_zero_variance=_share(low == high),
        frac_right_pushed_down=_share(values[right] < 0),
        frac_wrong_pushed_up=_share(values[~right] > 0),
    )


def _share(true: Bools) -> float:
    """Share of True, 0 of nothing."""
    return float(true.mean()) if len(true) else 0.0
