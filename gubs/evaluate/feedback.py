"""Who chose what: the records of a data set as arrays of numbers, which protocols and baselines work on.

A pair of user and item counts once, at its first record. A user's pairs have a place: by time where times are known,
else in the order of the log; of a user with both kinds, records without a time are set aside. Equal times keep the
order of the log; `tied_users` counts whom that decides for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
UNTIMED = -1
"""Time of a record whose time is unknown."""
IN_ORDER = frozenset({"amazon", "microlens"})
"""Kinds of source that have each user's records in the order of time, with times or without."""


@dataclass(frozen=True)
class Feedback:
    """Pairs of user and item, sorted by user and place; [N] each."""

    users: tuple[str, ...]
    """Ids by number, sorted."""
    items: tuple[str, ...]
    """Ids by number, sorted; also of items that nobody chose."""
    user: Ints
    item: Ints
    rating: Floats
    """Stars; NaN if unknown."""
    time: Ints
    """Milliseconds since 1970, or `UNTIMED`."""
    liked: Bools
    """Known to have liked it (4 stars and more)."""
    disliked: Bools
    """Known to have disliked it (2 stars and less)."""
    part: npt.NDArray[np.str_]
    """Part of the data (`train`, `valid`, `test`) if the source comes divided; else empty."""
    ordered: bool = False
    """Whether the source says that its log is in the order of time, where it has no times."""
    without_place: int = 0
    """Records that were set aside: they have no time, and other records of their user have one."""

    def __len__(self) -> int:
        return len(self.user)

    @property
    def timed(self) -> bool:
        """Whether every record has a time."""
        return bool((self.time != UNTIMED).all())

    @cached_property
    def starts(self) -> Ints:
        """First row of each user, and the number of rows; [U + 1]."""
        return np.searchsorted(self.user, np.arange(len(self.users) + 1))

    @cached_property
    def tied_users(self) -> int:
        """Users whose last time is that of another of their records too."""
        later = np.flatnonzero(self.user[1:] == self.user[:-1])
        tied = later[(self.time[later] == self.time[later + 1]) & (self.time[later] != UNTIMED)]
        last = np.append(self.user[1:] != self.user[:-1], True)
        return int(last[tied + 1].sum())

    def rows_of(self, user: int) -> slice:
        """The user's rows."""
        return slice(int(self.starts[user]), int(self.starts[user + 1]))

    def matrix(self, values: Floats | None = None) -> sparse.csr_array:
        """Users x items with `values` (default: 1 per record)."""
        data = np.ones(len(self)) if values is None else values
        return sparse.csr_array((data, (self.user, self.item)), shape=(len(self.users), len(self.items)))

    def without(self, dropped: Bools) -> "Feedback":
        """The records that `dropped` does not name; users and items keep their numbers."""
        kept = ~dropped
        names = ("user", "item", "rating", "time", "liked", "disliked", "part")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})


def from_tables(
    interactions: pa.Table, items: Sequence[str], parts: pa.Table | None = None, *, ordered: bool = False
) -> Feedback:
    """Reads the records in which something was chosen (clicked).

    Args:
        interactions: schema `interactions`.
        items: ids of all items of the data set.
        parts: interaction_id and part, of a source that comes divided.
        ordered: the log is in the order of time where it has no times.
    """
    columns = ["interaction_id", "user_id", "video_id", "timestamp", "rating", "liked", "disliked"]
    chosen = pc.fill_null(interactions["clicked"], False)
    frame = interactions.filter(chosen).select(columns).to_pandas()
    frame["timestamp"] = frame["timestamp"].astype("Int64").fillna(UNTIMED).astype("int64")
    frame["part"] = ""
    if parts is not None:
        frame["part"] = frame["interaction_id"].map(parts.to_pandas().set_index("interaction_id")["part"]).fillna("")
    untimed = frame["timestamp"] == UNTIMED
    without_place = untimed & ~untimed.groupby(frame["user_id"]).transform("all")
    frame = frame[~without_place].sort_values(["user_id", "timestamp"], kind="stable", ignore_index=True)
    frame = frame.drop_duplicates(["user_id", "video_id"], ignore_index=True)
    all_items = pd.Index(sorted({*items, *frame["video_id"].unique()}))
    users, codes = np.unique(frame["user_id"].to_numpy(dtype=str), return_inverse=True)
    return Feedback(
        users=tuple(users.tolist()),
        items=tuple(all_items.tolist()),
        user=codes.astype(np.int64),
        item=all_items.get_indexer(pd.Index(frame["video_id"])).astype(np.int64),
        rating=frame["rating"].to_numpy(dtype=np.float64, na_value=np.nan),
        time=frame["timestamp"].to_numpy(dtype=np.int64),
        liked=frame["liked"].eq(True).to_numpy(dtype=bool),
        disliked=frame["disliked"].eq(True).to_numpy(dtype=bool),
        part=frame["part"].to_numpy(dtype=str),
        ordered=ordered,
        without_place=int(without_place.sum()),
    )
