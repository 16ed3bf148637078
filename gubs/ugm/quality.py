"""How good groups are, as numbers that need no language model and no hidden truth.

`silhouette`: how much nearer users are to those of their own group than to the next one (-1 to 1). `stability`: how far
other seeds, without a model, find the same groups (adjusted Rand index; 1 = the same). `skips`: whether what a group
skips says more about members whose records the groups never saw than what everybody skips.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from sklearn.metrics import adjusted_rand_score, roc_auc_score, silhouette_score

from gubs.artifacts import JsonObject
from gubs.records import FAST_SKIP_BELOW, User, Video
from gubs.ugm.cluster import Encoder, Vectors, apart, similarities
from gubs.ugm.evidence import LENGTHS, Records, length_of

HELD_OUT_COLUMNS = ("user_id", "video_id", "play_rate")
_SEEDS = 5
_PRIOR = 4.0
"""Records by which a group's rate of skips is drawn to everybody's."""
_MOST = 3000
"""Users whom silhouette and stability look at."""


def geometry(users: Sequence[User], encoder: Encoder, centres: Vectors, seed: int) -> JsonObject:
    """`silhouette` and `stability` of the nearest groups of some users; None where there are too few groups.

    Args:
        users: those whom groups were made from.
        encoder: fitted on them.
        centres: (groups, d), of the groups that are left.
        seed: of the other groupings.
    """
    users = users[:_MOST]
    vectors, k = encoder.encode(users), centres.shape[0]
    labels = similarities(vectors, centres).argmax(axis=1) if k else np.zeros(len(users), int)
    if not 1 < len(set(labels)) < len(users):
        return {"silhouette": None, "stability": None}
    others = [apart(users, k, encoder, seed + 1 + i)[0] for i in range(_SEEDS)]
    same = [adjusted_rand_score(labels, similarities(vectors, vectors[o]).argmax(axis=1)) for o in others]
    return {
        "silhouette": float(silhouette_score(vectors, labels, metric="cosine")),
        "stability": float(np.mean(same)),
        "stability_seeds": _SEEDS,
    }


@dataclass(frozen=True)
class _Skips:
    """Rates of fast skips by topic and by length."""

    topics: Mapping[str, float]
    lengths: Mapping[str, float]
    overall: float

    def score(self, video: Video) -> float:
        """How likely a view of the video is a fast skip, up to a constant."""
        rates = [self.topics[t.casefold()] for t in video.tags if t.casefold() in self.topics]
        length = self.lengths.get(length_of(video) or "", self.overall)
        return (sum(rates) / len(rates) if rates else self.overall) + length


def skips(
    records: Records,
    groups: Mapping[str, Sequence[str]],
    held_out: Mapping[str, str],
    log: pa.Table,
    videos: Mapping[str, Video],
) -> JsonObject:
    """How well the group's skips predict those of held-out members, and everybody's do: AUC over their views.

    Args:
        records: of the users whom groups were made from.
        groups: their members, by group.
        held_out: the group of each held-out user.
        log: the views of these (`HELD_OUT_COLUMNS`).
        videos: all videos by id.
    """
    everybody = _rates(records, None)
    by_group = {g: _rates(records, members, everybody) for g, members in groups.items()}
    rows = [r for r in log.select(list(HELD_OUT_COLUMNS)).to_pylist() if r["play_rate"] is not None]
    skipped = np.array([r["play_rate"] < FAST_SKIP_BELOW for r in rows], bool)
    result: JsonObject = {"users": len({r["user_id"] for r in rows}), "views": len(rows)}
    if everybody is None or not 0 < skipped.sum() < len(rows):
        return result | {"group": None, "everybody": None}
    shown = [(by_group[held_out[r["user_id"]]] or everybody, videos[r["video_id"]]) for r in rows]
    return result | {
        "group": float(roc_auc_score(skipped, [rates.score(v) for rates, v in shown])),
        "everybody": float(roc_auc_score(skipped, [everybody.score(v) for _, v in shown])),
    }


def _rates(records: Records, user_ids: Iterable[str] | None, prior: _Skips | None = None) -> _Skips | None:
    topics, lengths = records.counts.get("skipped"), records.counts.get("skipped by length")
    if not topics:
        return None
    place = {u: i for i, u in enumerate(records.user_ids)}
    members = None if user_ids is None else np.array([place[u] for u in user_ids], np.int64)
    weight = _PRIOR if prior else 0.0
    overall = prior.overall if prior else float(topics.total.sum() / max(topics.n.sum(), 1))
    before = np.array([prior.topics[t] for t in topics.items] if prior else [overall] * len(topics.items))
    by_topic = dict(zip(topics.items, map(float, topics.rates(members, weight, before)), strict=True))
    if not lengths:
        return _Skips(by_topic, {}, overall)
    before = np.array([prior.lengths[name] for name in LENGTHS] if prior else [overall] * len(LENGTHS))
    by_length = dict(zip(LENGTHS, map(float, lengths.rates(members, weight, before)), strict=True))
    return _Skips(by_topic, by_length, overall)
