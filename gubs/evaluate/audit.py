"""Which cells of a published table cannot hold together.

A row prints some of accuracy, precision, recall, F1 and the like, about classes of known sizes. Pooled over items, all
of them are ratios of one 2 x 2 table. As means over users they come from one small table per user, and can be what any
mixture of the tables that a user can have gives. In both readings a rounded cell is a linear bound, on the shares of
the table or of the mixture, so a linear program decides whether anything prints these cells, and what the others leave
to each.

"Cannot hold together" is a proof, for the reading it is said of. "Can" is none: bounds are taken as if shares were
continuous and users without number. Identities such as F1 = 2PR / (P + R) hold pooled only. Of means over users, mean
F1 is at most that, and at least P + R - 1; mean accuracy, recall, specificity and balanced accuracy keep their identity
if all users have equally many items of each class.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy.optimize import linprog

from gubs.evaluate.feedback import Floats
from gubs.evaluate.verdicts import POWER

_SLACK = 1e-6
"""Cells are widened by this, so that the solver's tolerance (1e-7) proves nothing."""
_METHODS = ("highs", "highs-ipm")
"""Solvers, the second for what the first leaves undecided."""
_INFEASIBLE = 2
"""What scipy's linprog returns as `status`; 0 is success."""
_MOST_TABLES = 50_000
"""Most different tables of a user."""


class Quantity(StrEnum):
    """What a column prints."""

    ACCURACY = "accuracy"
    PRECISION = "precision"
    RECALL = "recall"
    F1 = "f1"
    SPECIFICITY = "specificity"
    NPV = "npv"
    """Share of negatives among what was said to be negative."""
    BALANCED = "balanced_accuracy"


class Averaging(StrEnum):
    """How a printed figure was averaged."""

    POOLED = "pooled"
    """Over all items at once."""
    USERS = "users"
    """Each user's figure, then their mean."""


@dataclass(frozen=True, slots=True)
class Range:
    """A closed interval, 0-1 for all quantities."""

    low: float
    high: float

    def __or__(self, other: "Range") -> "Range":
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True, slots=True)
class Classes:
    """How many items are positive.

    Raises:
        ValueError: a class can be empty, or bounds are exchanged.
    """

    share: Range
    """Share of positives among all items."""
    positives: tuple[int, int] | None = None
    """Fewest and most positive items of a user, if known."""
    negatives: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share.low <= self.share.high < 1:
            raise ValueError(f"the share of positives must be between 0 and 1, not {self.share}")

    @classmethod
    def per_user(cls, positives: tuple[int, int], negatives: tuple[int, int]) -> "Classes":
        """So many items of each class per user (fewest, most)."""
        if not (1 <= positives[0] <= positives[1] and 1 <= negatives[0] <= negatives[1]):
            raise ValueError(f"each user must have an item of each class, not {positives} and {negatives}")
        low = positives[0] / (positives[0] + negatives[1])
        high = positives[1] / (positives[1] + negatives[0])
        return cls(Range(low, high), positives, negatives)


Cells = Mapping[Quantity, Range]
"""What a row prints: the values that each cell's rounding allows."""


@dataclass(frozen=True)
class Reading:
    """All that figures of one averaging can be. A vector x >= 0 with sum 1, of size K, is a table (or a mixture of
    tables), and a quantity of it lies between low x / whole x and high x / whole x.
    """

    low: Mapping[Quantity, Floats]
    high: Mapping[Quantity, Floats]
    whole: Mapping[Quantity, Floats]
    limits: Floats
    """Rows of (limits x <= 0), [L, K]."""

    def holds(self, cells: Cells) -> bool:
        """Whether anything prints these cells."""
        return self.least(np.zeros(self.limits.shape[1]), np.ones(self.limits.shape[1]), cells) is not None

    def bounds(self, quantity: Quantity, cells: Cells) -> Range | None:
        """What the cells leave to a quantity; None if they do not hold, or leave it undefined (0/0)."""
        whole = self.whole[quantity]
        low = self.least(self.low[quantity], whole, cells)
        high = self.least(-self.high[quantity], whole, cells)
        return None if low is None or high is None else Range(max(0.0, low), min(1.0, -high))

    def least(self, objective: Floats, unit: Floats, cells: Cells) -> float | None:
        """Least value of the objective where unit x = 1 and the cells hold; None if that is proven to be impossible."""
        rows = [self.limits]
        for name, cell in cells.items():
            rows.append((cell.low - _SLACK) * self.whole[name] - self.high[name])
            rows.append(self.low[name] - (cell.high + _SLACK) * self.whole[name])
        limits = np.vstack(rows)
        for method in _METHODS:
            solution = linprog(
                objective, A_ub=limits, b_ub=np.zeros(len(limits)), A_eq=unit[None], b_eq=[1.0], method=method
            )
            if solution.status == _INFEASIBLE:
                return None
            if solution.status == 0:
                return float(solution.fun)
        return -math.inf


