"""The UFM's prompts: person, video and clip in, prompt out. Pure: neither a run nor a model is needed."""

from dataclasses import dataclass
from typing import Any

from gubs.prompts.people import Person
from gubs.prompts.question import group_prompt, user_prompt
from gubs.records import GroupProfile, Task, Video
from gubs.ufm.inputs import VISION_MARK, Prompt
from gubs.ufm.settings import InputSettings
from gubs.video.clips import Clip


@dataclass(frozen=True)
class PromptBuilder:
    """Says what a prompt shows."""

    settings: InputSettings
    pictures: bool
    """The data set has videos with frames; a source without any shows topic tags instead."""

    def about_user(self, task: Task, person: Person, video: Video, clip: Clip | None) -> Prompt:
        """The prompt of the roles T and S, and of inference: a user's profile and latest views, and the video."""
        shown = person.latest(self.settings.history_items)
        return Prompt(user_prompt(task, shown, video, **self._shown(clip)), clip)

    def about_group(self, task: Task, group: GroupProfile, video: Video, clip: Clip | None) -> Prompt:
        """The prompt of the role G: the group's profile, no user and no history."""
        text = group_prompt(
            task, group.name, group.text, video, profile_limit=self.settings.profile_chars, **self._shown(clip)
        )
        return Prompt(text, clip)

    def _shown(self, clip: Clip | None) -> dict[str, Any]:
        return {
            "vision": VISION_MARK if clip else "",
            "tags": not self.pictures,
            "limit": self.settings.max_text,
            "style": self.settings.style,
        }
