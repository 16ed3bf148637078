"""The scripted teacher: chains of thought and reasons by simple rules, without a language model.

For small runs and tests, where a real annotator would cost more than the training. It reads the same fields as the
annotator (title, length, tags, history, and the user's own words about a dislike), notes what it finds in one short
sentence per field, and concludes. It sees no pictures (on simulated sources it can be told of a video's flaw) and knows
no causes; if the user's words say nothing, it decides by the fields alone. Like any teacher it makes mistakes;
`gubs status` shows how many where the truth is known.
"""

import hashlib
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gubs.prompts.complaints import COMPLAINTS
from gubs.prompts.people import Person
from gubs.records import Option, Task, Video
from gubs.teachers.cases import Case, clicked

SCRIPT = "script"
"""`label_source` of this teacher's examples and labels."""

GUESS = "guess"
"""`label_source` of a reason that the fields alone suggest, without a word of the user. That the video was skipped is
known, why is not: no policy is rewarded for the guess."""

LONG_S = 40.0
"""Length in seconds above which a video is long, for users with too little history."""

_INTERESTS = 6
"""Interests of the user that are read: as many as prompts derive from a history."""

_WATCHED_ON = 50
"""Play rate, in percent, above which a view counts as watched."""

REMARKS = {
    "clickbait": "the title promises too much",
    "unpleasant": "the picture is hard to bear",
    "vulgar": "the words are vulgar",
}
"""The remark about a flawed video, by the simulation's name of the flaw."""

_WORDS: tuple[tuple[str, Option, str], ...] = tuple(
    (COMPLAINTS[name], option, remark)
    for name, option, remark in (
        ("clickbait", Option.B, REMARKS["clickbait"]),
        ("unpleasant", Option.B, REMARKS["unpleasant"]),
        ("vulgar", Option.B, REMARKS["vulgar"]),
        ("repetition", Option.C, "it was shown before"),
        ("mismatch", Option.C, "the topic does not fit"),
        ("too_long", Option.D, "it takes too long"),
        ("moment", Option.D, "the moment is wrong"),
    )
)
"""How people explain a dislike: pattern, cause, and remark about the video."""

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
    """The first of the video's topics that the user lists, else its first topic; empty if it has none."""
    interests: tuple[str, ...]
    """As the user lists them; if the topic is among them, up to the topic."""
    fits: bool | None
    """Whether the topic is among the interests; None if either is unknown."""
    seconds: float | None
    long: bool
    repeated: bool
    digest: str = ""
    """How the user's earlier views went, where prompts say it; it has the length's class."""

    def sentences(self, remark: str = "") -> str:
        """One short sentence per fact; `remark` is what is known about the content beyond the fields.

        The interests are listed up to the topic, and the length is repeated before it is judged: a small model then
        compares like with like, one token at a time, instead of everything at once.
        """
        parts = [f'Topic "{self.topic}".' if self.topic else "Topic unknown."]
        if self.fits is not None:
            likes = ", ".join(f'"{i}"' for i in self.interests)
            parts.append(f"Likes {likes}.")
            parts.append("It fits." if self.fits else "It does not fit.")
        if self.digest:
            parts.append(self.digest)
        elif self.seconds is not None:
            parts.append(f"Length {self.seconds:.0f} s, {'long' if self.long else 'short'}.")
        if remark in REMARKS.values():
            parts.append(f"But {remark}.")
        elif self.repeated:
            parts.append("It was shown before.")
        return " ".join(parts)


def facts(person: Person, video: Video, *, digest: bool = False) -> Facts:
    """The facts in the fields of a person and a video; with a `digest`, if prompts show one."""
    listed = person.tags[:_INTERESTS]
    common = [t for t in video.tags if t in listed]
    topic = (common or video.tags or [""])[0]
    fits = bool(common) if listed and video.tags else None
    interests = tuple(listed[: listed.index(topic) + 1] if common else listed)
    seconds = video.duration_s
    is_long = bool(seconds and seconds > _patience(person))
    repeated = bool(video.title) and any(view.video.title == video.title for view in person.history)
    return Facts(topic, interests, fits, seconds, is_long, repeated, person.tally.digest(video) if digest else "")


