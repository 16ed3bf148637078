"""How a user's earlier views went, in a few words: overall, at the video's length, from its time, with its tags.

Small models cannot count over a history; here code counts. Only views with the role `history` count (see `people`),
before the time that the question is about. The words are ours, so no text from outside can get in.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gubs.records import FAST_SKIP_BELOW, Video

if TYPE_CHECKING:
    from gubs.prompts.people import View

SKIPS, LIKES, CLICKS = MEASURES = ("skips", "likes", "clicks")
"""What is counted: fast skips; ratings that are likes; clicks."""

LENGTHS_S = (7, 12, 20, 40, 80, 120, 180, 240)
"""Borders between the classes of length."""

UNKNOWN = "unknown"
RATES = ("never", "seldom", "sometimes", "often", "mostly", "always")
_RATE_BORDERS = (0.15, 0.35, 0.5, 0.65, 0.85)
FAMILIARITIES = ("new", "rare", "usual", "frequent")
_FAMILIARITY_BORDERS = (0.01, 0.15, 0.4)
_PRIOR_VIEWS = 2.0
"""Views at the user's own rate that are added to a small group of views; overall, at one half."""
_YEAR = re.compile(r"\((\d{3})\d\)\s*$")

_Key = tuple[str, str]
"""Kind of a group of views (length, time, tag) and its name."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over a history."""

    measure: str = ""
    """One of `MEASURES`; empty: the history has no views whose outcome is known."""
    views: int = 0
    hits: int = 0
    groups: Mapping[_Key, tuple[int, int]] = field(default_factory=dict)
    """Views and hits by group."""

    @classmethod
    def of(cls, history: Iterable["View"]) -> "Tally":
        """Counts the views that went as the latest one is measured; others are left out."""
        measured = [(view.video, outcome) for view in history if (outcome := _outcome(view))]
        if not measured:
            return cls()
        measure = measured[-1][1][0]
        views, hits = Counter[_Key](), Counter[_Key]()
        outcomes = [(video, hit) for video, (name, hit) in measured if name == measure]
        for video, hit in outcomes:
            for key in _groups(video):
                views[key] += 1
                hits[key] += hit
        return cls(measure, len(outcomes), sum(hit for _, hit in outcomes), {k: (n, hits[k]) for k, n in views.items()})

    def digest(self, video: Video) -> str:
        """What the history says about a video, in one line: `Skips often, 12 to 20 s never, such tags mostly, new.`"""
        if not self.measure:
            return "Nothing known."
        rate = (self.hits + _PRIOR_VIEWS / 2) / (self.views + _PRIOR_VIEWS)
        parts = [f"{self.measure.capitalize()} {_word(rate, RATES, _RATE_BORDERS)}"]
        parts += [f"{name} {self._rate([(kind, name)], rate)}" for kind, name in _groups(video) if kind != "tag"]
        if tags := [("tag", tag) for tag in video.tags]:
            seen = sum(self.groups.get(key, (0, 0))[0] for key in tags) / (len(tags) * self.views)
            familiar = _word(seen, FAMILIARITIES, _FAMILIARITY_BORDERS)
            parts.append(f"such tags {self._rate(tags, rate)}, {familiar}")
        return ", ".join(parts) + "."

    def _rate(self, keys: Iterable[_Key], prior: float) -> str:
        """The rate of hits over the views of some groups together, as a word."""
        counts = [self.groups.get(key, (0, 0)) for key in keys]
        views, hits = sum(n for n, _ in counts), sum(k for _, k in counts)
        if not views:
            return UNKNOWN
        return _word((hits + _PRIOR_VIEWS * prior) / (views + _PRIOR_VIEWS), RATES, _RATE_BORDERS)


def length_class(seconds: float) -> str:
    """The class of a length: `under 7 s`, `7 to 12 s`, ..., `240 s and more`."""
    place = bisect_right(LENGTHS_S, seconds)
    if place == 0:
        return f"under {LENGTHS_S[0]} s"
    if place == len(LENGTHS_S):
        return f"{LENGTHS_S[-1]} s and more"
    return f"{LENGTHS_S[place - 1]} to {LENGTHS_S[place]} s"


def words() -> list[str]:
    """All words of a digest but the times, for tokenizers."""
    classes = [length_class(s) for s in (0, *LENGTHS_S)]
    return [*(m.capitalize() for m in MEASURES), *classes, UNKNOWN, *RATES, *FAMILIARITIES]


def _groups(video: Video) -> list[_Key]:
    """The groups that a video belongs to."""
    keys = [] if video.duration_s is None else [("length", length_class(video.duration_s))]
    if year := _YEAR.search(video.title or ""):
        keys.append(("time", f"{year[1]}0s"))
    return keys + [("tag", tag) for tag in video.tags]


def _outcome(view: "View") -> tuple[str, bool] | None:
    """What is known of how a view went, as `View.line` shows it: measure, and whether it is a hit."""
    if view.rating is not None:
        return LIKES, view.enjoyed
    if view.clicked is not None:
        return CLICKS, view.clicked
    return None if view.play_rate is None else (SKIPS, view.play_rate < FAST_SKIP_BELOW)


def _word(value: float, words: tuple[str, ...], borders: tuple[float, ...]) -> str:
    return words[bisect_right(borders, value)]
