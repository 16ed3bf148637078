"""Cluster (Eq. 2): each user's similarity to each group's typical user; the most similar users form the group.

Plain functions over texts and arrays: no Ray, no LLM. Users are compared in blocks and only the best of each group are
kept, so memory grows with the users' texts, never with users x users: a million users fit. A user may be in several
groups, or in none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from gubs.records import User
from gubs.ugm.settings import Mode

Users = Sequence[User]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Vectors: TypeAlias = "sparse.csr_matrix | Floats"
"""(n, d), rows of length 1, or 0 where a profile is empty."""

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

    Each word names its field, so that a city called "Cooking" is no interest; ages become decades.
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
    vectors = TfidfVectorizer().fit_transform([text, *(profile_sentence(u) for u in users)])
    return int(_dense(vectors[1:] @ vectors[0].T).argmax())


class BertEncoder:
    """Sentence vectors of a BERT-like model (the paper's BERT-Sim variant), mean-pooled over tokens."""

    def __init__(self, model: str, mode: Mode = "both"):
        """`model`: a folder that transformers can load."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch, self._mode = torch, mode
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModel.from_pretrained(model).eval()

    def fit(self, users: Users) -> None:
        """Does nothing: the model is already trained."""

    def encode(self, users: Users) -> Floats:
        """Dense unit vectors; 0 for empty profiles."""
        sentences = [profile_sentence(u, self._mode) for u in users]
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
    """Word weights by TF-IDF over the users' profiles (the paper's choice)."""

    def __init__(self, mode: Mode = "both"):
        self._vectorizer = TfidfVectorizer(analyzer=lambda u: profile_words(u, mode), dtype=np.float32)

    def fit(self, users: Users) -> None:
        """Counts in how many profiles each word occurs."""
        self._vectorizer.fit(users)

    def encode(self, users: Users) -> sparse.csr_matrix:
        """Sparse unit vectors."""
        return self._vectorizer.transform(users)


Encoder: TypeAlias = BertEncoder | TfidfEncoder
"""Turns users into unit vectors, after `fit` on all of them; the dot product of two is their similarity."""


def cluster(users: Users, typical: Sequence[int], encoder: Encoder, top: int) -> list[Cluster]:
    """Takes for each typical user the `top` most similar users (Eq. 2).

    Args:
        users: all users, any number.
        typical: index of each group's typical user, who is a member of the group.
        encoder: gives the vectors; it is fitted here.
        top: users per group (paper: 60). Users with nothing in common (similarity 0) are never taken.

    Returns:
        One cluster per typical user. Users of equal similarity are taken in their order in `users`.
    """
    encoder.fit(users)
    centres = encoder.encode([users[i] for i in typical])
    best = [_EMPTY] * len(typical)
    for start, vectors in _blocks(users, encoder):
        similarity = _similarities(vectors, centres)
        best = [_best(b, start, similarity[:, g], top) for g, b in enumerate(best)]
    return [_with_typical(b, i) for b, i in zip(best, typical, strict=True)]


def _with_typical(cluster: Cluster, typical: int) -> Cluster:
    """Puts the typical user back if many others have the same profile."""
    if not len(cluster.members) or typical in cluster.members:
        return cluster
    return Cluster(np.concatenate([[typical], cluster.members[:-1]]), cluster.similarity)


def cluster_kmeans(users: Users, typical: Sequence[int], encoder: Encoder, top: int, seed: int) -> list[Cluster]:
    """The paper's K-Means variant: centres start at the typical users and move to the mean of their users.

    A user belongs to the nearest centre only; of its users, a group takes the `top` most similar.
    """
    encoder.fit(users)
    start = encoder.encode([users[i] for i in typical])
    model = MiniBatchKMeans(len(typical), init=_dense(start), n_init=1, batch_size=4096, random_state=seed)
    for _, vectors in _blocks(users, encoder):
        if vectors.shape[0] >= len(typical):
            model.partial_fit(vectors)
    centres = normalize(model.cluster_centers_.astype(np.float32))
    best = [_EMPTY] * len(typical)
    for offset, vectors in _blocks(users, encoder):
        similarity = _similarities(vectors, centres)
        nearest = similarity.argmax(axis=1)
        best = [_best(b, offset, np.where(nearest == g, similarity[:, g], 0.0), top) for g, b in enumerate(best)]
    return best


def assign(
    users: Users, typical: Users, thresholds: Sequence[float], encoder: Encoder
) -> list[tuple[int, float] | None]:
    """Places users who were not clustered: with the nearest typical user whose group's threshold they reach.

    Args:
        users: users to place.
        typical: each group's typical user.
        thresholds: tau_g of each group.
        encoder: fitted on the users the groups were made from.

    Returns:
        Per user, the index of the group and the similarity, or None.
    """
    centres = encoder.encode(typical)
    limits = np.asarray(thresholds, np.float32)
    placed: list[tuple[int, float] | None] = []
    for _, vectors in _blocks(users, encoder):
        similarity = _similarities(vectors, centres)
        reaches = (similarity >= limits - _ROUNDING) & (similarity > 0)
        best = np.where(reaches, similarity, -1.0).argmax(axis=1)
        placed += [(int(g), float(similarity[i, g])) if reaches[i, g] else None for i, g in enumerate(best)]
    return placed


def _blocks(users: Users, encoder: Encoder) -> Iterator[tuple[int, Vectors]]:
    for start in range(0, len(users), _BLOCK):
        yield start, encoder.encode(users[start : start + _BLOCK])


def _similarities(vectors: Vectors, centres: Vectors) -> Floats:
    """(users, groups), dense: 50 groups are few."""
    return _dense(vectors @ centres.T)


def _dense(matrix: Vectors) -> Floats:
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
