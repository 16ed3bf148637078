"""All baselines of the "10 + 10" protocols on one set of candidates: scores, and yes or no by two rules.

`top half` says yes to the best half of each user's list, which presumes that half of it is right; `threshold` uses one
threshold for everybody, found on other users. Equal scores are ordered by the list's own (random) order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from gubs.evaluate.baselines.collaborative import SCORERS, nearest, pair_scores
from gubs.evaluate.baselines.statistics import LEARNERS, cross_fitted, cross_thresholds, folds_of_users, rate
from gubs.evaluate.feedback import Bools, Feedback, Floats, Ints
from gubs.evaluate.protocols import Candidates, training
from gubs.records import Video

TOP_HALF, THRESHOLD = "top half", "threshold"
CONSTANTS = ("always yes", "always no", "coin")
USERS_RATE = "user's rate"
"""How many of the user's other items were liked; without stars, how many there are. The same for the whole list."""
_USERS = 256
"""Users scored at once, so that memory does not grow with them."""


@dataclass(frozen=True)
class Answers:
    """What one baseline says about the candidates, [n] each."""

    method: str
    rule: str
    """`top half`, `threshold`, or empty for constants."""
    score: Floats | None
    yes: Bools

    @property
    def name(self) -> str:
        """As in `popularity, top half`."""
        return f"{self.method}, {self.rule}" if self.rule else self.method


def all_answers(
    feedback: Feedback, candidates: Candidates, videos: Mapping[str, Video], seed: int
) -> dict[str, Answers]:
    """What every baseline says, by name; none can be left out.

    Args:
        feedback: all records.
        candidates: what is asked; the baselines learn from `training(feedback, candidates)` alone.
        videos: titles and tags of the items, for what the content says.
        seed: of folds, coin and factors.
    """
    train = training(feedback, candidates)
    fold = folds_of_users(candidates.user, seed)
    scores = collaborative_scores(train, candidates)
    statistics = rates(train, candidates)
    content = content_features(train, candidates, videos)
    user_rates = {n: statistics[n] for n in ("user's mean rating", "user's items", "user's liked share")}
    everything = _columns({**scores, **statistics, **content}, candidates)
    of_content = _columns({**content, **user_rates}, candidates)
    named = {**scores, **{n: v for n, v in statistics.items() if n.startswith("item's")}}
    named[USERS_RATE] = statistics["user's liked share" if np.isfinite(train.rating).any() else "user's items"]
    for name, fit in LEARNERS.items():
        named[f"{name}, content"] = cross_fitted(of_content, candidates.positive, fold, fit)
        named[f"{name}, all"] = cross_fitted(everything, candidates.positive, fold, fit)
    answers = [*_constants(candidates, seed)]
    for name, score in named.items():
        answers.append(Answers(name, TOP_HALF, score, top_half(score, candidates)))
        answers.append(Answers(name, THRESHOLD, score, cross_thresholds(score, candidates.positive, fold)))
    return {a.name: a for a in answers}


def collaborative_scores(train: Feedback, candidates: Candidates) -> dict[str, Floats]:
    """Scores of the candidates by each collaborative baseline, [n] each."""
    scores = {name: pair_scores(make(train), candidates.user, candidates.item) for name, make in SCORERS.items()}
    if np.isfinite(train.rating).any():
        scores["rated kNN"] = pair_scores(RatedNeighbours(train), candidates.user, candidates.item)
    return scores


def rates(train: Feedback, candidates: Candidates) -> dict[str, Floats]:
    """What the training records say about each item and each user alone, [n] each."""
    users, items, rated = len(train.users), len(train.items), np.isfinite(train.rating)
    mean = float(train.rating[rated].mean()) if rated.any() else 0.0
    of: dict[str, Floats] = {}
    for who, codes, n, asked in (
        ("user", train.user, users, candidates.user),
        ("item", train.item, items, candidates.item),
    ):
        stars = np.bincount(codes[rated], train.rating[rated], minlength=n)
        total, stars_n = np.bincount(codes, minlength=n), np.bincount(codes[rated], minlength=n)
        for word, mask in (("liked", train.liked), ("disliked", train.disliked)):
            share = rate(np.bincount(codes[mask], minlength=n), total, float(mask.mean()))
            of[f"{who}'s {word} share"] = share[asked]
        of[f"{who}'s mean rating"] = rate(stars, stars_n, mean)[asked]
        if who == "user":
            of["user's items"] = np.log1p(total)[asked]
    return of if rated.any() else {n: v for n, v in of.items() if n == "user's items"} | _unrated(candidates)


def _unrated(candidates: Candidates) -> dict[str, Floats]:
    nothing = np.zeros(len(candidates))
    return {"user's mean rating": nothing, "user's liked share": nothing}


