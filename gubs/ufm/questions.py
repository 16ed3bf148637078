"""The questions of a run: targets with their gold options, and the prompts about a user, a similar user or a group.

Prompts are made when they are asked for. They show the user's profile, views with the role `history`, and the video;
the target itself (play rate, click, dislike), later records, gold options and true causes are never read for them.
"""

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Artifact, Run
from gubs.config import FrameSettings, Settings
from gubs.data.decoded import DecodeOptions
from gubs.data.frame_store import FrameStore
from gubs.errors import ArtifactError
from gubs.people import Person, load_people
from gubs.prompts.ufm import group_prompt, user_prompt
from gubs.records import FAST_SKIP_BELOW, GroupProfile, Option, Role, Split, Task, Video
from gubs.teachers.annotations import all_labels
from gubs.teachers.cases import OneTask, targets, whole_user, whole_video
from gubs.ufm.inputs import VISION_MARK, Clip, Prompt

_FACTS = ("interaction_id", "user_id", "video_id", "timestamp", "play_rate", "clicked")
_CLIPS = 1024
"""Decoded clips kept in memory."""


@dataclass(frozen=True, slots=True)
class Item:
    """One target with its gold option."""

    interaction_id: str
    user_id: str
    video_id: str
    task: Task
    gold: Option | None
    """None: a skip whose reason nobody knows; never in training."""
    label_source: str
    timestamp: int | None = None
    """When it was; None where the source has an order but no times."""
    play_rate: float | None = None
    clicked: bool | None = None


