"""Baselines of IF-VR: rates of users, videos, tags and lengths, and learners on them, for the targets of test users.

A user's statistics come from that user's history alone. A video's come from training users; for a training user's own
target they come from users of other folds, or a learner would read the label off them. `as shown` is what the UFM is
shown too: the user's history, the video's tags and length. `all` adds what other users did with the video. `by reward`
learns options from labels and names the one with the highest expected reward, as a calibrated policy does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from gubs.data.ifvr import IFVR
from gubs.evaluate.baselines.statistics import (
    FOLDS,
    LEARNERS,
    best_threshold,
    class_probabilities,
    cross_fitted,
    folds_of_users,
    probabilities,
    rate,
)
from gubs.evaluate.feedback import Bools, Floats, Ints
from gubs.records import FAST_SKIP_BELOW, Option, Role, Split, Task

_COLUMNS = ("interaction_id", "user_id", "video_id", "timestamp", "play_rate", "clicked", "split", "role")
_LENGTHS = (7.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""Borders between the lengths, seconds."""
_RECENT = 5


@dataclass(frozen=True)
class Scored:
    """What one baseline says about the test users' targets, [n] each."""

    method: str
    score: Floats
    """P(skip) or P(no click), or anything that grows with it."""
    dropped: Bools
    """Predicted skip or no click: the score reaches the threshold that is best for training users (balanced)."""
    threshold: float


@dataclass(frozen=True)
class Chosen:
    """What a learner of options says about the test users' targets, [n] each."""

    method: str
    score: Floats
    """P(skip) or P(no click)."""
    options: npt.NDArray[np.str_]
    """The option with the highest expected reward."""


class Log:
    """The records of one task as arrays, with what is to be predicted: `bad` = skipped, or not clicked."""

    def __init__(self, ifvr: IFVR, task: Task):
        self.task = task
        frame = ifvr.log(_COLUMNS, task).to_pandas()
        column = "clicked" if task is Task.CLICK else "play_rate"
        frame = frame.loc[frame[column].notna()]  # in the order of the users' hashes; here in that of their numbers:
        frame = frame.sort_values("user_id", kind="stable", ignore_index=True)
        self.frame = frame
        self.users, user = np.unique(frame["user_id"].to_numpy(dtype=str), return_inverse=True)
        self.videos, video = np.unique(frame["video_id"].to_numpy(dtype=str), return_inverse=True)
        self.user, self.video = user.astype(np.int64), video.astype(np.int64)
        self.bad: Bools = (
            ~frame["clicked"].to_numpy(dtype=bool)
            if task is Task.CLICK
            else frame["play_rate"].to_numpy(dtype=float) < FAST_SKIP_BELOW
        )
        self.history: Bools = (frame["role"] == str(Role.HISTORY)).to_numpy()
        self.train: Bools = (frame["split"] == str(Split.TRAIN)).to_numpy()
        self.test: Bools = (frame["split"] == str(Split.TEST)).to_numpy()
        videos = [ifvr.videos[v] for v in self.videos.tolist()]
        self.seconds = np.array([v.duration_s if v.duration_s else np.nan for v in videos])
        self.tags = _tags([v.tags for v in videos])

    @cached_property
    def targets(self) -> Bools:
        """What is to be predicted, of training and test users."""
        return ~self.history & (self.train | self.test)

    @cached_property
    def fold(self) -> Ints:
        """Fold of each record's user; test users have a fold of their own."""
        fold = folds_of_users(self.user, seed=0)
        return np.where(self.train, fold, FOLDS)


def all_scored(log: Log) -> tuple[dict[str, Scored], pa.Table]:
    """What every baseline says, by name, and the test targets they are about; none can be left out.

    Returns:
        Scores in the order of the table; the table has interaction_id, user_id, play_rate, clicked.
    """
    rows = np.flatnonzero(log.targets)
    train, bad = log.train[rows], log.bad[rows]
    named = scores_of(log, rows)
    scored = {name: decided(name, s, train, bad) for name, s in named.items()}
    test = log.frame.iloc[rows[~train]][["interaction_id", "user_id", "play_rate", "clicked"]]
    return scored, pa.Table.from_pandas(test, preserve_index=False)


def decided(name: str, score: Floats, train: Bools, bad: Bools) -> Scored:
    """Applies the threshold with the best balanced accuracy among training users' targets."""
    threshold = best_threshold(score[train], bad[train], balanced=True)
    return Scored(name, score[~train], score[~train] >= threshold, threshold)


