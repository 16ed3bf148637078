"""Collaborative baselines: what others with like choices chose. Each scores all items for a block of users.

A scorer is fitted on the training matrix R (users x items, 1 = chosen) and never sees the candidates. Scores are only
compared within a user's list or by a threshold; they have no unit.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import numpy as np
from scipy import sparse

from gubs.evaluate.feedback import Feedback, Floats, Ints

_BLOCK = 2048
"""Rows of a similarity matrix computed at once."""
_SHRINK = 5.0
"""Choices that are added to each item's, so that rare items are not near by chance."""
_WEIGHTS = ((0.1, 0.02), (0.1, 0.005), (0.02, 0.01), (0.005, 0.03))
"""(unobserved, penalty) of iALS that are tried."""
_RIVALS = 20
"""Items that a held-out record is compared with while iALS is tuned; half of them drawn by popularity."""
_USERS = 256
"""Users scored at once, so that memory does not grow with them."""
_CELLS = 4_000_000
"""Numbers held at once while factors are solved."""


class Scorer(Protocol):
    """A fitted baseline."""

    def scores(self, users: Ints) -> Floats:
        """Scores of all items for these users, [len(users), I]."""


class Popularity:
    """How many users chose each item."""

    def __init__(self, train: Feedback):
        self._counts = np.bincount(train.item, minlength=len(train.items)).astype(float)

    def scores(self, users: Ints) -> Floats:
        """See `Scorer`."""
        return np.tile(self._counts, (len(users), 1))


class ItemNeighbours:
    """Sum of the cosines between an item and those of the user's items that are among its `k` nearest."""

    def __init__(self, train: Feedback, k: int = 50):
        self._matrix = train.matrix()
        self._similarity = nearest(_unit(self._matrix.T), k)

    def scores(self, users: Ints) -> Floats:
        """See `Scorer`."""
        return (self._matrix[users] @ self._similarity.T).toarray()


class UserNeighbours:
    """Sum of the cosines between the user and those of the `k` nearest users who chose the item."""

    def __init__(self, train: Feedback, k: int = 80):
        self._matrix, self._k = train.matrix(), k
        self._unit = _unit(self._matrix)

    def scores(self, users: Ints) -> Floats:
        """See `Scorer`."""
        similarity = (self._unit[users] @ self._unit.T).toarray()
        similarity[np.arange(len(users)), users] = 0.0
        return (sparse.csr_array(_strongest(similarity, self._k)) @ self._matrix).toarray()


class SequentialNeighbours:
    """Sum over the user's items of how often others chose the item soon after (half: before) them.

    An item g places later counts `decay` ** (g - 1); a sum is divided by the roots of how often both were chosen; the
    user's item with r later ones weighs `decay` ** r.
    """

    def __init__(self, train: Feedback, window: int = 10, decay: float = 0.8, before: float = 0.5):
        n = len(train.items)
        after = sparse.csr_array((n, n))
        for gap in range(1, window + 1):
            rows = np.flatnonzero(train.user[gap:] == train.user[:-gap])
            pairs = (train.item[rows], train.item[rows + gap])
            after = after + sparse.csr_array((np.full(len(rows), decay ** (gap - 1)), pairs), shape=(n, n))
        root = sparse.diags_array(1 / np.sqrt(_SHRINK + np.bincount(train.item, minlength=n)))
        self._near = sparse.csr_array(root @ (after + before * after.T) @ root)
        later = train.starts[1:][train.user] - 1 - np.arange(len(train))
        self._recent = train.matrix(decay**later)

    def scores(self, users: Ints) -> Floats:
        """See `Scorer`."""
        return (self._recent[users] @ self._near).toarray()


class Factors:
    """iALS (Hu, Koren and Volinsky 2008), weighted as in Rendle et al. (2022): minimises the squared error of the
    chosen pairs towards 1, plus `unobserved` times that of all pairs towards 0, plus an L2 penalty that grows with the
    number of a row's records.
    """

    def __init__(
        self,
        train: Feedback,
        rank: int = 64,
        unobserved: float = 0.1,
        penalty: float = 0.01,
        sweeps: int = 10,
        seed: int = 0,
    ):
        rows = train.matrix()
        columns = sparse.csr_array(rows.T)
        self._items = np.random.default_rng(seed).normal(scale=0.1 / np.sqrt(rank), size=(rows.shape[1], rank))
        for _ in range(sweeps):
            self._users = _solve(rows, self._items, unobserved, penalty)
            self._items = _solve(columns, self._users, unobserved, penalty)
        self._users = _solve(rows, self._items, unobserved, penalty)

    def scores(self, users: Ints) -> Floats:
        """See `Scorer`."""
        return self._users[users] @ self._items.T


