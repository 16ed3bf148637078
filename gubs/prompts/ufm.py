"""The question put to the UFM: will this user (or a user of this group) skip or click this video? (Appendix A.2)"""

from gubs.people import Person
from gubs.prompts import fill
from gubs.prompts.fields import block, record
from gubs.prompts.options import option_lines
from gubs.records import Task, Video


def user_prompt(
    task: Task, person: Person, video: Video, *, vision: str = "", tags: bool = False, limit: int = 200
) -> str:
    """The question about one user: the roles T and S of a GA-GRPO group, and inference.

    Args:
        task: decides the question and its options.
        person: profile and the views that may be shown.
        video: what is shown now.
        vision: text that stands for the pictures (the model's own vision tokens or a mark to be replaced by them); not
            checked. Empty for sources without pictures.
        tags: show the video's topic tags too (sources without pictures); they always stand in for a missing title.
        limit: characters of a single field.
    """
    return fill(
        f"ufm_{task}_user",
        profile=person.profile(limit),
        views=person.views,
        video=video_line(video, tags, limit),
        vision=vision,
        options=option_lines(task),
    )


def group_prompt(
    task: Task, name: str, profile: str, video: Video, *, vision: str = "", tags: bool = False, limit: int = 200
) -> str:
    """The question about a group (role G): its name and profile instead of a user and a history.

    `profile` may have many lines and any content: every line is quoted. The rest is as in `user_prompt`.
    """
    return fill(
        f"ufm_{task}_group",
        name=name,
        profile=block(profile),
        video=video_line(video, tags, limit),
        vision=vision,
        options=option_lines(task),
    )


def video_line(video: Video, tags: bool = False, limit: int = 200) -> str:
    """A video as one safe line of JSON: title, length and, where wanted or needed, topic tags."""
    length = None if video.duration_s is None else f"{video.duration_s:.0f} s"
    topics = video.tags if tags or not video.title else None
    return record({"title": video.title, "length": length, "tags": topics}, limit)
