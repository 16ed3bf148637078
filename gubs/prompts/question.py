"""The UFM's question: will this user (or a user of this group) skip or click this video? (Appendix A.2)

Two styles: `full` explains the task and its options, as the paper's prompts do; `brief` shows only the values of users
and views, for small models that are trained on nothing else.
"""

from collections.abc import Sequence
from typing import Literal

from gubs.prompts import fill
from gubs.prompts.fields import block, record, unnamed
from gubs.prompts.options import option_lines
from gubs.prompts.people import Person
from gubs.records import TASK_OPTIONS, Option, Task, Video

Style = Literal["full", "brief"]


def user_prompt(
    task: Task,
    person: Person,
    video: Video,
    *,
    vision: str = "",
    tags: bool = False,
    limit: int = 200,
    style: Style = "full",
    order: Sequence[Option] = (),
    digest: str = "",
) -> str:
    """The question about one user: the roles T and S of a GA-GRPO group, and inference.

    Args:
        task: decides the question and its options.
        person: profile and the views that may be shown.
        video: the video in question.
        vision: the model's vision tokens, or a placeholder for them; not checked. Empty for sources without pictures.
        tags: show the video's topic tags too (sources without pictures); they always replace a missing title.
        limit: characters per field.
        style: see the module.
        order: the task's options in another order. In the style `full` the first of them gets the first letter, and so
            on: `meant` says what an answer names. In `brief`, which shows no texts, only the letters change places.
        digest: what `Person.tally` says about the video; empty = not shown.
    """
    return fill(
        f"ufm/{task}_user" if style == "full" else "ufm/brief_user",
        **_question(task, style, order),
        profile=_styled(person.profile(limit), style),
        views=[_styled(view, style) for view in person.views(limit)],
        video=video_line(video, tags, limit),
        digest=digest,
        vision=vision,
    )


def group_prompt(
    task: Task,
    name: str,
    profile: str,
    video: Video,
    *,
    vision: str = "",
    tags: bool = False,
    limit: int = 200,
    profile_limit: int = 20000,
    style: Style = "full",
) -> str:
    """The question about a group (role G): its name and profile instead of a user and a history.

    `profile` may have many lines and any content: every line is quoted, and it is cut to `profile_limit` characters.
    Other arguments: see `user_prompt`.
    """
    return fill(
        f"ufm/{task}_group" if style == "full" else "ufm/brief_group",
        **_question(task, style, ()),
        name=name,
        profile=block(profile, profile_limit),
        video=video_line(video, tags, limit),
        vision=vision,
    )


def video_line(video: Video, tags: bool = False, limit: int = 200) -> str:
    """A video as one safe line of JSON: title, length and, with `tags` or without a title, topic tags."""
    length = None if video.duration_s is None else f"{video.duration_s:.0f} s"
    topics = video.tags if tags or not video.title else None
    return record({"title": video.title, "length": length, "tags": topics}, limit)


def _styled(line: str, style: Style) -> str:
    return line if style == "full" else unnamed(line)


def meant(letter: Option, task: Task, order: Sequence[Option], style: Style) -> Option:
    """The option that a letter stands for in a prompt with another order of the options (see `user_prompt`)."""
    return order[TASK_OPTIONS[task].index(letter)] if order and style == "full" else letter


def _question(task: Task, style: Style, order: Sequence[Option]) -> dict[str, str]:
    if style == "full":
        return {"options": option_lines(task, order, TASK_OPTIONS[task])}
    verb = "Click" if task == Task.CLICK else "Skip"
    return {"task": str(task), "question": f"{verb}? {' '.join(order or TASK_OPTIONS[task])}"}
