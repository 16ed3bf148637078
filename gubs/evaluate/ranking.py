"""The stage `ranking`: which place each user's last item takes among all items (leave-one-out).

This is how sequential recommenders are published, and how ours is checked. One number depends on choices that papers
seldom state: whether the items a user already has are masked, and whether the place is among all items or among 100
drawn ones. So all three are measured side by side. Equal scores share the middle place. The last item is the last by
time; equal times keep the order of the log, which decides for every user whose last time is shared (printed).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.artifacts import StageJob
from gubs.errors import InputError
from gubs.evaluate.baselines import sasrec
from gubs.evaluate.baselines.collaborative import ItemNeighbours, Popularity, Scorer, SequentialNeighbours
from gubs.evaluate.feedback import Bools, Feedback, Floats, Ints
from gubs.evaluate.metrics import Sums
from gubs.evaluate.public import read_feedback
from gubs.evaluate.settings import EvalSettings
from gubs.evaluate.verdicts import Verdict, exchanges_for, paired, with_holm

RANKING, SASREC = "ranking", "SASRec"
WAYS = ("all items, own ones masked", "all items, none masked", "100 unseen items")
CUT = 10
NEGATIVES = 100
_USERS = 256
_RIVALS: Mapping[str, Callable[[Feedback], Scorer]] = {
    "popularity": Popularity,
    "item kNN": ItemNeighbours,
    "sequential kNN": SequentialNeighbours,
}
ScoreBlocks = Iterator[tuple[Ints, Floats]]
"""Users of a block, and their scores of all items."""


def make(job: StageJob, evaluate: EvalSettings, seed: int) -> str:
    """Trains SASRec and ranks every user's last item (tables `ranks`, `metrics`, `verdicts`).

    Raises:
        InputError: no user has three records.
    """
    feedback = read_feedback(job.input("raw"))
    last = last_rows(feedback)
    train = feedback.without(_mask(last, len(feedback)))
    drawn = unseen_items(feedback, feedback.user[last], seed)
    ranks = {
        name: ranks_of(score_blocks(make_scorer(train), feedback.user[last]), feedback, last, drawn)
        for name, make_scorer in _RIVALS.items()
    }
    sequences = [train.item[train.rows_of(u)] for u in range(len(train.users))]
    model = sasrec.fit(sequences, len(train.items), evaluate.sasrec, seed)
    blocks = model_blocks(model, [sequences[u] for u in feedback.user[last]], feedback.user[last], evaluate)
    ranks[SASREC] = ranks_of(blocks, feedback, last, drawn)
    metrics = [row for name, r in ranks.items() for row in figures(r, name, evaluate.bootstrap, seed)]
    verdicts = compare(ranks, evaluate.bootstrap, seed)
    with job.writing() as out:
        out.write_table("ranks", _rank_table(ranks, feedback, last))
        out.write_table("metrics", pa.Table.from_pylist(metrics))
        out.write_table("verdicts", pa.Table.from_pylist([v.to_row() for v in verdicts]))
        out.info = {
            "users": len(last),
            "items": len(feedback.items),
            "users_with_tied_last_times": feedback.tied_users,
            "records_without_a_place": feedback.without_place,
            "ties": "equal times keep the order of the log; equal scores share the middle place",
            "negatives": f"{NEGATIVES} items the user never chose, each as likely as any other",
        }
        out.summary = summary(metrics)
    return out.summary


def last_rows(feedback: Feedback) -> Ints:
    """The last record of every user who has at least three.

    Raises:
        InputError: nobody has.
    """
    counts = np.diff(feedback.starts)
    rows = feedback.starts[1:][counts >= 3] - 1
    if not len(rows):
        raise InputError("no user has three records: there is nothing to learn a next item from")
    return rows


def unseen_items(feedback: Feedback, users: Ints, seed: int) -> Ints:
    """`NEGATIVES` items that each user never chose, [len(users), NEGATIVES]; repeated if there are not as many."""
    drawn = np.empty((len(users), NEGATIVES), dtype=np.int64)
    for row, user in enumerate(users.tolist()):
        unseen = np.setdiff1d(np.arange(len(feedback.items)), feedback.item[feedback.rows_of(user)])
        if not len(unseen):
            raise InputError(f"user {feedback.users[user]} chose every item: nothing is left to rank against")
        drawn[row] = np.random.default_rng([seed, 5, user]).choice(unseen, NEGATIVES, replace=len(unseen) < NEGATIVES)
    return drawn


def score_blocks(scorer: Scorer, users: Ints) -> ScoreBlocks:
    """A scorer's scores of all items, a block of users at a time."""
    for start in range(0, len(users), _USERS):
        block = users[start : start + _USERS]
        yield block, scorer.scores(block)


