"""Users as models get to know them: profile fields and the latest views of their history, as safe lines of text.

Only records with the role `history` are ever read here: what is to be predicted cannot get into a prompt.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Artifact
from gubs.prompts.fields import record
from gubs.records import Role, User

DERIVED_TAGS = 6
"""Interest tags taken from the history of a user who lists none."""
_LIKED_PLAY_RATE = 0.6


@dataclass(frozen=True)
class Person:
    """A user with a history."""

    user: User
    views: tuple[str, ...]
    """Latest views of the history, oldest first, one safe line of JSON each."""
    times: tuple[int | None, ...] = ()
    """When each view was; None where the source has an order but no times."""
    liked: tuple[tuple[int | None, tuple[str, ...]], ...] = ()
    """Time and tags of the videos that a user who lists no tags liked, clicked or watched for long, in all of the
    history: the tags shown are the most frequent of these."""

    @property
    def tags_derived(self) -> bool:
        """The tags are not the user's own but seen in the history."""
        return bool(self.liked)

    def before(self, time: int | None) -> "Person":
        """The person as known at a time: without later views, and without what they tell of the interests. Where there
        are no times, nothing is later.
        """
        if time is None or not self.times:
            return self
        known = [i for i, t in enumerate(self.times) if t is None or t < time]
        liked = tuple(view for view in self.liked if view[0] is None or view[0] < time)
        return Person(
            replace(self.user, tags=_most_frequent(liked)) if self.liked else self.user,
            tuple(self.views[i] for i in known),
            tuple(self.times[i] for i in known),
            liked,
        )

    def profile(self, limit: int = 200) -> str:
        """Profile fields as one safe line of JSON: u = [ID, Occ, Age, Gender, T]; unknown ones left out."""
        u = self.user
        tags = "interests seen in the history" if self.tags_derived else "interest tags"
        fields = {"age": u.age, "gender": u.gender, "occupation": u.occupation, **(u.other or {}), tags: u.tags}
        return record(fields, limit)


def load_people(ifvr: Artifact, user_ids: Collection[str], history_items: int, limit: int = 200) -> dict[str, Person]:
    """The users with their history, in the order of the table of users.

    Args:
        ifvr: the data set.
        user_ids: who is wanted; ids the data set does not have are left out.
        history_items: latest views to keep; 0 = all.
        limit: characters of a single field.
    """
    wanted = pa.array(sorted(user_ids), pa.string())
    table = ifvr.table("users")
    users = list(User.from_table(table.filter(pc.is_in(table["user_id"], value_set=wanted))))
    histories = dict(_histories(ifvr, wanted))
    return {u.user_id: _person(u, histories.get(u.user_id, []), history_items, limit) for u in users}


def view_line(row: dict[str, Any], limit: int = 200) -> str:
    """One view or exposure as a safe line: what was shown, and what the user did."""
    shown: dict[str, Any] = {"title": row["title"]} if row["title"] else {"tags": row["tags"]}
    if row["duration_s"] is not None:
        shown["length"] = f"{row['duration_s']:.0f} s"
    if row["rating"] is not None:
        shown["rating"] = f"{row['rating']:g} of 5"
    elif row["play_rate"] is not None:
        shown["played"] = f"{row['play_rate']:.0%}"
    elif row["clicked"] is not None:
        shown["clicked"] = "yes" if row["clicked"] else "no"
    return record(shown, limit)


def _histories(ifvr: Artifact, wanted: pa.Array) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    columns = ["user_id", "video_id", "timestamp", "play_rate", "clicked", "rating", "liked", "role"]
    log = ifvr.table("interactions", columns)
    mine = pc.and_(pc.is_in(log["user_id"], value_set=wanted), pc.equal(log["role"], str(Role.HISTORY)))
    rows = log.filter(mine).to_pylist()
    videos = ifvr.table("videos", ["video_id", "title", "duration_s", "tags"]).to_pylist()
    known = {v["video_id"]: v for v in videos}
    by_user: dict[str, list[dict[str, Any]]] = {}
    for row in rows:  # the table is in the order of time within a user and task
        by_user.setdefault(row["user_id"], []).append({**known[row["video_id"]], **row})
    for user, history in by_user.items():
        yield user, sorted(history, key=lambda r: r["timestamp"] or 0)


def _person(user: User, history: list[dict[str, Any]], history_items: int, limit: int) -> Person:
    latest = history[-history_items:]
    views, times = tuple(view_line(row, limit) for row in latest), tuple(row["timestamp"] for row in latest)
    if user.tags:
        return Person(user, views, times)
    liked = tuple((row["timestamp"], tuple(row["tags"])) for row in history if _liked(row) and row["tags"])
    return Person(replace(user, tags=_most_frequent(liked)), views, times, liked)


def _most_frequent(liked: Iterable[tuple[int | None, tuple[str, ...]]]) -> list[str]:
    counts = Counter(tag for _, tags in liked for tag in tags)
    return [tag for tag, _ in counts.most_common(DERIVED_TAGS)]


def _liked(row: dict[str, Any]) -> bool:
    if row["liked"] is not None:
        return bool(row["liked"])
    if row["play_rate"] is not None:
        return bool(row["play_rate"] >= _LIKED_PLAY_RATE)
    return bool(row["clicked"])