def chosen_by_reward(log: Log, golds: Mapping[str, str]) -> list[Chosen]:
    """What learners on `as shown` name, fitted on all training users' labels.

    Args:
        log: the records.
        golds: known options, by interaction. Where none is the reason of a skip, and in the click task, the outcome is
            learned: A, or B for a skip (no click).
    """
    rows = np.flatnonzero(log.targets)
    train, gold = log.train[rows], _golds(log, rows, golds)
    user, shown, _ = features(log, rows)
    values, labelled = pd.concat([user, shown], axis=1).to_numpy(dtype=float), train & (gold != "")
    if len(np.unique(gold[labelled])) < 2 or train.all():
        return []
    chosen = []
    for learner, fit in LEARNERS.items():
        given = np.nan_to_num(values, nan=-1.0) if learner == "logistic" else values
        model = fit(given[labelled], gold[labelled])
        options = np.asarray(model.classes_, dtype=np.str_)
        probability = class_probabilities(model, given[~train])
        watched = probability[:, options == Option.A].sum(axis=1)
        expected = probability + np.where(options == Option.A, probability, 1 - watched[:, None])
        chosen.append(Chosen(f"{learner}, by reward", 1 - watched, options[expected.argmax(axis=1)]))
    return chosen


def _golds(log: Log, rows: Ints, golds: Mapping[str, str]) -> npt.NDArray[np.str_]:
    """The option of each target; "" where the reason of a skip is unknown but others are known."""
    labelled = np.array([golds.get(i, "") for i in log.frame["interaction_id"].iloc[rows]], dtype=np.str_)
    if log.task is Task.CLICK or not set(labelled.tolist()) - {"", str(Option.A)}:
        return np.where(log.bad[rows], str(Option.B), str(Option.A))
    return labelled


def scores_of(log: Log, rows: Ints) -> dict[str, Floats]:
    """Scores of targets by each baseline. Those of training users come from other users' labels.

    Args:
        log: the records.
        rows: targets of training and test users.
    """
    train, bad, fold = log.train[rows], log.bad[rows], log.fold[rows]
    user, shown, statistics = features(log, rows)
    groups = {
        "user's rate": user[["user_rate"]],
        "length": shown[["seconds", "length_rate"]],
        "video's rate": statistics[["video_rate"]],
        "tags and length": shown[[c for c in shown if not c.startswith("own_")]],
        "user and video": pd.concat([user, statistics], axis=1),
        "as shown": pd.concat([user, shown], axis=1),
        "all": pd.concat([user, shown, statistics], axis=1),
    }
    simple = ("user's rate", "length", "video's rate", "user and video")
    scores = {}
    for name, columns in groups.items():
        for learner in ("logistic",) if name in simple else tuple(LEARNERS):
            values = columns.to_numpy(dtype=float)
            label = name if name in simple else f"{learner}, {name}"
            scores[label] = _fitted(values, bad, train, fold, learner)
    return scores


def _fitted(values: Floats, bad: Bools, train: Bools, fold: Ints, learner: str) -> Floats:
    """Training users' scores by models of other folds, test users' by one of all training users."""
    values = np.nan_to_num(values, nan=-1.0) if learner == "logistic" else values
    score = np.full(len(bad), float(bad[train].mean()) if train.any() else 0.0)
    score[train] = cross_fitted(values[train], bad[train], fold[train], LEARNERS[learner])
    if len(np.unique(bad[train])) == 2 and (~train).any():
        score[~train] = probabilities(LEARNERS[learner](values[train], bad[train]), values[~train])
    return score


def features(log: Log, rows: Ints) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Statistics of targets: of the user, of what a prompt shows about the video, and of other users with the video."""
    of_users = _user_features(log).iloc[log.user[rows]].reset_index(drop=True)
    video = log.video[rows]
    shown = _content_features(log, rows)
    play = np.nan_to_num(log.frame["play_rate"].to_numpy(dtype=float))
    columns = {name: np.zeros(len(rows)) for name in ("video_rate", "video_views", "video_play")}
    for fold in np.unique(log.fold[rows]):
        inside, others = log.fold[rows] == fold, log.train & (log.fold != fold)
        n = len(log.videos)
        views = np.bincount(log.video[others], minlength=n)
        bad = np.bincount(log.video[others & log.bad], minlength=n)
        played = np.bincount(log.video[others], play[others], minlength=n)
        columns["video_rate"][inside] = rate(bad, views, _mean(log.bad[others]), 10.0)[video[inside]]
        columns["video_views"][inside] = np.log1p(views)[video[inside]]
        columns["video_play"][inside] = rate(played, views, _mean(play[others]), 10.0)[video[inside]]
    return of_users, shown, pd.DataFrame(columns)


def _user_features(log: Log) -> pd.DataFrame:
    """Per user, from the history: rate of bad records, of the latest ones, number, mean play rate."""
    n, h = len(log.users), log.history
    user, bad = log.user[h], log.bad[h]
    prior = _mean(log.bad[log.history & log.train])
    total = np.bincount(user, minlength=n)
    later = total[user] - 1 - pd.Series(user).groupby(user).cumcount().to_numpy()  # the log is by user and time
    recent = later < _RECENT
    play = log.frame["play_rate"].to_numpy(dtype=float)[h]
    return pd.DataFrame(
        {
            "user_rate": rate(np.bincount(user[bad], minlength=n), total, prior),
            "user_recent": rate(
                np.bincount(user[bad & recent], minlength=n), np.bincount(user[recent], minlength=n), prior, 2.0
            ),
            "user_views": np.log1p(total),
            "user_play": np.bincount(user, np.nan_to_num(play), minlength=n) / np.maximum(1, total),
        }
    )


def _content_features(log: Log, rows: Ints) -> pd.DataFrame:
    """What tags and length say: rates of training users of other folds, and the user's own (`own_`), of the history."""
    video, seconds = log.video[rows], log.seconds[log.video[rows]]
    length = _length(log.seconds)
    columns: dict[str, Floats] = {"seconds": np.log1p(np.nan_to_num(seconds, nan=-0.5))}
    columns |= {name: np.zeros(len(rows)) for name in ("length_rate", "tag_rate", "tag_least", "tag_most")}
    for fold in np.unique(log.fold[rows]):
        inside, others = log.fold[rows] == fold, log.train & (log.fold != fold)
        prior = _mean(log.bad[others])
        columns["length_rate"][inside] = _rates_of(length[log.video], log.bad, others, prior)[length[video[inside]]]
        tag_rate = _tag_rates(log, others, prior)
        of_video = _over_tags(log.tags, tag_rate, prior)
        for name, values in zip(("tag_rate", "tag_least", "tag_most"), of_video, strict=True):
            columns[name][inside] = values[video[inside]]
    columns["tags"] = np.array([len(t) for t in log.tags], dtype=float)[video]
    return pd.DataFrame(columns | _own_features(log, rows, length))


