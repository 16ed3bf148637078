"""Cases: single targets with all that may be shown around them, and nothing else.

A prompt about a target may show the user's profile, the user's history in the same task (the split makes sure that it
ends before the first target), and the video. Other targets, and later records of another task, are never read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.data.ifvr import IFVR
from gubs.prompts.people import Person
from gubs.prompts.question import video_line
from gubs.records import Interaction, Task, Video


@dataclass(frozen=True)
class Case:
    """One target, the person and the video."""

    target: Interaction
    split: str
    person: Person
    """With the views of the history that are shown."""
    video: Video

    def shown(self, limit: int) -> dict[str, Any]:
        """The fields that every question about the case shows."""
        return {
            "task": self.target.task,
            "profile": self.person.profile(limit),
            "views": self.person.views(limit),
            "video": video_line(self.video, tags=True, limit=limit),
        }

    def ids(self) -> dict[str, Any]:
        """The columns that say which target it is."""
        t = self.target
        names = {"interaction_id": t.interaction_id, "user_id": t.user_id, "video_id": t.video_id}
        return {**names, "task": t.task, "split": self.split}


def draw(table: pa.Table, count: int, seed: Sequence[int]) -> pa.Table:
    """`count` random rows in the table's order; all of them for 0."""
    if not count or table.num_rows <= count:
        return table
    picks = np.random.default_rng(seed).permutation(table.num_rows)[:count]
    return table.take(np.sort(picks))


def load_cases(ifvr: IFVR, rows: pa.Table, history_items: int, *, tastes: bool = False) -> list[Case]:
    """The cases of target rows of one task (columns of schema `ifvr`), in their order.

    Args:
        ifvr: the data set.
        rows: targets.
        history_items: latest views to show; 0 = all.
        tastes: see `IFVR.people`.
    """
    if not rows.num_rows:
        return []
    people = ifvr.people(rows["user_id"].to_pylist(), Task(rows["task"][0].as_py()), tastes=tastes)
    shown = {user: person.latest(history_items) for user, person in people.items()}
    return [
        Case(t, split, shown[t.user_id], ifvr.videos[t.video_id])
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