def reading(classes: Classes, averaging: Averaging) -> Reading:
    """What figures of these classes can be.

    Raises:
        ValueError: means over users need the numbers of items per user, and not too many of them.
    """
    if averaging is Averaging.POOLED:
        return _pooled(classes.share)
    if classes.positives is None or classes.negatives is None:
        raise ValueError("means over users need the number of positive and negative items of a user")
    return _over_users(classes.positives, classes.negatives)


def _pooled(share: Range) -> Reading:
    """Of x = (TP, FP, FN, TN), in shares of all items."""
    tp, fp, fn, tn = np.eye(4)
    whole = {
        Quantity.ACCURACY: np.ones(4),
        Quantity.PRECISION: tp + fp,
        Quantity.RECALL: tp + fn,
        Quantity.F1: 2 * tp + fp + fn,
        Quantity.SPECIFICITY: fp + tn,
        Quantity.NPV: fn + tn,
        Quantity.BALANCED: np.ones(4),
    }
    parts = {Quantity.ACCURACY: tp + tn, Quantity.PRECISION: tp, Quantity.RECALL: tp, Quantity.F1: 2 * tp}
    parts |= dict.fromkeys((Quantity.SPECIFICITY, Quantity.NPV), tn)
    least = (tp / share.high + tn / (1 - share.low)) / 2
    most = (tp / share.low + tn / (1 - share.high)) / 2
    limits = np.array([tp + fn - share.high * np.ones(4), share.low * np.ones(4) - tp - fn])
    return Reading({**parts, Quantity.BALANCED: least}, {**parts, Quantity.BALANCED: most}, whole, limits)


def _over_users(positives: tuple[int, int], negatives: tuple[int, int]) -> Reading:
    """Of x = the share of users with each table that a user can have. A user's 0/0 may count as anything from 0 to 1,
    which covers users who were left out of the mean.
    """
    sizes = [range(low, high + 1) for low, high in (positives, negatives)]
    if sum((p + 1) * (n + 1) for p, n in itertools.product(*sizes)) > _MOST_TABLES:
        raise ValueError(f"{positives} positive and {negatives} negative items of a user are too many tables to check")
    grids = [np.indices((p + 1, n + 1)).reshape(2, -1).T for p, n in itertools.product(*sizes)]
    of = np.concatenate([np.tile(pair, (len(g), 1)) for pair, g in zip(itertools.product(*sizes), grids, strict=True)])
    (tp, fp), (p, n) = np.concatenate(grids).T, of.T
    fn, tn = p - tp, n - fp
    ratios = {
        Quantity.ACCURACY: (tp + tn, p + n),
        Quantity.PRECISION: (tp, tp + fp),
        Quantity.RECALL: (tp, p),
        Quantity.F1: (2 * tp, 2 * tp + fp + fn),
        Quantity.SPECIFICITY: (tn, n),
        Quantity.NPV: (tn, fn + tn),
        Quantity.BALANCED: (tp * n + tn * p, 2 * p * n),
    }
    low = {name: np.where(whole > 0, part / np.maximum(whole, 1), 0.0) for name, (part, whole) in ratios.items()}
    high = {name: np.where(whole > 0, low[name], 1.0) for name, (_, whole) in ratios.items()}
    return Reading(low, high, dict.fromkeys(ratios, np.ones(len(p))), np.zeros((0, len(p))))


@dataclass(frozen=True)
class Conflict:
    """Cells that cannot hold together, while any fewer of them can."""

    allowed: Mapping[Quantity, Range | None]
    """Each of them -> what the others leave to it."""


def conflicts(cells: Cells, within: Reading) -> list[Conflict]:
    """The smallest sets of cells that cannot hold together."""
    if within.holds(cells):
        return []
    smallest: list[frozenset[Quantity]] = []
    for size in range(1, len(cells) + 1):
        for names in itertools.combinations(cells, size):
            smaller = any(subset <= set(names) for subset in smallest)
            if not smaller and not within.holds({n: cells[n] for n in names}):
                smallest.append(frozenset(names))
    return [_conflict({n: c for n, c in cells.items() if n in names}, within) for names in smallest]


def _conflict(cells: Cells, within: Reading) -> Conflict:
    others = {name: {n: c for n, c in cells.items() if n is not name} for name in cells}
    return Conflict({name: within.bounds(name, rest) for name, rest in others.items()})


def shares(cells: Cells) -> Range | None:
    """The shares of positives with which a row would hold, pooled; None if with none."""
    within, tp_fn = _pooled(Range(_SLACK, 1 - _SLACK)), np.array([1.0, 0.0, 1.0, 0.0])
    low, high = (within.least(sign * tp_fn, np.ones(4), cells) for sign in (1, -1))
    return None if low is None or high is None else Range(max(0.0, low), min(1.0, -high))