def _own_features(log: Log, rows: Ints, length: Ints) -> dict[str, Floats]:
    """What the user's own history says about the video's tags and length."""
    prior = _user_features(log)["user_rate"].to_numpy()
    wanted = set(log.user[rows].tolist())
    seen: dict[tuple[int, int], list[int]] = {}
    of_length: dict[tuple[int, int], list[int]] = {}
    history = np.flatnonzero(log.history)
    for user, video, bad in zip(
        log.user[history].tolist(), log.video[history].tolist(), log.bad[history].tolist(), strict=True
    ):
        if user in wanted:
            for tag in log.tags[video]:
                _count(seen, (user, tag), bad)
            _count(of_length, (user, int(length[video])), bad)
    own = np.zeros((len(rows), 4))
    for i, (user, video) in enumerate(zip(log.user[rows].tolist(), log.video[rows].tolist(), strict=True)):
        n = bad = 0
        for tag in log.tags[video]:
            views, skipped = seen.get((user, tag), (0, 0))
            n, bad = n + views, bad + skipped
        views, skipped = of_length.get((user, int(length[video])), (0, 0))
        own[i] = n, (bad + 2 * prior[user]) / (n + 2), views, (skipped + 2 * prior[user]) / (views + 2)
    names = ("own_tag_views", "own_tag_rate", "own_length_views", "own_length_rate")
    return {name: own[:, k] for k, name in enumerate(names)}


def _mean(values: Bools | Floats) -> float:
    return float(values.mean()) if len(values) else 0.5


def _count(counts: dict[tuple[int, int], list[int]], key: tuple[int, int], bad: bool) -> None:
    pair = counts.setdefault(key, [0, 0])
    pair[0] += 1
    pair[1] += bad


def _rates_of(group: Ints, bad: Bools, among: Bools, prior: float) -> Floats:
    """Rate of bad records per group."""
    n = int(group.max(initial=0)) + 1
    return rate(np.bincount(group[among & bad], minlength=n), np.bincount(group[among], minlength=n), prior, 20.0)


def _tag_rates(log: Log, among: Bools, prior: float) -> Floats:
    """Rate of bad records per tag."""
    n = max((t for tags in log.tags for t in tags), default=-1) + 1
    views = np.bincount(log.video[among], minlength=len(log.videos))
    bad = np.bincount(log.video[among & log.bad], minlength=len(log.videos))
    totals = np.zeros((2, n))
    for video, tags in enumerate(log.tags):
        for tag in tags:
            totals[:, tag] += bad[video], views[video]
    return rate(totals[0], totals[1], prior, 20.0)


def _over_tags(tags: Sequence[Sequence[int]], rates: Floats, prior: float) -> tuple[Floats, Floats, Floats]:
    """Mean, least and greatest rate of each video's tags."""
    values = [rates[list(t)] if t else np.array([prior]) for t in tags]
    return tuple(np.array([f(v) for v in values]) for f in (np.mean, np.min, np.max))  # type: ignore[return-value]


def _length(seconds: Floats) -> Ints:
    """Number of the length's range; the last one is for unknown lengths."""
    ranges = np.searchsorted(_LENGTHS, np.nan_to_num(seconds), side="right")
    return np.where(np.isnan(seconds), len(_LENGTHS) + 1, ranges).astype(np.int64)


def _tags(texts: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """Each video's tags as numbers."""
    numbers: dict[str, int] = {}
    return [tuple(numbers.setdefault(t, len(numbers)) for t in tags) for tags in texts]