def content_features(train: Feedback, candidates: Candidates, videos: Mapping[str, Video]) -> dict[str, Floats]:
    """What a reader of titles and tags could say, [n] each: how much the user chooses and likes the item's tags, its
    year, how close the year is to those of the user's items, and the tags themselves.
    """
    tags, year = _tag_matrix(train.items, videos), _years(train.items, videos)
    chosen, total = train.matrix(), np.maximum(1, np.diff(train.starts))
    share = (chosen @ tags).toarray() / total[:, None]
    expected = np.asarray(tags.mean(axis=0)).ravel() + 1e-9
    has_rating = np.isfinite(train.rating)
    rated = np.where(has_rating, train.rating - (train.rating[has_rating].mean() if has_rating.any() else 0.0), 0.0)
    taste = (train.matrix(rated) @ tags).toarray() / (5.0 + (chosen @ tags).toarray())
    features: dict[str, list[Floats]] = {"tags chosen": [], "tags liked": [], "share of tags": []}
    for rows in _user_blocks(candidates):
        user, of_item = candidates.user[rows], tags[candidates.item[rows]].toarray()
        n = np.maximum(1e-9, of_item.sum(axis=1))
        features["tags chosen"].append((of_item * np.log((share[user] + 0.01) / (expected + 0.01))).sum(axis=1) / n)
        features["tags liked"].append((of_item * taste[user]).sum(axis=1) / n)
        features["share of tags"].append((of_item * share[user]).sum(axis=1))
    year = np.where(np.isfinite(year), year, np.nanmean(year) if np.isfinite(year).any() else 0.0)
    users_year = np.bincount(train.user, year[train.item], minlength=len(train.users)) / total
    columns = {name: np.concatenate(parts) for name, parts in features.items()}
    columns["year"] = year[candidates.item]
    columns["years apart"] = np.abs(columns["year"] - users_year[candidates.user])
    return columns


class RatedNeighbours:
    """The user's stars above the mean for the item's nearest items, weighted by their cosines."""

    def __init__(self, train: Feedback, k: int = 50):
        n, rated = len(train.items), np.isfinite(train.rating)
        train = train.without(~rated)
        own = np.bincount(train.user, train.rating, minlength=len(train.users)) / np.maximum(1, np.diff(train.starts))
        above = train.rating - own[train.user]
        self._item = np.bincount(train.item, above, minlength=n) / (5 + np.bincount(train.item, minlength=n))
        self._above = train.matrix(above - self._item[train.item])
        self._chosen = train.matrix()
        columns = sparse.csr_array(self._above.T)
        lengths = np.sqrt(np.asarray(columns.multiply(columns).sum(axis=1)).ravel()) + 1e-9
        self._similarity = nearest(sparse.csr_array(sparse.diags_array(1 / lengths) @ columns), k)

    def scores(self, users: Ints) -> Floats:
        """See `Scorer`."""
        near = (self._above[users] @ self._similarity.T).toarray()
        weight = (self._chosen[users] @ abs(self._similarity).T).toarray()
        return self._item + near / (1.0 + weight)


def top_half(score: Floats, candidates: Candidates) -> Bools:
    """Yes to the best half of each user's list."""
    p = candidates.protocol
    lists = score.reshape(-1, p.positives + p.negatives)
    order = np.argsort(-lists, axis=1, kind="stable")
    yes = np.zeros(lists.shape, dtype=bool)
    np.put_along_axis(yes, order[:, : p.positives], True, axis=1)
    return yes.ravel()


def _constants(candidates: Candidates, seed: int) -> Sequence[Answers]:
    n, base = len(candidates), float(candidates.positive.mean())
    coin = np.random.default_rng([seed, 23]).random(n) < base
    answers = (np.ones(n, bool), np.zeros(n, bool), coin)
    return [Answers(name, "", None, yes) for name, yes in zip(CONSTANTS, answers, strict=True)]


def _user_blocks(candidates: Candidates) -> list[slice]:
    """Rows of a few hundred users at a time."""
    size = _USERS * (candidates.protocol.positives + candidates.protocol.negatives)
    return [slice(start, start + size) for start in range(0, len(candidates), size)]


def _columns(named: Mapping[str, Floats], candidates: Candidates) -> Floats:
    """Features [n, 2 F]: each as it is and standardised within the user's list."""
    n = candidates.protocol.positives + candidates.protocol.negatives
    columns = []
    for values in named.values():
        lists = values.reshape(-1, n)
        columns += [values, ((lists - lists.mean(1, keepdims=True)) / (lists.std(1, keepdims=True) + 1e-9)).ravel()]
    return np.stack(columns, axis=1)


def _tag_matrix(items: Sequence[str], videos: Mapping[str, Video]) -> sparse.csr_array:
    """Items x tags, 1 where an item has a tag; at least one column."""
    numbers: dict[str, int] = {}
    rows, columns = [], []
    for row, item in enumerate(items):
        for tag in videos[item].tags if item in videos else ():
            rows.append(row)
            columns.append(numbers.setdefault(tag, len(numbers)))
    shape = (len(items), max(1, len(numbers)))
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def _years(items: Sequence[str], videos: Mapping[str, Video]) -> Floats:
    """The year in brackets at the end of a title, as films have it; NaN without one."""
    matches = (re.search(r"\((\d{4})\)\s*$", (videos[i].title or "") if i in videos else "") for i in items)
    return np.array([float(m[1]) if m else np.nan for m in matches])