def model_blocks(model: Any, sequences: Sequence[Ints], users: Ints, evaluate: EvalSettings) -> ScoreBlocks:
    """SASRec's scores of all items, a block of users at a time."""
    start = 0
    for scores in sasrec.next_scores(model, sequences, evaluate.sasrec):
        yield users[start : start + len(scores)], scores.astype(np.float64)
        start += len(scores)


def ranks_of(blocks: ScoreBlocks, feedback: Feedback, last: Ints, drawn: Ints) -> Floats:
    """The place of each user's last item, from 0, in each way of `WAYS`: [len(last), 3]."""
    places, start = np.empty((len(last), len(WAYS))), 0
    for users, scores in blocks:
        rows = slice(start, start + len(users))
        start += len(users)
        gold = np.take_along_axis(scores, feedback.item[last[rows], None], axis=1)
        own = np.zeros(scores.shape, dtype=bool)
        for i, user in enumerate(users.tolist()):
            own[i, feedback.item[feedback.rows_of(user)]] = True
        places[rows, 1] = _place(scores, gold) - 0.5  # the item itself is equal
        masked = np.where(own, -np.inf, scores)
        places[rows, 0] = _place(masked, gold)
        places[rows, 2] = _place(np.take_along_axis(scores, drawn[rows], axis=1), gold)
    return places


def _place(scores: Floats, gold: Floats) -> Floats:
    """How many are better, and half of those that are equal."""
    return (scores > gold).sum(axis=1) + 0.5 * (scores == gold).sum(axis=1)


def user_gains(places: Floats) -> dict[str, Floats]:
    """Per user: 1 item, whether it is among the first ten, and the discounted gain."""
    hit = (places < CUT).astype(np.float64)
    return {"items": np.ones(len(places)), "hit": hit, "gain": hit / np.log2(places + 2)}


def _hit_rate(s: Sums) -> Floats:
    return s["hit"] / s["items"]


def _gain(s: Sums) -> Floats:
    return s["gain"] / s["items"]


STATISTICS: dict[str, Callable[[Sums], Floats]] = {f"HR@{CUT}": _hit_rate, f"NDCG@{CUT}": _gain}


def figures(places: Floats, method: str, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Hit rate and gain in each way, with the interval over users."""
    rows = []
    for way, column in zip(WAYS, places.T, strict=True):
        sums = user_gains(column)
        nothing = {**sums, "hit": np.zeros(len(column)), "gain": np.zeros(len(column))}
        for name, statistic in STATISTICS.items():
            v = paired(sums, nothing, statistic, resamples=resamples, seed=seed)
            rows.append(
                {"method": method, "way": way, "name": name, "value": v.difference, "low": v.low, "high": v.high}
                | {"n": len(column)}
            )
    return rows


def compare(ranks: Mapping[str, Floats], resamples: int, seed: int) -> list[Verdict]:
    """SASRec against every other method, in every way, by NDCG; corrected together."""
    compared, exchanges = [], exchanges_for(len(WAYS) * (len(ranks) - 1))
    for number, way in enumerate(WAYS):
        own = user_gains(ranks[SASREC][:, number])
        for name in ranks:
            if name != SASREC:
                other = user_gains(ranks[name][:, number])
                v = paired(own, other, _gain, resamples=resamples, exchanges=exchanges, seed=seed)
                compared.append(replace(v, metric=f"NDCG@{CUT}, {way}", first=SASREC, second=name))
    return with_holm(compared)


def summary(metrics: Sequence[Mapping[str, Any]]) -> str:
    """SASRec's figures in one line."""
    own = {(m["way"], m["name"]): m["value"] for m in metrics if m["method"] == SASREC}
    first, second = STATISTICS
    return "; ".join(f"{way}: {first} {own[way, first]:.3f}, {second} {own[way, second]:.3f}" for way in WAYS)


def _rank_table(ranks: Mapping[str, Floats], feedback: Feedback, last: Ints) -> pa.Table:
    users, items = np.array(feedback.users)[feedback.user[last]], np.array(feedback.items)[feedback.item[last]]
    tables = [
        pa.table(
            {"method": pa.array([name] * len(last)), "user_id": users, "item_id": items}
            | {f"place, {way}": places[:, k] for k, way in enumerate(WAYS)}
        )
        for name, places in ranks.items()
    ]
    return pa.concat_tables(tables)


def _mask(rows: Ints, n: int) -> Bools:
    mask = np.zeros(n, dtype=bool)
    mask[rows] = True
    return mask
