"""The scripted teacher: chains of thought and reasons by simple rules, without a language model.

For small runs and for tests, where a real annotator would cost more than the training: it reads the same fields as the
annotator (title, length, tags, history, and the user's own words about a dislike), notes what it finds in one short
sentence a field, and concludes. It looks at no pictures itself (on simulated sources it can be told what a look would
show) and knows no causes, and where the words tell nothing it goes by the fields alone: like any teacher it makes
mistakes, and `gubs status` tells how many where the truth is known.
"""

import hashlib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gubs.prompts.people import Person
from gubs.records import Option, Task, Video
from gubs.teachers.cases import Case, clicked

SCRIPT = "script"
"""`label_source` of what this teacher says."""

LONG_S = 40.0
"""Length from which a video asks for time, where the user's history does not say more."""

_INTERESTS = 4
"""Listed interests that are gone through."""

_WATCHED_ON = 50
"""Play rate, in per cent, above which a view tells how long the user stays."""

REMARKS = {
    "clickbait": "the title promises too much",
    "unpleasant": "the picture is hard to bear",
    "vulgar": "the words are vulgar",
}
"""What is said about a video with a flaw, by the simulation's name of it."""

_WORDS: tuple[tuple[str, Option, str], ...] = (
    (r"clickbait|promis|misleading|nothing of the title", Option.B, REMARKS["clickbait"]),
    (r"disgust|creep|sick|blood|horrible|gross|gore|scary", Option.B, REMARKS["unpleasant"]),
    (r"vulgar|crude|rude|swear|language|obscene", Option.B, REMARKS["vulgar"]),
    (r"before|again|same|repeat|already", Option.C, "it was shown before"),
    (r"not care|not my thing|not interest|why am i shown|boring|irrelevant", Option.C, "the topic does not fit"),
    (r"too long|no time|watch that long", Option.D, "it takes too long"),
    (r"not now|just now|wrong moment|at the moment|accident|by mistake", Option.D, "the moment is wrong"),
)
"""What people write about a dislike: pattern, cause, and what it says about the video."""

_CONCLUSIONS = {
    Task.SEQUENTIAL: {
        Option.A: "So it is watched on.",
        Option.B: "So the content puts off.",
        Option.C: "So the recommendation missed.",
        Option.D: "So it is the user's moment.",
    },
    Task.CLICK: {Option.A: "So it attracts.", Option.B: "So it does not attract."},
}


@dataclass(frozen=True)
class Facts:
    """What the fields of a case say."""

    topic: str
    """The first of the video's topics that the user lists, else its first; empty where it has none."""
    interests: tuple[str, ...]
    """As the user lists them, up to the topic where it is among them."""
    fits: bool | None
    """The topic is among the interests; None where either is unknown."""
    seconds: float | None
    long: bool
    repeated: bool

    def said(self, remark: str = "") -> str:
        """The facts, a short sentence each; `remark` is what is known about the content beyond the fields.

        The interests are gone through until the topic is met, and the length repeated before it is judged: a small
        model then compares like with like, one step a token, instead of all at once.
        """
        parts = [f'Topic "{self.topic}".' if self.topic else "Topic unknown."]
        if self.fits is not None:
            likes = ", ".join(f'"{i}"' for i in self.interests)
            parts.append(f"Likes {likes}.")
            parts.append("It fits." if self.fits else "It does not fit.")
        if self.seconds is not None:
            parts.append(f"Length {self.seconds:.0f} s, {'long' if self.long else 'short'}.")
        if remark in REMARKS.values():
            parts.append(f"But {remark}.")
        elif self.repeated:
            parts.append("It was shown before.")
        return " ".join(parts)


def facts(person: Person, video: Video) -> Facts:
    """Reads the fields."""
    listed = person.tags[:_INTERESTS]
    common = [t for t in video.tags if t in listed]
    topic = (common or video.tags or [""])[0]
    fits = bool(common) if listed and video.tags else None
    interests = tuple(listed[: listed.index(topic) + 1] if common else listed)
    seconds = video.duration_s
    return Facts(topic, interests, fits, seconds, bool(seconds and seconds > _patience(person)), _shown(person, video))


def concluded(think: str, task: Task, option: Option) -> str:
    """A chain of thought with its last sentence."""
    return f"{think} {_CONCLUSIONS[task][option]}"


def dislike(case: Case, mistakes: float = 0.0, seen: str = "") -> tuple[str, Option]:
    """Chain of thought and cause for an explicit dislike; the words decide, the fields where they say nothing.

    Args:
        case: the disliked target.
        mistakes: share of targets for which the content is never blamed, whatever the words say about it: a topic that
            does not fit is (C), else the user's moment (D); which ones is drawn by their id.
        seen: what a look at the video tells about it (of `REMARKS`), whether the user minds it or not.
    """
    found = facts(case.person, case.video)
    option, remark = read_words(case.target.dislike_reason or "") or (by_fields(found), "")
    if _mistaken(case, mistakes):
        option = Option.C if found.repeated or found.fits is False else Option.D
    return concluded(found.said(seen or remark), Task(case.target.task), option), option


def watched(case: Case, seen: str = "") -> tuple[str, Option]:
    """Chain of thought for a target that was no fast skip; `seen` as in `dislike`."""
    return concluded(facts(case.person, case.video).said(seen), Task(case.target.task), Option.A), Option.A


def _mistaken(case: Case, share: float) -> bool:
    drawn = int(hashlib.sha256(case.target.interaction_id.encode()).hexdigest()[:8], 16)
    return drawn < share * 16**8


def click(case: Case, seen: str = "") -> tuple[str, Option]:
    """Chain of thought for a click target whose outcome the log knows; `seen` as in `dislike`."""
    option = Option.A if clicked(case.target) else Option.B
    return concluded(facts(case.person, case.video).said(seen), Task(case.target.task), option), option


def skip_cause(case: Case) -> tuple[str, Option]:
    """Rationale and cause for a fast skip: the user's words if there are any, else the fields."""
    return dislike(case)


def read_words(text: str) -> tuple[Option, str] | None:
    """Cause and remark that a user's words stand for; None where they tell nothing."""
    for pattern, option, remark in _WORDS:
        if re.search(pattern, text, re.IGNORECASE):
            return option, remark
    return None


def by_fields(found: Facts) -> Option:
    """The likeliest cause by the fields alone."""
    if found.repeated or found.fits is False:
        return Option.C
    return Option.D if found.long else Option.B


def _patience(person: Person) -> float:
    """Twice the median length of what the user watched on, where three views tell it. Lengths in whole seconds, as
    prompts show them.
    """
    watched = [
        float(round(v.video.duration_s))
        for v in person.history
        if v.video.duration_s is not None and v.play_rate is not None and round(100 * v.play_rate) > _WATCHED_ON
    ]
    return 2 * statistics.median(watched) if len(watched) >= 3 else LONG_S


def _shown(person: Person, video: Video) -> bool:
    return bool(video.title) and any(view.video.title == video.title for view in person.history)


def texts() -> Sequence[str]:
    """Every sentence this teacher can say, for tokenizers trained on our own words."""
    remarks = [r for _, _, r in _WORDS]
    return [*(f"But {r}." for r in remarks), *(c for by in _CONCLUSIONS.values() for c in by.values())]
