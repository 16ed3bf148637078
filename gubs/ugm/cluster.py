"""Cluster (Eq. 2): each user's similarity to each group's typical user; the most similar users form the group.

Plain functions over texts and arrays: no Ray, no LLM. Users are taken in blocks and only the best of each group are
kept, so memory grows with the users' own texts, never with users x users: a million users fit. A user may land in
several groups, or in none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from gubs.records import User
from gubs.ugm.settings import Mode

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_BLOCK = 65536
"""Users compared at once."""
_ROUNDING = 1e-6
"""A user with the very profile of a group's last member must reach its threshold."""


@dataclass(frozen=True)
class Cluster:
    """The users of one group, most similar first."""

    members: Ints
    """Indices into the users."""
    similarity: Floats
    """Of each member to the typical user, in [0, 1]; descending."""

    @property
    def threshold(self) -> float:
        """tau_g of Eq. 2: the similarity of the last user taken; above 1 (nobody passes) for an empty group."""
        return float(self.similarity[-1]) if len(self.similarity) else float("inf")


def profile_words(user: User, mode: Mode = "both") -> list[str]:
    """A user's profile as words: what TF-IDF compares. Fields that are unknown give no word.

    Each word names its field, so that a city called "Cooking" is no interest; ages become decades.
    """
    interest = [f"tag={t.casefold()}" for t in user.tags]
    facts = {"gender": user.gender, "occupation": user.occupation, **user.other}
    known = [f"{name}={value.casefold()}" for name, value in facts.items() if value]
    demographics = ([f"age={user.age // 10}0s"] if user.age is not None else []) + known
    return {"interest": interest, "demographics": demographics, "both": interest + demographics}[mode]


def profile_sentence(user: User, mode: Mode = "both") -> str:
    """The same as a sentence, for a sentence encoder."""
    return ", ".join(w.replace("=", " ") for w in profile_words(user, mode))


def nearest_to_text(text: str, users: Sequence[User]) -> int:
    """Index of the user whose profile shares most with a free text (the first one, where none shares a word)."""
    vectors = TfidfVectorizer().fit_transform([text, *(profile_sentence(u) for u in users)])
    return int(_dense(vectors[1:] @ vectors[0].T).argmax())


class Encoder(Protocol):
    """Turns users into unit vectors; the dot product of two is their similarity."""

    def fit(self, users: Sequence[User]) -> None:
        """Learns what it needs (word weights) from all users."""

    def encode(self, users: Sequence[User]) -> sparse.csr_matrix | Floats:
        """(len(users), d), rows of length 1, or 0 where a profile is empty."""


class BertEncoder:
    """Sentence vectors of a BERT-like model (the paper's BERT-Sim variant), mean-pooled over tokens."""

    def __init__(self, model: str, mode: Mode = "both"):
        """`model`: a folder that transformers can load."""
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._torch, self._mode = torch, mode
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModel.from_pretrained(model).eval()

    def fit(self, users: Sequence[User]) -> None:
        """Nothing to learn: the model comes trained."""

    def encode(self, users: Sequence[User]) -> Floats:
        """Dense unit vectors; 0 for empty profiles."""
        sentences = [profile_sentence(u, self._mode) for u in users]
        vectors = [self._encode_batch(sentences[i : i + 64]) for i in range(0, len(sentences), 64)]
        known = np.array([bool(s) for s in sentences], np.float32)[:, None]
        return np.concatenate(vectors) * known if vectors else np.zeros((0, 1), np.float32)

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

    def fit(self, users: Sequence[User]) -> None:
        """Counts in how many profiles each word stands."""
        self._vectorizer.fit(users)

    def encode(self, users: Sequence[User]) -> sparse.csr_matrix:
        """Sparse unit vectors."""
        return self._vectorizer.transform(users)


