"""The IF-VR data set as the rooms above see it: users, videos, targets, histories, splits, video files.

`IFVR` is the only reader of these tables. A history holds only records with the role `history`; what is to be predicted
(the targets' play rates, clicks, dislikes) comes from `targets` alone.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property

import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Part, Run
from gubs.data.partition import hashes, parts_of
from gubs.prompts.people import Person, Taste, View
from gubs.records import FAST_SKIP_BELOW, SCHEMAS, Role, Split, Task, User, Video

STAGE = "ifvr"
PROFILES = "profiles"
VIEW_COLUMNS = ["interaction_id", "user_id", "video_id", "timestamp", "play_rate", "clicked", "rating", "liked"]


class IFVR:
    """The artifact `ifvr` of a run; tables are read on first use, then kept."""

    def __init__(self, run: Run, stage: str = STAGE):
        """Opens the data set.

        Args:
            run: the run.
            stage: `ifvr`, or `raw` for the tables before filters and splits (users, videos and log only).

        Raises:
            ArtifactError: the run lacks this artifact.
        """
        self.run, self.artifact = run, run.artifact(stage)

    @property
    def uri(self) -> str:
        """URI of the artifact."""
        return self.artifact.uri

    @cached_property
    def users(self) -> Mapping[str, User]:
        """All users by id, in the order of the table; missing facts and tags are empty, never null."""
        return {u.user_id: u for u in User.from_table(self.artifact.table("users"))}

    @cached_property
    def videos(self) -> Mapping[str, Video]:
        """All videos by id, in the order of the table."""
        return {v.video_id: v for v in Video.from_table(self.artifact.table("videos"))}

    def log(self, columns: Sequence[str] | None = None, task: Task | None = None) -> pa.Table:
        """The interactions (schema `ifvr`) by task, user and time; only those of `task` if it is given."""
        if task is None:
            return self.artifact.table("interactions", columns)
        needed = None if columns is None else list({*columns, "task"})
        table = self.artifact.table("interactions", needed, task=str(task))
        table = table.filter(pc.equal(table["task"], str(task)))
        return table if columns is None else table.select(list(columns))

    def targets(self, task: Task, splits: Collection[Split] = tuple(Split)) -> pa.Table:
        """What is to be predicted: the targets of a task (schema `ifvr`) for the users of these splits."""
        wanted = pa.array([str(s) for s in splits], pa.string())
        pieces = []
        for piece in self.artifact.batches("interactions", wanted=lambda p: p.keys.get("task", task) == str(task)):
            target = pc.and_(pc.equal(piece["task"], str(task)), pc.equal(piece["role"], str(Role.TARGET)))
            pieces.append(piece.filter(pc.and_(target, pc.is_in(piece["split"], value_set=wanted))))
        return pa.concat_tables(pieces or [SCHEMAS["ifvr"].empty_table()])

    def history_log(self, user_ids: Iterable[str], columns: Sequence[str], task: Task | None = None) -> pa.Table:
        """The records of some users that a model may see, by task, user and time; reads the files of these users piece
        by piece, so that the memory needed is that of the result.
        """
        wanted = pa.array(sorted(set(user_ids)), pa.string())
        needed, schema = list(dict.fromkeys([*columns, "user_id", "role", "task"])), SCHEMAS["ifvr"]
        pieces = [pa.schema([schema.field(c) for c in columns]).empty_table()]
        for piece in self.artifact.batches("interactions", needed, _of_users(wanted, task)):
            mask = pc.and_(pc.is_in(piece["user_id"], value_set=wanted), pc.equal(piece["role"], str(Role.HISTORY)))
            if task is not None:
                mask = pc.and_(mask, pc.equal(piece["task"], str(task)))
            if pc.any(mask).as_py():
                pieces.append(piece.filter(mask).select(list(columns)))
        return pa.concat_tables(pieces)

    def user_batches(self) -> Iterator[list[User]]:
        """All users in the order of the table, in lists, without keeping them."""
        for piece in self.artifact.batches("users"):
            yield list(User.from_table(piece))

    def histories(self, user_ids: Iterable[str], task: Task | None = None) -> dict[str, tuple[View, ...]]:
        """The whole history of each user, oldest view first; users without one are left out.

        Args:
            user_ids: the users.
            task: only records of this task; None = both tasks.
        """
        rows = self.history_log(user_ids, VIEW_COLUMNS, task)
        histories = defaultdict[str, list[View]](list)
        for row in rows.to_pylist():
            user, video = row.pop("user_id"), self.videos[row.pop("video_id")]
            histories[user].append(View(video, **row))
        return {user: tuple(sorted(views, key=lambda v: v.timestamp or 0)) for user, views in histories.items()}

    def people(
        self, user_ids: Iterable[str] | None = None, task: Task | None = None, *, tastes: bool = False
    ) -> dict[str, Person]:
        """Users with their whole histories, in the order of the table of users; unknown ids are left out.

        Args:
            user_ids: the users; None = all.
            task: see `histories`.
            tastes: add what the stage `profiles` wrote about users who list no tags.
        """
        users = self.users if user_ids is None else self._some_users(set(user_ids))
        histories = self.histories(users, task)
        taste = self.tastes if tastes else {}
        return {u: Person(user, histories.get(u, ()), taste.get(u)) for u, user in users.items()}

    def _some_users(self, ids: set[str]) -> dict[str, User]:
        """These users in the order of the table; of many, only they become objects."""
        if "users" in self.__dict__:
            return {u: user for u, user in self.users.items() if u in ids}
        wanted = pa.array(sorted(ids), pa.string())
        pieces = (
            p.filter(pc.is_in(p["user_id"], value_set=wanted))
            for p in self.artifact.batches("users", None, _of_users(wanted))
        )
        return {u.user_id: u for piece in pieces for u in User.from_table(piece)}

    def split_users(self, task: Task, split: Split) -> list[str]:
        """Ids of the users of a split, per task, sorted."""
        table = self.user_splits
        rows = table.filter(pc.and_(pc.equal(table["task"], str(task)), pc.equal(table["split"], str(split))))
        return sorted(rows["user_id"].to_pylist())

    @cached_property
    def ugm_users(self) -> list[str]:
        """Ids of the training users that the UGM groups, sorted."""
        table = self.user_splits
        return sorted(set(table.filter(table["ugm"])["user_id"].to_pylist()))

    @cached_property
    def user_splits(self) -> pa.Table:
        """One row per user and task: user_id, task, split (null: held out of it), ugm, n_history, n_target."""
        return self.artifact.table("user_splits")

    @cached_property
    def video_files(self) -> dict[str, str]:
        """Path or URI of each video's file by video id; videos without a file are left out. A simulated app's videos
        are rendered later, so its tables do not name them.
        """
        if self.artifact.manifest.settings["source"]["kind"] == "synthetic" and self.run.has("videos"):
            rendered = self.run.artifact("videos")
            files = {row["video_id"]: rendered.path(row["file"]) for row in rendered.table("files").to_pylist()}
            return {v: files[v] for v in self.videos if v in files}
        return {v.video_id: v.uri for v in self.videos.values() if v.uri}

    @cached_property
    def tastes(self) -> dict[str, Taste]:
        """What the stage `profiles` wrote about users who list no tags, by user."""
        rows = self.run.artifact(PROFILES).table("profiles").to_pylist()
        return {r["user_id"]: Taste(r["text"], tuple(r["tags"]), r["until"]) for r in rows}


def _of_users(wanted: pa.Array, task: Task | None = None) -> Callable[[Part], bool]:
    """Whether a file of a table has rows of these users, and of the task."""

    @cache
    def numbers(parts: int) -> frozenset[int]:
        return frozenset(parts_of(hashes(wanted), parts).tolist())

    def has_some(part: Part) -> bool:
        number, parts = map(int, part.keys.get("users", "0/1").split("/"))
        of_task = task is None or part.keys.get("task", str(task)) == str(task)
        return of_task and number in numbers(parts)

    return has_some


def fast_skips(table: pa.Table) -> pa.Table:
    """The rows that are fast skips; rows without a play rate are left out."""
    return table.filter(pc.less(table["play_rate"], FAST_SKIP_BELOW))


def watched(table: pa.Table) -> pa.Table:
    """The rows that have a play rate and are not fast skips."""
    return table.filter(pc.greater_equal(table["play_rate"], FAST_SKIP_BELOW))