def tuned_factors(train: Feedback, seed: int = 0) -> Factors:
    """IALS with those weights of `_WEIGHTS` that best tell one held-out training record of each user from items the
    user never chose; candidates play no part in it.
    """
    rng = np.random.default_rng([seed, 37])
    users = np.flatnonzero(np.diff(train.starts) >= 2)
    rows = train.starts[users] + rng.integers(np.diff(train.starts)[users])
    dropped = np.zeros(len(train), dtype=bool)
    dropped[rows] = True
    rest = train.without(dropped)
    popular = train.item[rng.integers(len(train), size=(len(users), _RIVALS // 2))]
    others = np.concatenate([popular, rng.integers(len(train.items), size=popular.shape)], axis=1)
    unseen = train.matrix()[users[:, None], others].toarray() == 0

    def quality(weights: tuple[float, float]) -> float:
        scorer, right = Factors(rest, unobserved=weights[0], penalty=weights[1], sweeps=5, seed=seed), 0.0
        for start in range(0, len(users), _BLOCK):
            part = slice(start, start + _BLOCK)
            scores = scorer.scores(users[part])
            own = np.take_along_axis(scores, train.item[rows[part], None], axis=1)
            right += float(((own > np.take_along_axis(scores, others[part], axis=1)) & unseen[part]).sum())
        return right

    best = max(_WEIGHTS, key=quality) if len(users) else _WEIGHTS[0]
    return Factors(train, unobserved=best[0], penalty=best[1], seed=seed)


SCORERS: dict[str, Callable[[Feedback], Scorer]] = {
    "popularity": Popularity,
    "item kNN": ItemNeighbours,
    "user kNN": UserNeighbours,
    "iALS": tuned_factors,
    "sequential kNN": SequentialNeighbours,
}
"""Every collaborative baseline, by the name that tables show."""


def pair_scores(scorer: Scorer, user: Ints, item: Ints) -> Floats:
    """A scorer's scores of pairs of user and item, [n] each; by blocks of users."""
    users, codes = np.unique(user, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(0, len(users) + _USERS, _USERS))
    scores = np.empty(len(user))
    for block, (start, stop) in enumerate(pairwise(starts)):
        rows = order[start:stop]
        of_users = scorer.scores(users[block * _USERS : (block + 1) * _USERS])
        scores[rows] = of_users[codes[rows] - block * _USERS, item[rows]]
    return scores


def nearest(unit: sparse.csr_array, k: int) -> sparse.csr_array:
    """The `k` largest products of each row with other rows, [n, n]; rows of length 1 give cosines."""
    blocks = []
    for start in range(0, unit.shape[0], _BLOCK):
        block = (unit[start : start + _BLOCK] @ unit.T).toarray()
        block[np.arange(len(block)), start + np.arange(len(block))] = 0.0
        blocks.append(sparse.csr_array(_strongest(block, k)))
    return sparse.vstack(blocks, format="csr")


def _strongest(rows: Floats, k: int) -> Floats:
    """Sets all but the `k` largest values of each row to 0."""
    if k >= rows.shape[1]:
        return rows
    least = np.partition(rows, -k, axis=1)[:, -k, None]
    return np.where(rows >= least, rows, 0.0)


def _unit(matrix: sparse.csr_array) -> sparse.csr_array:
    """The rows, each divided by its length."""
    matrix = sparse.csr_array(matrix)
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return sparse.csr_array(sparse.diags_array(1 / np.maximum(lengths, 1e-12)) @ matrix)


def _solve(matrix: sparse.csr_array, other: Floats, unobserved: float, penalty: float) -> Floats:
    """The factors of the rows that fit best, given those of the columns: a ridge regression per row."""
    rank = other.shape[1]
    gram, padded = unobserved * other.T @ other, np.vstack([other, np.zeros(rank)])
    counts = np.diff(matrix.indptr)
    solved = np.zeros((matrix.shape[0], rank))
    order = np.argsort(counts, kind="stable")
    order, start = order[counts[order] > 0], 0
    while start < len(order):  # rows of about the same length together, so that little is padded
        size = max(1, _CELLS // (rank * max(rank, int(counts[order[min(start + 255, len(order) - 1)]]))))
        rows = order[start : start + min(size, 256)]
        start += len(rows)
        place = np.arange(counts[rows[-1]])
        inside = place < counts[rows, None]
        chosen = np.where(inside, matrix.indices[np.where(inside, matrix.indptr[rows, None] + place, 0)], len(other))
        factors = padded[chosen]
        weight = penalty * (counts[rows] + unobserved * matrix.shape[1])
        left = gram + factors.transpose(0, 2, 1) @ factors + weight[:, None, None] * np.eye(rank)
        solved[rows] = np.linalg.solve(left, factors.sum(axis=1)[:, :, None])[:, :, 0]
    return solved