def cluster(users: Sequence[User], typical: Sequence[int], encoder: Encoder, top: int) -> list[Cluster]:
    """Takes for each typical user the `top` most similar users (Eq. 2).

    Args:
        users: all users, any number.
        typical: index of each group's typical user; it is a member of its own group.
        encoder: gives the vectors; it is fitted here.
        top: how many users a group takes (paper: 60). Users with nothing in common (similarity 0) are never taken.

    Returns:
        One cluster a typical user. Users of equal similarity are taken in their order in `users`.
    """
    encoder.fit(users)
    centres = encoder.encode([users[i] for i in typical])
    best = [Cluster(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in typical]
    for start, vectors in _blocks(users, encoder):
        similarity = _similarities(vectors, centres)
        best = [_best(b, start, similarity[:, g], top) for g, b in enumerate(best)]
    return [_with_typical(b, i) for b, i in zip(best, typical, strict=True)]


def _with_typical(found: Cluster, typical: int) -> Cluster:
    """Among many users with the very profile of the typical one, that one itself must not be lost."""
    if not len(found.members) or typical in found.members:
        return found
    return Cluster(np.concatenate([[typical], found.members[:-1]]), found.similarity)


def cluster_kmeans(
    users: Sequence[User], typical: Sequence[int], encoder: Encoder, top: int, seed: int
) -> list[Cluster]:
    """The paper's K-Means variant: centres start at the typical users and move to the middle of their users.

    A user belongs to the one nearest centre; of these, the `top` most similar are taken.
    """
    encoder.fit(users)
    start = encoder.encode([users[i] for i in typical])
    model = MiniBatchKMeans(len(typical), init=_dense(start), n_init=1, batch_size=4096, random_state=seed)
    for _, vectors in _blocks(users, encoder):
        if vectors.shape[0] >= len(typical):
            model.partial_fit(vectors)
    centres = normalize(model.cluster_centers_.astype(np.float32))
    best = [Cluster(np.zeros(0, np.int64), np.zeros(0, np.float32)) for _ in typical]
    for offset, vectors in _blocks(users, encoder):
        similarity = _similarities(vectors, centres)
        nearest = similarity.argmax(axis=1)
        best = [_best(b, offset, np.where(nearest == g, similarity[:, g], 0.0), top) for g, b in enumerate(best)]
    return best


def assign(
    users: Sequence[User], typical: Sequence[User], thresholds: Sequence[float], encoder: Encoder
) -> list[tuple[int, float] | None]:
    """Groups users who were not clustered: the nearest typical user whose group's threshold the similarity reaches.

    Args:
        users: users to place.
        typical: each group's typical user.
        thresholds: tau_g of each group.
        encoder: fitted on the users the groups were made from.

    Returns:
        Index of the group and the similarity, or None.
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


def _blocks(users: Sequence[User], encoder: Encoder) -> Iterator[tuple[int, sparse.csr_matrix | Floats]]:
    for start in range(0, len(users), _BLOCK):
        yield start, encoder.encode(users[start : start + _BLOCK])


def _similarities(vectors: sparse.csr_matrix | Floats, centres: sparse.csr_matrix | Floats) -> Floats:
    """(users, groups), dense: 50 groups are few."""
    return _dense(vectors @ centres.T)


def _dense(matrix: Any) -> Floats:
    return np.asarray(matrix.todense() if sparse.issparse(matrix) else matrix, dtype=np.float32)


def _best(so_far: Cluster, offset: int, similarity: Floats, top: int) -> Cluster:
    candidates = np.flatnonzero(similarity > 0)
    if len(candidates) > top:
        values = similarity[candidates]
        limit = np.partition(values, len(values) - top)[len(values) - top]
        candidates = candidates[values >= limit]
    members = np.concatenate([so_far.members, candidates + offset])
    values = np.concatenate([so_far.similarity, similarity[candidates].astype(np.float32)])
    order = np.argsort(-values, kind="stable")[:top]
    return Cluster(members[order], values[order])
