"""Cases: single targets with everything that a prompt about them may show.

That is the user's profile, the user's history in the same task (the split ensures that it ends before the first
target), and the video. Other targets, and later records of another task, are never read.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gubs.data.ifvr import IFVR
from gubs.prompts.people import Person
from gubs.prompts.question import video_line
from gubs.records import FAST_SKIP_BELOW, Interaction, Task, Video


@dataclass(frozen=True)
class Case:
    """One target, the person and the video."""

    target: Interaction
    split: str
    person: Person
    """With those views of the history that are shown."""
    video: Video

    def prompt_fields(self, limit: int) -> dict[str, object]:
        """The fields that every question about the case shows."""
        return {
            "task": self.target.task,
            "profile": self.person.profile(limit),
            "views": self.person.views(limit),
            "video": video_line(self.video, tags=True, limit=limit),
        }

    def ids(self) -> dict[str, str]:
        """The columns that identify the target."""
        return target_ids(self.target, self.split)


def target_ids(target: Interaction, split: str) -> dict[str, str]:
    """The columns that identify a target."""
    ids = {"interaction_id": target.interaction_id, "user_id": target.user_id, "video_id": target.video_id}
    return {**ids, "task": target.task, "split": split}


def with_split(rows: pa.Table) -> Iterator[tuple[Interaction, str]]:
    """Each target (columns of schema `ifvr`) with its split."""
    return zip(Interaction.from_table(rows), rows["split"].to_pylist(), strict=True)


def draw(table: pa.Table, count: int, seed: Sequence[int]) -> pa.Table:
    """`count` random rows in the table's order; 0 = all rows."""
    if not count or table.num_rows <= count:
        return table
    picks = np.random.default_rng(seed).permutation(table.num_rows)[:count]
    return table.take(np.sort(picks))


def load_cases(ifvr: IFVR, rows: pa.Table, history_items: int, *, tastes: bool = False) -> list[Case]:
    """The cases of targets, in the order of the rows.

    Args:
        ifvr: the data set.
        rows: targets of one task (columns of schema `ifvr`).
        history_items: latest views to show; 0 = all.
        tastes: see `IFVR.people`.
    """
    if not rows.num_rows:
        return []
    people = ifvr.people(rows["user_id"].to_pylist(), Task(rows["task"][0].as_py()), tastes=tastes)
    recent = {user: person.latest(history_items) for user, person in people.items()}
    return [Case(t, split, recent[t.user_id], ifvr.videos[t.video_id]) for t, split in with_split(rows)]


def clicked(row: Interaction) -> bool | None:
    """The outcome of a click target; None if unknown. Rated items (A.7): liked or disliked; None for neither."""
    if row.rating is not None:
        return True if row.liked else False if row.disliked else None
    return row.clicked


def by_id(table: pa.Table, ids: Iterable[str]) -> pa.Table:
    """The rows with these interaction ids, in the order of the ids; unknown ids are left out."""
    position = {key: i for i, key in enumerate(table["interaction_id"].to_pylist())}
    return table.take(pa.array([position[i] for i in ids if i in position], pa.int64()))


def is_fast_skip(row: Interaction) -> bool:
    """Whether a view was a fast skip; not if its play rate is unknown."""
    return row.play_rate is not None and row.play_rate < FAST_SKIP_BELOW