class Questions:
    """Opens the artifacts of a run: `ifvr`, `labels`, and where they are there `frames` and `ugm`."""

    def __init__(self, run: Run, settings: Settings):
        """Reads the tables that all prompts need.

        Raises:
            ArtifactError: the run has no data set.
        """
        self.run, self.inputs = run, settings.ufm.inputs
        self.ifvr = run.artifact("ifvr")
        self._videos = {v.video_id: v for v in map(whole_video, Video.from_table(self.ifvr.table("videos")))}
        self._people: dict[Task, dict[str, Person]] = {}
        self._hashes = self._content_hashes() if self.inputs.vision else {}
        self._clip = lru_cache(_CLIPS)(self._load_clip)

    def fingerprints(self) -> dict[str, str]:
        """Identity of every artifact that questions and golds come from."""
        names = [n for n in ("ifvr", "labels", "annotations", "frames", "ugm") if n in self.run.stages()]
        return {n: self.run.artifact(n).fingerprint for n in names}

    def items(self, task: Task, split: Split, *, unexplained: bool = False) -> list[Item]:
        """The targets of a task that have a gold option, in the order of the data set.

        Args:
            task: of the targets.
            split: of the users.
            unexplained: also skips that have none.

        Raises:
            ArtifactError: the run has no labels.
        """
        golds = self._golds
        found = []
        for row in targets(self.ifvr, task, [split]).to_pylist():
            gold, source = golds.get(row["interaction_id"], (None, ""))
            skipped = task == Task.SEQUENTIAL and row["play_rate"] is not None and row["play_rate"] < FAST_SKIP_BELOW
            if gold or (unexplained and skipped):
                facts = {k: row[k] for k in _FACTS}
                found.append(Item(**facts, task=task, gold=gold, label_source=source))
        return found

    def about_user(self, task: Task, user_id: str, video_id: str, before: int | None = None) -> Prompt:
        """The prompt of the roles T and S: this user's profile and history.

        Args:
            task: of the question.
            user_id: whom it shows.
            video_id: what it asks about.
            before: views from this time on are left out. A user's own history ends before the first target, but that
                of a similar user need not.
        """
        clip, person = self.clip(task, video_id), self.people(task)[user_id].before(before)
        return Prompt(user_prompt(task, person, self._videos[video_id], **self._shown(clip)), clip)

    def about_group(self, task: Task, group_id: str, video_id: str) -> Prompt:
        """The prompt of the role G: the group's profile, no user and no history."""
        clip = self.clip(task, video_id)
        group, shown = self.groups[group_id], self._shown(clip)
        profile = group.final_profile or group.initial_profile or group.features
        video = self._videos[video_id]
        text = group_prompt(task, group.name, profile, video, profile_limit=self.inputs.profile_chars, **shown)
        return Prompt(text, clip)

    def clip(self, task: Task, video_id: str) -> Clip | None:
        """The video's frames (sequential task) or its cover (click task); None where there are no pictures."""
        key = self._hashes.get(video_id)
        return self._clip(key, task == Task.CLICK) if key else None

    def people(self, task: Task) -> Mapping[str, Person]:
        """Everybody who takes part in a task, with the latest views of their history in it."""
        if task not in self._people:
            view = OneTask(self.ifvr, task)
            users = pc.unique(view.table("interactions", ["user_id"])["user_id"]).to_pylist()
            found = load_people(view, users, self.inputs.history_items, self.inputs.max_text)
            self._people[task] = {u: replace(p, user=whole_user(p.user)) for u, p in found.items()}
        return self._people[task]

    @cached_property
    def groups(self) -> dict[str, GroupProfile]:
        """Groups that have a profile, by id; none before the UGM has run."""
        if "ugm" not in self.run.stages():
            return {}
        groups = GroupProfile.from_table(self.run.artifact("ugm").table("groups"))
        return {g.group_id: g for g in groups if g.final_profile or g.initial_profile}

    @cached_property
    def memberships(self) -> dict[str, list[str]]:
        """User -> ids of the groups with a profile that the user is in."""
        found: dict[str, list[str]] = {}
        if self.groups:
            table = self.run.artifact("ugm").table("memberships", ["user_id", "group_id"])
            for user, group in zip(table["user_id"].to_pylist(), table["group_id"].to_pylist(), strict=True):
                if group in self.groups:
                    found.setdefault(user, []).append(group)
        return found

    def members(self, task: Task) -> dict[str, list[str]]:
        """Group -> its members among the training users of a task: whom a similar user is drawn from."""
        splits = self.ifvr.table("user_splits", ["user_id", "task", "split"])
        train = pc.and_(pc.equal(splits["task"], str(task)), pc.equal(splits["split"], str(Split.TRAIN)))
        found: dict[str, list[str]] = {}
        for user in sorted(splits.filter(train)["user_id"].to_pylist()):
            for group in self.memberships.get(user, []):
                found.setdefault(group, []).append(user)
        return found

    @cached_property
    def pictures(self) -> bool:
        """Whether the data set has any usable video; sources without show topic tags instead."""
        return bool(self._content_hashes())

    @cached_property
    def _golds(self) -> dict[str, tuple[Option, str]]:
        table = all_labels(self.run).select(["interaction_id", "option", "label_source"])
        return {r["interaction_id"]: (Option(r["option"]), r["label_source"]) for r in table.to_pylist()}

    def _shown(self, clip: Clip | None) -> dict[str, Any]:
        return {
            "vision": VISION_MARK if clip else "",
            "tags": not self.pictures,
            "limit": self.inputs.max_text,
            "style": self.inputs.style,
        }

    def _content_hashes(self) -> dict[str, str]:
        """Video -> content hash, for videos with frames."""
        if "frames" not in self.run.stages():
            return {}
        table = self.run.artifact("frames").table("frames", ["video_id", "content_hash", "frames"])
        table = table.filter(pc.greater(pc.fill_null(table["frames"], 0), 0))
        return dict(zip(table["video_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True))

    @cached_property
    def _store(self) -> FrameStore:
        manifest = self.run.artifact("frames").manifest
        return FrameStore(manifest.info["store_uri"], DecodeOptions.of(FrameSettings(**manifest.settings["frames"])))

    def _load_clip(self, content_hash: str, cover: bool) -> Clip:
        columns = ["cover"] if cover else ["frames", "duration_s"]
        row = self._store.lookup([content_hash], columns).to_pylist()[0]
        if cover:
            return Clip(f"{content_hash}-cover", _pixels([row["cover"]]))
        return Clip(content_hash, _pixels(row["frames"]), float(row["duration_s"] or 0.0))


def known_tasks(questions: Questions, wanted: Collection[Task]) -> list[Task]:
    """Those of the wanted tasks that the data set has training targets of.

    Raises:
        ArtifactError: it has none of them.
    """
    found = [t for t in Task if t in wanted and _has_targets(questions.ifvr, t)]
    if not found:
        raise ArtifactError(
            f"{questions.ifvr.uri} has no training targets of the task(s) {', '.join(wanted)}: see ufm.grpo.tasks"
        )
    return found


def _has_targets(ifvr: Artifact, task: Task) -> bool:
    table: pa.Table = ifvr.table("interactions", ["task", "split", "role"])
    wanted = pc.and_(pc.equal(table["task"], str(task)), pc.equal(table["role"], str(Role.TARGET)))
    return bool(pc.any(pc.and_(wanted, pc.equal(table["split"], str(Split.TRAIN)))).as_py())


def _pixels(pictures: list[bytes]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(p)).convert("RGB")) for p in pictures])
