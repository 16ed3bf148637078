"""The UFM's prompts: person, video and clip in, prompt out. Pure: neither a run nor a model is needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gubs.prompts.people import Person
from gubs.prompts.question import group_prompt, user_prompt
from gubs.records import GroupProfile, Option, Task, Video
from gubs.ufm.inputs import VISION_MARK, Prompt
from gubs.ufm.settings import InputSettings
from gubs.video.clips import Clip


@dataclass(frozen=True)
class PromptBuilder:
    """Decides what prompts show."""

    settings: InputSettings
    pictures: bool
    """The data set has videos with frames; a source without any shows topic tags instead."""

    def about_user(
        self, task: Task, person: Person, video: Video, clip: Clip | None, order: Sequence[Option] = ()
    ) -> Prompt:
        """The prompt of the roles T and S, and of inference: a user's profile and latest views, and the video.

        `order`: see `user_prompt`; training never changes it.
        """
        recent = person.latest(self.settings.history_items)
        digest = recent.tally.digest(video) if self.settings.digest else ""
        text = user_prompt(task, recent, video, **self._options(clip), order=order, digest=digest)
        return Prompt(text, clip)

    def about_group(self, task: Task, group: GroupProfile, video: Video, clip: Clip | None) -> Prompt:
        """The prompt of the role G: the group's profile, no user and no history."""
        options = {"profile_limit": self.settings.profile_chars, **self._options(clip)}
        return Prompt(group_prompt(task, group.name, group.text, video, **options), clip)

    def _options(self, clip: Clip | None) -> dict[str, Any]:
        vision, limit = VISION_MARK if clip else "", self.settings.max_text
        return {"vision": vision, "tags": not self.pictures, "limit": limit, "style": self.settings.style}
