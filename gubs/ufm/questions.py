"""The questions of a run: targets with their gold options, and prompts about a user, a similar user or a group.

Prompts are made on demand. They show the user's profile, views with the role `history`, and the video; never the target
itself (play rate, click, dislike), later records, gold options or true causes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow.compute as pc

from gubs.artifacts import Run
from gubs.data.ifvr import IFVR, PROFILES
from gubs.errors import ArtifactError
from gubs.prompts.people import Person
from gubs.records import FAST_SKIP_BELOW, GroupProfile, Option, Split, Task
from gubs.teachers.annotations import all_labels
from gubs.teachers.reasons import UNMEANT
from gubs.teachers.script import GUESS
from gubs.ufm.held_out import HeldOut
from gubs.ufm.inputs import Prompt
from gubs.ufm.prompting import PromptBuilder
from gubs.ufm.settings import GRPOSettings, InputSettings
from gubs.video.clips import Clip, StoredFrames
from gubs.video.decoded import DecodeOptions

SKIP = "skip"
"""Stands for the gold option of a skip whose reason is unknown."""
_FACTS = ("interaction_id", "user_id", "video_id", "timestamp", "play_rate", "clicked")
UGM, ORACLE = "ugm", "oracle"
"""Stages that make groups."""


@dataclass(frozen=True, slots=True)
class Item:
    """One target with its gold option."""

    interaction_id: str
    user_id: str
    video_id: str
    task: Task
    gold: Option | None
    """None: a skip whose reason is unknown."""
    label_source: str
    timestamp: int | None = None
    """None if the source has an order but no times."""
    play_rate: float | None = None
    clicked: bool | None = None
    reasons_known: bool = True
    """False: the skips that it is trained or judged with are only known to be skips; the reason is unknown for all."""

    @property
    def outcome(self) -> str:
        """The gold option; `skip` if it is unknown."""
        return str(self.gold or SKIP)


class Questions:
    """Reads the artifacts of a run: `ifvr`, `labels`, and `frames`, `profiles` and `ugm` if it has them."""

    def __init__(self, run: Run, inputs: InputSettings, *, tastes: bool | None = None, groups: str = UGM):
        """Opens the data set.

        Args:
            run: the run.
            inputs: what prompts show.
            tastes: show what the stage `profiles` wrote; None = if the run has it.
            groups: the stage that made the groups.

        Raises:
            ArtifactError: the run has no data set.
        """
        self.run, self.ifvr, self.inputs = run, IFVR(run), inputs
        self._tastes = run.has(PROFILES) if tastes is None else tastes
        self._groups = groups
        self._frames = StoredFrames.of(run)
        self._people: dict[Task, dict[str, Person]] = {}

    @cached_property
    def prompts(self) -> PromptBuilder:
        """Builds the prompts of this run."""
        return PromptBuilder(self.inputs, self.pictures)

    @property
    def pictures(self) -> bool:
        """Whether the data set has any video with frames."""
        return bool(self._frames.hashes)

    @property
    def largest(self) -> DecodeOptions | None:
        """What bounds the clips; None if there are none."""
        return self._frames.store.options if self.pictures else None

    def items(self, task: Task, split: Split, *, unexplained: bool = False) -> list[Item]:
        """The targets of a task that have a gold option, in the order of the data set; without those that nobody meant
        (`teachers.test_labels`).

        Args:
            task: of the targets.
            split: of the users.
            unexplained: also skips without one.

        Raises:
            ArtifactError: the run has no labels.
        """
        items = []
        for row in self.ifvr.targets(task, [split]).to_pylist():
            gold, source = self._golds.get(row["interaction_id"], (None, ""))
            if source == UNMEANT:
                continue
            gold = None if source == GUESS else gold
            skipped = task == Task.SEQUENTIAL and row["play_rate"] is not None and row["play_rate"] < FAST_SKIP_BELOW
            if gold or (unexplained and skipped):
                facts = {k: row[k] for k in _FACTS}
                items.append(Item(**facts, task=task, gold=gold, label_source=source))
        return items

    def outcomes(self, task: Task, split: Split) -> list[Item]:
        """The targets of a task to learn from or to judge: those with a gold option. Where no skip has a reason (logs
        without a teacher), those whose outcome is known: then only skip or not counts.

        Raises:
            ArtifactError: the run has no labels.
        """
        items = self.items(task, split)
        if task == Task.CLICK or any(i.gold != Option.A for i in items):
            return items
        return [replace(i, reasons_known=False) for i in self.items(task, split, unexplained=True)]

    def training_outcomes(self, task: Task, held_out: HeldOut) -> list[Item]:
        """`outcomes` of the training users that are not held out."""
        return [i for i in self.outcomes(task, Split.TRAIN) if i.user_id not in held_out]

    def about_user(self, task: Task, user_id: str, video_id: str, before: int | None = None) -> Prompt:
        """The prompt of the roles T and S.

        Args:
            task: of the question.
            user_id: whose profile and history it shows.
            video_id: what it asks about.
            before: only views before this time are shown. A user's own history ends before the first target; that of a
                similar user may not.
        """
        person = self.people(task)[user_id].before(before)
        return self.prompts.about_user(task, person, self.ifvr.videos[video_id], self.clip(task, video_id))

    def about_group(self, task: Task, group_id: str, video_id: str) -> Prompt:
        """The prompt of the role G."""
        group = self.groups[group_id]
        return self.prompts.about_group(task, group, self.ifvr.videos[video_id], self.clip(task, video_id))

    def clip(self, task: Task, video_id: str) -> Clip | None:
        """The video's frames (sequential task) or cover (click task); None if there is none, or prompts show none."""
        if not self.inputs.vision:
            return None
        return self._frames.cover(video_id) if task == Task.CLICK else self._frames.clip(video_id)

    def people(self, task: Task) -> Mapping[str, Person]:
        """Everybody who takes part in a task, with their whole history in it."""
        if task not in self._people:
            users = pc.unique(self.ifvr.log(["user_id"], task)["user_id"]).to_pylist()
            self._people[task] = self.ifvr.people(users, task, tastes=self._tastes)
        return self._people[task]

    @cached_property
    def groups(self) -> dict[str, GroupProfile]:
        """Groups that have a profile, by id; none before the UGM has run."""
        if not self.run.has(self._groups):
            return {}
        groups = GroupProfile.from_table(self.run.artifact(self._groups).table("groups"))
        return {g.group_id: g for g in groups if g.final_profile or g.initial_profile}

    @cached_property
    def memberships(self) -> dict[str, list[str]]:
        """User -> ids of the user's groups that have a profile."""
        groups_of: dict[str, list[str]] = {}
        if self.groups:
            table = self.run.artifact(self._groups).table("memberships", ["user_id", "group_id"])
            for user, group in zip(table["user_id"].to_pylist(), table["group_id"].to_pylist(), strict=True):
                if group in self.groups:
                    groups_of.setdefault(user, []).append(group)
        return groups_of

    def members(self, task: Task) -> dict[str, list[str]]:
        """Group -> its members among the training users of a task; similar users are drawn from them."""
        members: dict[str, list[str]] = {}
        for user in self.ifvr.split_users(task, Split.TRAIN):
            for group in self.memberships.get(user, []):
                members.setdefault(group, []).append(user)
        return members

    @cached_property
    def _golds(self) -> dict[str, tuple[Option, str]]:
        table = all_labels(self.run).select(["interaction_id", "option", "label_source"])
        return {r["interaction_id"]: (Option(r["option"]), r["label_source"]) for r in table.to_pylist()}


def groups_of(grpo: GRPOSettings) -> str:
    """The stage whose groups a training shows."""
    return ORACLE if grpo.profiles == "oracle" else UGM


def trainable_tasks(questions: Questions, wanted: Collection[Task]) -> list[Task]:
    """The wanted tasks that have training targets.

    Raises:
        ArtifactError: it has none of them.
    """
    tasks = [t for t in Task if t in wanted and questions.ifvr.targets(t, [Split.TRAIN]).num_rows]
    if not tasks:
        raise ArtifactError(f"{questions.ifvr.uri} has no training targets for {', '.join(wanted)}: see ufm.grpo.tasks")
    return tasks
