"""Splits users into train and test and their records into history and targets, and checks that nothing leaks.

Plain functions over tables: no Ray, no files. The rules (paper, A.3 and A.6): per task, some users are test users and
the others train; the first half of a user's records (sequential) or all but the last few (click) are history, the rest
are targets. A page is never divided: its clicks would give away the rest of it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from gubs.data.settings import SplitSettings
from gubs.errors import InputError
from gubs.records import SCHEMAS, Role, Split, Task

Ints = npt.NDArray[np.int64]
_NOWHERE = np.iinfo(np.int64).max
_NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype(), pa.bool_(): pd.BooleanDtype()}
"""Without these, pandas turns nullable integers into floats (which lose digits of a timestamp) and booleans into
objects."""


@dataclass
class SplitResult:
    """The interactions with `split` and `role`, and the users of each split."""

    interactions: pa.Table
    """Schema `ifvr`; sorted by task, user and time."""
    users: pa.Table
    """One row per user and task: user_id, task, split (null: held out), ugm, n_history, n_target."""
    report: dict[str, Any] = field(default_factory=dict)


def split(interactions: pa.Table, settings: SplitSettings, seed: int) -> SplitResult:
    """Splits users into train and test, and each user's records into history and targets.

    Records are in order of time, or in the order of the log if none of a user's records has a time. If only some have
    one, the others are set aside, since their place is unknown.

    A user with too few records for a task (fewer than `min_history` and one target) is left out of that task. A test
    user of one task is never a training user of the other: if the other task has enough test users already, the user
    is held out of it (split null).

    Args:
        interactions: schema `interactions`, filtered.
        settings: sizes.
        seed: draws the users; the same seed and users give the same split.
    """
    frame, untimed = _in_order(interactions)
    long_enough = _assign_roles(frame, settings)
    dropped = frame.loc[~long_enough]
    frame = frame.loc[long_enough]
    splits = _draw_test_users(frame, settings, seed)
    ugm = _draw_ugm_users(splits, settings, seed)
    frame = frame.merge(splits, on=["user_id", "task"], how="left")
    users = _user_table(frame, ugm)
    table = pa.Table.from_pandas(frame[SCHEMAS["ifvr"].names], schema=SCHEMAS["ifvr"], preserve_index=False)
    result = SplitResult(table.replace_schema_metadata(), users)
    result.report = _report(result, dropped, settings) | {"set_aside": {"no_time": untimed}}
    check_no_leak(result)
    return result


def check_no_leak(result: SplitResult) -> None:
    """Checks that no target is in a history, before a history record or on a page with one, and that no test user is
    in train or UGM.

    Raises:
        InputError: a rule is broken (by a bug, or because tables were changed by hand).
    """
    columns = ["interaction_id", "user_id", "task", "timestamp", "page_id", "role"]
    frame = result.interactions.select(columns).to_pandas()
    target = frame["role"] == str(Role.TARGET)
    both = set(frame.loc[target, "interaction_id"]) & set(frame.loc[~target, "interaction_id"])
    if both:
        raise InputError(f"{len(both)} targets are in a history too, for example {min(both)}")
    key = [frame["user_id"], frame["task"]]
    last_seen = frame["timestamp"].where(~target).groupby(key).transform("max")
    early = frame.loc[target & (frame["timestamp"] < last_seen)]
    if len(early):
        first = early["interaction_id"].iloc[0]
        raise InputError(f"{len(early)} targets lie before a history record, for example {first}")
    pages = frame.assign(target=target).dropna(subset="page_id").groupby(["user_id", "task", "page_id"])["target"]
    roles = pages.nunique()
    divided = roles.index[roles > 1]
    if len(divided):
        user, _, page = divided[0]
        raise InputError(f"{len(divided)} pages have both history and targets, for example page {page} of user {user}")
    users = result.users.to_pandas()
    test = set(users.loc[users["split"] == str(Split.TEST), "user_id"])
    for name, others in (("train", users["split"] == str(Split.TRAIN)), ("UGM", users["ugm"])):
        shared = test & set(users.loc[others, "user_id"])
        if shared:
            raise InputError(f"{len(shared)} test users are {name} users too, for example {min(shared)}")


def _in_order(interactions: pa.Table) -> tuple[pd.DataFrame, int]:
    """Records by task, user and time (without times: in the order of the log), and how many were set aside."""
    frame = interactions.to_pandas(types_mapper=_NULLABLE.get)
    frame["_row"] = np.arange(len(frame))
    timed = frame["timestamp"].notna()
    set_aside = timed.groupby(frame["user_id"]).transform("any") & ~timed
    frame = frame.loc[~set_aside]
    frame = frame.assign(_time=frame["timestamp"].fillna(-1))
    ordered = frame.sort_values(["task", "user_id", "_time", "_row"], kind="stable", ignore_index=True)
    return ordered, int(set_aside.sum())


def _assign_roles(frame: pd.DataFrame, settings: SplitSettings) -> "pd.Series[bool]":
    """Sets `role` in place; returns a mask of the rows whose users have enough records."""
    groups = frame.groupby(["task", "user_id"], sort=False)
    place, total = groups.cumcount().to_numpy(), groups["_row"].transform("size").to_numpy()
    history = np.where(frame["task"] == str(Task.SEQUENTIAL), total // 2, _page_borders(frame, place, total, settings))
    frame["role"] = np.where(place < history, str(Role.HISTORY), str(Role.TARGET))
    return pd.Series((history >= settings.min_history) & (history < total), index=frame.index)


def _page_borders(frame: pd.DataFrame, place: Ints, total: Ints, settings: SplitSettings) -> Ints:
    """For each row, how many of the user's records are history, so that no page has records on both sides.

    Of the borders between pages that leave a long enough history, takes the one whose number of targets is closest to
    `click_targets` (of two, the earlier); 0 if there is none.
    """
    user = frame.groupby(["task", "user_id"], sort=False).ngroup().to_numpy()
    page = frame.groupby(["task", "user_id", "page_id"], sort=False, dropna=False).ngroup().to_numpy()
    page = np.where(frame["page_id"].isna(), -1 - np.arange(len(frame)), page)  # no page: a page by itself
    page_end = pd.Series(place).groupby(page, sort=False).transform("max")
    open_until = page_end.groupby(user, sort=False).cummax().to_numpy()
    border = (open_until == place) & (place + 1 >= settings.min_history)  # every page that began has ended
    ideal = total - settings.click_targets
    before = _per_user(user, np.where(border & (place + 1 <= ideal), place + 1, 0), "max")
    after = _per_user(user, np.where(border & (place + 1 > ideal) & (place + 1 < total), place + 1, _NOWHERE), "min")
    earlier = (before > 0) & ((after == _NOWHERE) | (ideal - before <= after - ideal))
    return np.where(earlier, before, np.where(after < _NOWHERE, after, 0))


def _per_user(users: Ints, values: Ints, statistic: str) -> Ints:
    return pd.Series(values).groupby(users, sort=False).transform(statistic).to_numpy()


def _draw_test_users(frame: pd.DataFrame, settings: SplitSettings, seed: int) -> pd.DataFrame:
    """One row per user and task with the `split`."""
    pairs = frame[["user_id", "task"]].drop_duplicates().sort_values(["user_id", "task"], ignore_index=True)
    tasks_of = pairs.groupby("user_id")["task"].apply(list)
    room = {task: min(settings.test_users, n // 2) for task, n in pairs["task"].value_counts().items()}
    tested: set[tuple[str, str]] = set()
    test_users: set[str] = set()
    order = np.random.default_rng([seed, 1]).permutation(tasks_of.index.to_numpy())
    for complete in (True, False):  # first users for whom all their tasks have room, then any who fill a gap
        for user in order:
            free = [t for t in tasks_of[user] if room[t] > 0]
            if user in test_users or not free or (complete and len(free) < len(tasks_of[user])):
                continue
            test_users.add(user)
            for task in free:
                room[task] -= 1
                tested.add((user, task))
    pairs["split"] = str(Split.TRAIN)
    pairs.loc[pairs["user_id"].isin(test_users), "split"] = None
    is_test = [pair in tested for pair in zip(pairs["user_id"], pairs["task"], strict=True)]
    pairs.loc[is_test, "split"] = str(Split.TEST)
    return pairs


def _draw_ugm_users(splits: pd.DataFrame, settings: SplitSettings, seed: int) -> set[str]:
    train = np.sort(splits.loc[splits["split"] == str(Split.TRAIN), "user_id"].unique().astype(str))
    picks = np.random.default_rng([seed, 2]).permutation(len(train))[: settings.ugm_users]
    return {str(u) for u in train[picks]}


def _user_table(frame: pd.DataFrame, ugm: set[str]) -> pa.Table:
    history = frame["role"] == str(Role.HISTORY)
    rows = (
        frame.assign(n_history=history, n_target=~history)
        .groupby(["user_id", "task"], as_index=False)
        .agg(split=("split", "first"), n_history=("n_history", "sum"), n_target=("n_target", "sum"))
    )
    return pa.table(
        {
            "user_id": pa.array(rows["user_id"], pa.string()),
            "task": pa.array(rows["task"], pa.string()),
            "split": pa.array(rows["split"].where(rows["split"].notna(), None), pa.string()),
            "ugm": pa.array([u in ugm for u in rows["user_id"]], pa.bool_()),
            "n_history": pa.array(rows["n_history"], pa.int64()),
            "n_target": pa.array(rows["n_target"], pa.int64()),
        }
    )


def _report(result: SplitResult, dropped: pd.DataFrame, settings: SplitSettings) -> dict[str, Any]:
    users = result.users.to_pandas()
    counts = users.fillna({"split": "held out"}).groupby(["task", "split"])["user_id"].size()
    short = dropped.groupby("task").agg(users=("user_id", "nunique"), interactions=("user_id", "size"))
    return {
        "users": {f"{task}/{split}": int(n) for (task, split), n in counts.items()},
        "ugm_users": int(users.loc[users["ugm"], "user_id"].nunique()),
        "test_users_wanted": settings.test_users,
        "too_short": {
            str(task): {"users": int(r.users), "interactions": int(r.interactions)} for task, r in short.iterrows()
        },
        "targets_of_videos_in_own_history": _seen_targets(result.interactions),
    }


def _seen_targets(interactions: pa.Table) -> int:
    """Targets whose video is in the same user's history too: an earlier view, so no leak, but worth knowing."""
    frame = interactions.select(["user_id", "video_id", "task", "role"]).to_pandas()
    history = frame[frame["role"] == str(Role.HISTORY)].drop(columns="role").drop_duplicates()
    targets = frame[frame["role"] == str(Role.TARGET)]
    return len(targets.merge(history, on=["user_id", "video_id", "task"]))