@dataclass(frozen=True)
class RowAudit:
    """What was found about a row."""

    name: str
    cells: Cells
    conflicts: Mapping[Averaging, Sequence[Conflict]]
    """For each reading that the table allows."""
    implied: Mapping[Quantity, Range]
    """Quantities that are not printed -> where they lie, in any reading that holds."""
    shares: Range | None
    """Where the row cannot be pooled: shares of positives with which it could."""

    @property
    def possible(self) -> list[Averaging]:
        """Readings in which the cells hold together."""
        return [averaging for averaging, clashes in self.conflicts.items() if not clashes]


def audit_row(name: str, cells: Cells, readings: Mapping[Averaging, Reading]) -> RowAudit:
    """Checks a row in every reading."""
    by_reading = {averaging: conflicts(cells, within) for averaging, within in readings.items()}
    implied: dict[Quantity, Range] = {}
    for averaging in (a for a, c in by_reading.items() if not c and cells):
        for quantity in (q for q in Quantity if q not in cells):
            if left := readings[averaging].bounds(quantity, cells):
                implied[quantity] = implied.get(quantity, left) | left
    needed = shares(cells) if by_reading.get(Averaging.POOLED) else None
    return RowAudit(name, cells, by_reading, implied, needed)


@dataclass(frozen=True)
class Exchange:
    """Two columns that hold better with each other's heading."""

    first: Quantity
    second: Quantity
    before: int
    """Impossible rows as printed."""
    after: int


def exchanges(rows: Sequence[Cells], readings: Mapping[Averaging, Reading]) -> list[Exchange]:
    """Pairs of columns that leave fewer rows impossible, in every reading, when they are exchanged."""
    before = _impossible(rows, readings)
    columns = list(dict.fromkeys(name for cells in rows for name in cells))
    tried = [
        Exchange(a, b, before, _impossible([_exchanged(cells, a, b) for cells in rows], readings))
        for a, b in (itertools.combinations(columns, 2) if before else ())
    ]
    return sorted((e for e in tried if e.after < before), key=lambda e: e.after)


def _impossible(rows: Sequence[Cells], readings: Mapping[Averaging, Reading]) -> int:
    return sum(not any(within.holds(cells) for within in readings.values()) for cells in rows)


def _exchanged(cells: Cells, a: Quantity, b: Quantity) -> Cells:
    names = {a: b, b: a}
    return {names.get(name, name): cell for name, cell in cells.items()}


@dataclass(frozen=True, slots=True)
class Bar:
    """What somebody else reaches."""

    value: float
    half: float = 0.0
    """Half its 95 % interval."""


Bars = Mapping[str, Mapping[Quantity, Bar]]


def constants(classes: Classes) -> Bars:
    """What is reached without looking, in either averaging; 0/0 is 0."""
    ends = (classes.share.low, classes.share.high)
    return {name: _spanned([of(share) for share in ends]) for name, of in (("always yes", _yes), ("always no", _no))}


def _yes(share: float) -> dict[Quantity, float]:
    figures = dict.fromkeys((Quantity.ACCURACY, Quantity.PRECISION), share) | {Quantity.RECALL: 1.0}
    figures |= {Quantity.F1: 2 * share / (1 + share), Quantity.BALANCED: 0.5}
    return figures | dict.fromkeys((Quantity.SPECIFICITY, Quantity.NPV), 0.0)


def _no(share: float) -> dict[Quantity, float]:
    figures = dict.fromkeys((Quantity.ACCURACY, Quantity.NPV), 1 - share) | {Quantity.SPECIFICITY: 1.0}
    figures |= dict.fromkeys((Quantity.PRECISION, Quantity.RECALL, Quantity.F1), 0.0)
    return figures | {Quantity.BALANCED: 0.5}


def _spanned(ends: Sequence[Mapping[Quantity, float]]) -> dict[Quantity, Bar]:
    first, last = ends
    return {q: Bar((first[q] + last[q]) / 2, abs(first[q] - last[q]) / 2) for q in first}


OVERALL = (Quantity.ACCURACY, Quantity.BALANCED, Quantity.F1)
"""Quantities in which more is better. Recall alone is not: to say yes to everything has all of it."""


class Place(StrEnum):
    """Where a printed figure stands against a bar."""

    BELOW = "below"
    ALIKE = "not to be told from"
    ABOVE = "above"


def place(cell: Range, bar: Bar, noise: float = 0.0) -> Place:
    """Where a cell stands against a bar.

    Args:
        cell: what is printed.
        bar: with its interval.
        noise: half the 95 % interval that the printed figure has as a sample; both are taken to be independent.
    """
    least = math.hypot(bar.half, noise)
    if cell.high < bar.value - least:
        return Place.BELOW
    return Place.ABOVE if cell.low > bar.value + least else Place.ALIKE


def noise(accuracy: float, answers: int) -> float:
    """Half the 95 % interval of the accuracy of so many independent answers."""
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / answers)


def detectable(accuracy: float, answers: int) -> float:
    """Difference in accuracy that two samples of so many independent answers show in 80 % of cases."""
    return POWER * math.sqrt(2 * accuracy * (1 - accuracy) / answers)
