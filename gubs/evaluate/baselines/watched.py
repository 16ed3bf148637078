"""Recommenders as judges of IF-VR's targets: popularity, neighbours, factors and SASRec know who watched what, no more.

They learn from the watched (clicked) records of all histories, and of training users' targets. The targets of a fifth
of the training users are left out: these are predicted from histories alone, as test users' are, and only so is the
threshold that is best for them fit for test users. A target of a test user is never learned from.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gubs.evaluate.baselines.collaborative import SCORERS, pair_scores
from gubs.evaluate.baselines.targets import Log, Scored, decided
from gubs.evaluate.feedback import UNTIMED, Bools, Feedback, Floats, Ints

IMPERSONAL = frozenset({"popularity"})
"""Scorers that need to know nothing of the user."""
_THRESHOLD_FOLD = 0
"""Fold of the training users whose targets are left for the threshold."""


def learned_rows(log: Log) -> Bools:
    """The records that are learned from, [N]."""
    targets = log.targets & log.train & (log.fold != _THRESHOLD_FOLD)
    return (log.history | targets) & ~log.bad


def asked_rows(log: Log) -> Ints:
    """The targets that are predicted: those of test users, and of the training users that are left for the threshold.
    They are in the order of the log.
    """
    return np.flatnonzero(log.targets & (log.test | (log.train & (log.fold == _THRESHOLD_FOLD))))


def sequences(log: Log) -> list[npt.NDArray[np.int64]]:
    """Per user, the videos that are learned from, in order."""
    learned = learned_rows(log)
    starts = np.searchsorted(log.user[learned], np.arange(len(log.users) + 1))
    videos = log.video[learned]
    return [videos[a:b] for a, b in pairwise(starts)]


def feedback_of(log: Log) -> Feedback:
    """The records that are learned from; a pair of user and video counts once."""
    rows = np.flatnonzero(learned_rows(log))
    _, first = np.unique(log.user[rows] * len(log.videos) + log.video[rows], return_index=True)
    rows = rows[np.sort(first)]
    nothing = np.zeros(len(rows), bool)
    return Feedback(
        users=tuple(log.users.tolist()),
        items=tuple(log.videos.tolist()),
        user=log.user[rows],
        item=log.video[rows],
        rating=np.full(len(rows), np.nan),
        time=np.full(len(rows), UNTIMED),
        liked=nothing,
        disliked=nothing,
        part=np.full(len(rows), ""),
        ordered=True,
    )


def scored_by_others(log: Log) -> dict[str, Scored]:
    """What every collaborative baseline makes of the test users' targets, by name; see `all_scored`."""
    feedback, rows = feedback_of(log), asked_rows(log)
    scored = {}
    for name, make in SCORERS.items():
        score = np.zeros(len(rows))
        if len(feedback):
            score = -pair_scores(make(feedback), log.user[rows], log.video[rows])
        scored[name] = judged(name, log, score, personal=name not in IMPERSONAL)
    return scored


def judged(name: str, log: Log, score: Floats, *, personal: bool = True) -> Scored:
    """A recommender as a judge of the test users' targets.

    Args:
        name: of the recommender.
        log: the records.
        score: of `asked_rows`, [n]; grows with what speaks against the video. Where nothing is known of the video (or,
            if it is `personal`, of the user), it is replaced by the middle of the others.
        personal: it knows users one by one.
    """
    rows, learned = asked_rows(log), learned_rows(log)
    cold = ~np.isin(log.video[rows], log.video[learned])
    cold |= personal & ~np.isin(log.user[rows], log.user[learned])
    warm = score[~cold]
    return decided(name, np.where(cold, np.median(warm) if len(warm) else 0.0, score), log.train[rows], log.bad[rows])


def facts(log: Log) -> Mapping[str, int]:
    """How much is learned from, and how many training targets are left for the threshold."""
    rows = asked_rows(log)
    return {"watched_records": int(learned_rows(log).sum()), "threshold_targets": int(log.train[rows].sum())}