def concluded(fields: Facts, remark: str, task: Task, option: Option) -> str:
    """The chain of thought: the facts and a concluding sentence.

    With a digest there is none: a conclusion would decide before the letter does, whose probability then says nothing.
    """
    think = fields.sentences(remark)
    return think if fields.digest else f"{think} {_CONCLUSIONS[task][option]}"


def dislike(case: Case, mistakes: float = 0.0, seen: str = "", *, digest: bool = False) -> tuple[str, Option]:
    """Chain of thought and cause for an explicit dislike; the user's words decide or, if they say nothing, the fields.

    Args:
        case: the disliked target.
        mistakes: share of targets, drawn by their ids, for which the content is never blamed, whatever the words say:
            the cause is (C) if the topic does not fit or the video was repeated, else the user's moment (D).
        seen: the flaw that a look at the video shows (a value of `REMARKS`), whether or not the user minds it.
        digest: note how the user's earlier views went.
    """
    fields = facts(case.person, case.video, digest=digest)
    option, remark = read_words(case.target.dislike_reason or "") or (by_fields(fields), "")
    if _mistaken(case, mistakes):
        option = Option.C if fields.repeated or fields.fits is False else Option.D
    return concluded(fields, seen or remark, Task(case.target.task), option), option


def watched(case: Case, seen: str = "", *, digest: bool = False) -> tuple[str, Option]:
    """Chain of thought for a target that was not a fast skip; `seen` and `digest` as in `dislike`."""
    return _explained(case, seen, Option.A, digest=digest)


def click(case: Case, seen: str = "", *, digest: bool = False) -> tuple[str, Option]:
    """Chain of thought for a click target whose outcome the log knows; `seen` and `digest` as in `dislike`."""
    return _explained(case, seen, Option.A if clicked(case.target) else Option.B, digest=digest)


def skip_cause(case: Case) -> tuple[str, Option, str]:
    """Rationale and cause for a fast skip, found as for a dislike, and its `label_source`."""
    source = SCRIPT if read_words(case.target.dislike_reason or "") else GUESS
    return *dislike(case), source


def read_words(text: str) -> tuple[Option, str] | None:
    """The cause and the remark that match a user's words; None if no pattern does."""
    for pattern, option, remark in _WORDS:
        if re.search(pattern, text, re.IGNORECASE):
            return option, remark
    return None


def by_fields(fields: Facts) -> Option:
    """The most likely cause by the fields alone."""
    if fields.repeated or fields.fits is False:
        return Option.C
    return Option.D if fields.long else Option.B


def _explained(case: Case, seen: str, option: Option, *, digest: bool) -> tuple[str, Option]:
    fields = facts(case.person, case.video, digest=digest)
    return concluded(fields, seen, Task(case.target.task), option), option


def _mistaken(case: Case, share: float) -> bool:
    drawn = int(hashlib.sha256(case.target.interaction_id.encode()).hexdigest()[:8], 16)
    return drawn < share * 16**8


def _patience(person: Person) -> float:
    """Twice the median length of the videos watched, if there are at least three; in whole seconds, as in prompts."""
    watched = [
        float(round(v.video.duration_s))
        for v in person.history
        if v.video.duration_s is not None and v.play_rate is not None and round(100 * v.play_rate) > _WATCHED_ON
    ]
    return 2 * statistics.median(watched) if len(watched) >= 3 else LONG_S


def texts() -> Sequence[str]:
    """The fixed sentences of this teacher, for tokenizers trained on our own words."""
    conclusions = [text for by_option in _CONCLUSIONS.values() for text in by_option.values()]
    return [*(f"But {remark}." for _, _, remark in _WORDS), *conclusions]
