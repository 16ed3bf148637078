"""Simulated users as language models see them: what a prompt says about a user, by strategy, and how answers are read.

The strategies stand for families of the literature and are documented here in our own words; none is a copy of a
system. All of them are computed by rule from the user's training records, so that no candidate can be in them.

- `plain`: the latest items and nothing else.
- `recagent`: a memory: the latest items, and those of the older ones that have most tags in common with what is asked.
- `agent4rec`: a persona: how much the user chooses, how varied, how close to the average rating, and favourite tags.
- `simuser`: the persona, how hard to please the user is, and the liked and disliked items most like what is asked.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gubs.artifacts import JsonObject
from gubs.evaluate.feedback import Feedback
from gubs.evaluate.protocols import Contrast
from gubs.prompts import fill
from gubs.prompts.fields import inline, plain
from gubs.prompts.question import video_line
from gubs.records import Video

Strategy = Literal["plain", "recagent", "agent4rec", "simuser"]
Form = Literal["list", "point"]
LATEST, RELEVANT = 20, 10
_TAGS = 5
PARSER = "gubs.evaluate.simulators:read_answers"


@dataclass(frozen=True)
class Profile:
    """What the training records say about one user."""

    items: Sequence[str]
    """Ids, oldest first."""
    stars: Sequence[float]
    """NaN where unknown."""
    average: Mapping[str, float]
    """Average stars of each of these items, of all users."""
    records: float
    """Share of users with fewer records."""


class Simulators:
    """Prompts about users, from the training records alone."""

    def __init__(self, train: Feedback, videos: Mapping[str, Video], things: str, max_text: int = 80):
        """See above.

        Args:
            train: the records that may be shown.
            videos: titles and tags.
            things: what the items are called (films, books, videos).
            max_text: characters of a title.
        """
        self._train, self._videos, self._things, self._limit = train, videos, things, max_text
        rated = np.isfinite(train.rating)
        n = np.bincount(train.item[rated], minlength=len(train.items))
        self._average = np.bincount(train.item[rated], train.rating[rated], minlength=len(train.items)) / np.maximum(
            1, n
        )
        self._counts = np.diff(train.starts)

    def prompt(self, strategy: Strategy, user: int, candidates: Sequence[str], contrast: Contrast) -> str:
        """Asks about one candidate (point-wise) or several (list-wise)."""
        profile = self.profile(user)
        persona = [*_PERSONAS[strategy](self, profile)]
        memories = _MEMORIES[strategy](self, profile, candidates)
        liked = contrast is Contrast.LIKED
        verb = "Which of these does this user like" if liked else "Which of these has this user chosen"
        alone = "Does this user like it (4 stars and more)?" if liked else "Has this user chosen it?"
        return fill(
            "simulate/list" if len(candidates) > 1 else "simulate/point",
            things=self._things,
            persona=persona,
            memories=[self.line(i, s) for i, s in memories],
            remembered=f"Chosen before ({'with stars of 5; ' if np.isfinite(profile.stars).any() else ''}latest last):",
            candidates=[(inline(i), self.line(i)) for i in candidates],
            ask=f"{verb}{' (4 stars and more)' if liked else ''}?" if len(candidates) > 1 else alone,
        )

    def profile(self, user: int) -> Profile:
        """The user's training records."""
        rows = self._train.rows_of(user)
        items = [self._train.items[i] for i in self._train.item[rows]]
        average = {i: float(self._average[k]) for i, k in zip(items, self._train.item[rows], strict=True)}
        fewer = float((self._counts < self._counts[user]).mean())
        return Profile(items, self._train.rating[rows].tolist(), average, fewer)

    def line(self, item: str, stars: float = float("nan")) -> str:
        """An item in one line: title, tags, stars."""
        video = self._videos.get(item, Video(item))
        line = video_line(video, tags=True, limit=self._limit)
        return line if stars != stars else f"{line}, {stars:g} stars"

    def tags(self, item: str) -> frozenset[str]:
        """The item's tags."""
        return frozenset(self._videos[item].tags) if item in self._videos else frozenset()


def _nobody(_: Simulators, __: Profile) -> list[str]:
    return []


def _persona(simulators: Simulators, p: Profile) -> list[str]:
    """How much, how varied, how close to the average, favourite tags."""
    tags = Counter(tag for item in p.items for tag in simulators.tags(item))
    how_much = ("seldom chooses anything", "chooses now and then", "chooses very often")[min(2, int(3 * p.records))]
    kinds = len(tags) / max(1, len(p.items)) ** 0.5
    lines = [f"This user {how_much} ({len(p.items)} times so far), of {'many' if kinds > 2 else 'few'} kinds."]
    rated = [(s, p.average[i]) for i, s in zip(p.items, p.stars, strict=True) if s == s]
    if rated:
        apart = float(np.mean([abs(s - mean) for s, mean in rated]))
        close = "mostly agrees with" if apart < 0.8 else "often differs from"  # of five stars
        lines.append(f"The user {close} what others think ({apart:.1f} stars apart on average).")
    if tags:
        favourites = ", ".join(inline(plain(t, 40)) for t, _ in tags.most_common(_TAGS))
        lines.append(f"Favourite kinds: {favourites}.")
    return lines


