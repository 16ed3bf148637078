"""The changed prompts of the stage `sensitivity`. Pure: neither a run nor a model is needed.

Each condition changes one thing in the user's own prompt, or shows another profile in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from gubs.prompts.people import Person
from gubs.records import TASK_OPTIONS, GroupProfile, Option, Task, User, Video
from gubs.ufm.inputs import Prompt
from gubs.ufm.prompting import PromptBuilder
from gubs.video.clips import Clip


class Condition(StrEnum):
    """How a target is asked about."""

    OWN = "own prompt"
    """The reference: the user's profile and history, as in use."""
    SIMILAR = "similar user"
    """Another user of the same group in place of the user."""
    GROUP = "group"
    """The group's profile in place of the user's, and no history."""
    NOBODY = "nobody"
    """No profile and no history."""
    NO_PICTURES = "no pictures"
    COVER = "cover only"
    """The first frame in place of all."""
    NO_TITLE = "no title"
    """Nor the tags that stand in for one."""
    NO_HISTORY = "no history"
    """Nor what is counted over it."""
    HALF = "half the history"
    """The later half of the views that are shown; what is counted stays."""
    REVERSED = "history reversed"
    """Latest view first."""
    LETTERS = "letters permuted"
    """See `gubs.prompts.question.user_prompt`."""


CHANGES = tuple(c for c in Condition if c is not Condition.OWN)
WHY_NOT = {
    Condition.SIMILAR: "no user is in a group with others (`gubs ugm`)",
    Condition.GROUP: "no user is in a group (`gubs ugm`)",
    Condition.NO_PICTURES: "prompts show no pictures",
    Condition.COVER: "prompts show one picture at most",
    Condition.NO_TITLE: "no video has a title",
    Condition.HALF: "prompts show one view at most",
    Condition.REVERSED: "prompts show one view at most",
}
"""Why none of the targets can be asked in a way."""


@dataclass(frozen=True)
class Subject:
    """What the prompts about a target are made from."""

    task: Task
    person: Person
    video: Video
    clip: Clip | None
    cover: Clip | None
    """The first frame alone."""
    similar: Person | None
    """As known at the target's time."""
    group: GroupProfile | None
    order: Sequence[Option]
    """Of the options, with permuted letters."""


def rotated(task: Task, places: int) -> tuple[Option, ...]:
    """The options moved around by 1 to n-1 places, so that each gets another letter."""
    options = TASK_OPTIONS[task]
    shift = 1 + places % (len(options) - 1)
    return (*options[shift:], *options[:shift])


def prompts(subject: Subject, builder: PromptBuilder) -> dict[Condition, Prompt]:
    """The prompts about a target by condition, the own one first; those that would equal it are left out."""
    s, person, shown = subject, subject.person, subject.person.latest(builder.settings.history_items)

    def ask(person: Person = person, video: Video = s.video, clip: Clip | None = s.clip) -> Prompt:
        return builder.about_user(s.task, person, video, clip)

    untitled = replace(s.video, title=None, tags=[] if builder.pictures else s.video.tags)
    by_condition = {
        Condition.OWN: ask(),
        Condition.SIMILAR: ask(s.similar) if s.similar else None,
        Condition.GROUP: builder.about_group(s.task, s.group, s.video, s.clip) if s.group else None,
        Condition.NOBODY: ask(Person(User("nobody"))),
        Condition.NO_PICTURES: ask(clip=None),
        Condition.COVER: ask(clip=s.cover) if s.clip else None,
        Condition.NO_TITLE: ask(video=untitled),
        Condition.NO_HISTORY: ask(replace(person, history=())),
        Condition.HALF: ask(person.latest(max(1, len(shown.history) // 2))),
        Condition.REVERSED: ask(shown.backwards()),
        Condition.LETTERS: builder.about_user(s.task, person, s.video, s.clip, s.order),
    }
    own = _identity(ask())
    return {c: p for c, p in by_condition.items() if p and (c is Condition.OWN or _identity(p) != own)}


def _identity(prompt: Prompt) -> tuple[str, str]:
    return prompt.text, prompt.clip.key if prompt.clip else ""
