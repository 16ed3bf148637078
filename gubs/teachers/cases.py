"""Cases: single targets with all that may be shown around them, and nothing else.

A prompt about a target may show the user's profile, the user's history in the same task (the split makes sure that it
ends before the first target), and the video. Other targets, and later records of another task, are never read.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Artifact
from gubs.people import Person, load_people
from gubs.prompts.ufm import video_line
from gubs.records import FAST_SKIP_BELOW, Interaction, Role, Split, Task, User, Video


@dataclass(frozen=True)
class Case:
    """One target, the person and the video."""

    target: Interaction
    split: str
    person: Person
    video: Video
    history: tuple[str, ...]
    """Interaction ids of the person's views, oldest first."""

    def shown(self, limit: int) -> dict[str, Any]:
        """The fields that every question about the case shows."""
        return {
            "task": self.target.task,
            "profile": self.person.profile(limit),
            "views": self.person.views,
            "video": video_line(self.video, tags=True, limit=limit),
        }

    def ids(self) -> dict[str, Any]:
        """The columns that say which target it is."""
        t = self.target
        names = {"interaction_id": t.interaction_id, "user_id": t.user_id, "video_id": t.video_id}
        return {**names, "task": t.task, "split": self.split}


class OneTask(Artifact):
    """The data set as it would be with the interactions of one task only."""

    def __init__(self, ifvr: Artifact, task: Task):
        super().__init__(ifvr.run, ifvr.stage, ifvr.manifest)
        self.task = task

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads a table. Errors: see `Artifact.table`."""
        if name != "interactions":
            return super().table(name, columns)
        table = super().table(name)
        table = table.filter(pc.equal(table["task"], str(self.task)))
        return table if columns is None else table.select(list(columns))


def targets(ifvr: Artifact, task: Task, splits: Collection[Split]) -> pa.Table:
    """The targets of a task on some sides of the train/test border (schema `ifvr`)."""
    table = OneTask(ifvr, task).table("interactions")
    sides = pa.array([str(s) for s in splits], pa.string())
    return table.filter(pc.and_(pc.equal(table["role"], str(Role.TARGET)), pc.is_in(table["split"], value_set=sides)))


def fast_skips(table: pa.Table) -> pa.Table:
    """The rows that are fast skips; rows without a play rate are not."""
    return table.filter(pc.less(table["play_rate"], FAST_SKIP_BELOW))


def watched(table: pa.Table) -> pa.Table:
    """The rows with a play rate that is no fast skip."""
    return table.filter(pc.greater_equal(table["play_rate"], FAST_SKIP_BELOW))


def draw(table: pa.Table, count: int, seed: Sequence[int]) -> pa.Table:
    """`count` random rows in the table's order; all of them for 0."""
    if not count or table.num_rows <= count:
        return table
    picks = np.random.default_rng(seed).permutation(table.num_rows)[:count]
    return table.take(np.sort(picks))


def load_cases(ifvr: Artifact, rows: pa.Table, history_items: int, limit: int) -> list[Case]:
    """The cases of target rows of one task (columns of schema `ifvr`), in their order.

    Args:
        ifvr: the data set.
        rows: targets.
        history_items: latest views to show; 0 = all.
        limit: characters of a single field.
    """
    if not rows.num_rows:
        return []
    view = OneTask(ifvr, Task(rows["task"][0].as_py()))
    users = set(rows["user_id"].to_pylist())
    people = load_people(view, users, history_items, limit)
    history = _history_ids(view, users, history_items)
    shown = ifvr.table("videos")
    shown = shown.filter(pc.is_in(shown["video_id"], value_set=rows["video_id"].combine_chunks().unique()))
    videos = {v.video_id: v for v in map(whole_video, Video.from_table(shown))}
    return [
        Case(t, split, _whole(people[t.user_id]), videos[t.video_id], history.get(t.user_id, ()))
        for t, split in zip(Interaction.from_table(rows), rows["split"].to_pylist(), strict=True)
    ]


def clicked(row: Interaction) -> bool | None:
    """The outcome of a click target. Rated items (A.7): liked or disliked; None for what is neither or unknown."""
    if row.rating is not None:
        return True if row.liked else False if row.disliked else None
    return row.clicked


def by_id(table: pa.Table, ids: Iterable[str]) -> pa.Table:
    """The rows with these interaction ids, in the order of the ids; unknown ids are left out."""
    place = {key: i for i, key in enumerate(table["interaction_id"].to_pylist())}
    return table.take(pa.array([place[i] for i in ids if i in place], pa.int64()))


def _history_ids(view: OneTask, users: Collection[str], history_items: int) -> dict[str, tuple[str, ...]]:
    """Ids of the views that `load_people` shows, by user; the same order, the same cut."""
    log = view.table("interactions", ["interaction_id", "user_id", "timestamp", "role"])
    wanted = pc.is_in(log["user_id"], value_set=pa.array(sorted(users), pa.string()))
    found: dict[str, list[tuple[int, str]]] = {}
    for row in log.filter(pc.and_(wanted, pc.equal(log["role"], str(Role.HISTORY)))).to_pylist():
        found.setdefault(row["user_id"], []).append((row["timestamp"] or 0, row["interaction_id"]))
    return {
        user: tuple(key for _, key in sorted(views, key=lambda v: v[0])[-history_items:])
        for user, views in found.items()
    }


def whole_user(user: User) -> User:
    """The user with nothing instead of null, which tables may hold for maps and lists."""
    return replace(user, other=user.other or {}, tags=user.tags or [])


def whole_video(video: Video) -> Video:
    """The same for a video."""
    return replace(video, tags=video.tags or [])


def _whole(person: Person) -> Person:
    return replace(person, user=whole_user(person.user))