def _hard_to_please(simulators: Simulators, p: Profile) -> list[str]:
    lines = _persona(simulators, p)
    stars = [s for s in p.stars if s == s]
    if stars:
        mean = float(np.mean(stars))
        word = "hard to please" if mean < 3.3 else "easy to please" if mean > 4.0 else "neither strict nor mild"
        lines.append(f"The user is {word}: {mean:.1f} stars on average.")
    return [*lines, "Weigh what speaks for and against each before you answer."]


def _latest(_: Simulators, p: Profile, __: Sequence[str]) -> list[tuple[str, float]]:
    return list(zip(p.items, p.stars, strict=True))[-LATEST:]


def _nothing(_: Simulators, __: Profile, ___: Sequence[str]) -> list[tuple[str, float]]:
    return []


def _memory(simulators: Simulators, p: Profile, candidates: Sequence[str]) -> list[tuple[str, float]]:
    """The latest half as many as `plain` shows, and the older ones most like what is asked."""
    pairs = list(zip(p.items, p.stars, strict=True))
    older, latest = pairs[: -LATEST // 2], pairs[-LATEST // 2 :]
    return [*_like(simulators, older, candidates, RELEVANT), *latest]


def _episodes(simulators: Simulators, p: Profile, candidates: Sequence[str]) -> list[tuple[str, float]]:
    """Liked and disliked items most like what is asked; without stars, the most like."""
    pairs = list(zip(p.items, p.stars, strict=True))
    liked = [x for x in pairs if not x[1] < 4]
    disliked = [x for x in pairs if x[1] <= 2]
    return [*_like(simulators, disliked, candidates, RELEVANT // 2), *_like(simulators, liked, candidates, RELEVANT)]


def _like(
    simulators: Simulators, pairs: Sequence[tuple[str, float]], candidates: Sequence[str], n: int
) -> list[tuple[str, float]]:
    """The `n` items with most tags in common with the candidates, in their own order; of equals the latest."""
    wanted = Counter(tag for c in candidates for tag in simulators.tags(c))
    by_fit = sorted(range(len(pairs)), key=lambda k: (-sum(wanted[t] for t in simulators.tags(pairs[k][0])), -k))
    return [pairs[k] for k in sorted(by_fit[:n])]


_PERSONAS: dict[Strategy, Callable[[Simulators, Profile], list[str]]] = {
    "plain": _nobody,
    "recagent": _nobody,
    "agent4rec": _persona,
    "simuser": _hard_to_please,
}
_MEMORIES: dict[Strategy, Callable[[Simulators, Profile, Sequence[str]], list[tuple[str, float]]]] = {
    "plain": _latest,
    "recagent": _memory,
    "agent4rec": _nothing,
    "simuser": _episodes,
}


class UnreadableError(ValueError):
    """An answer of the right form that says nothing that can be used."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


LIST_FORM: JsonObject = {
    "type": "object",
    "properties": {
        "answers": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "yes": {"type": "boolean"}},
                "required": ["id", "yes"],
            },
        }
    },
    "required": ["answers"],
}
POINT_FORM: JsonObject = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "yes": {"type": "boolean"}},
    "required": ["id", "yes"],
}
RECALL_FORM: JsonObject = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}


def read_answers(value: JsonObject, ids: Sequence[str]) -> dict[str, Any]:
    """Joins answers to ids: never by their place. One id with two different answers has none.

    Returns:
        `yes`: id -> answer; `unknown`: ids that were not asked about; `missing` and `contradicted`: ids without one.

    Raises:
        UnreadableError: no answer is about an id that was asked.
    """
    entries = value.get("answers", [value])
    asked, by_id = set(ids), dict[str, set[bool]]()
    unknown = 0
    for entry in entries:
        name = str(entry["id"]).strip().removeprefix('"').removesuffix('"')
        if name in asked:
            by_id.setdefault(name, set()).add(bool(entry["yes"]))
        else:
            unknown += 1
    if not by_id:
        raise UnreadableError("unknown_id", "no id of the answer is one that was asked about: copy the ids as they are")
    clear = {name: next(iter(values)) for name, values in by_id.items() if len(values) == 1}
    return {
        "yes": clear,
        "unknown": unknown,
        "contradicted": sorted(by_id.keys() - clear.keys()),
        "missing": [name for name in ids if name not in by_id],
    }
