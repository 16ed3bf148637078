"""Who is tested, what is history, what is predicted; and the proof that nothing leaks.

Plain functions over tables: no Ray, no files. The rules (paper, A.3 and A.6): per task some users are test users, the
others train; of a user's records the first half (sequential) or all but the last (click) is history, the rest targets.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from gubs.config import SplitSettings
from gubs.errors import InputError
from gubs.records import SCHEMAS, Role, Split, Task


@dataclass
class SplitResult:
    """The interactions with `split` and `role`, and who is where."""

    interactions: pa.Table
    """Schema `ifvr`; sorted by task, user, time."""
    users: pa.Table
    """One row a user and task: user_id, task, split (null: held out), ugm, n_history, n_target."""
    report: dict[str, Any] = field(default_factory=dict)


def split(interactions: pa.Table, settings: SplitSettings, seed: int) -> SplitResult:
    """Splits users into train and test, and each user's records into history and targets.

    A user with too short a record for a task (`min_history` and one target) is left out of that task. A user who is a
    test user of one task is never a training user of the other: where the other task has its test users already, the
    user is held out of it (split null).

    Args:
        interactions: schema `interactions`, filtered.
        settings: sizes.
        seed: draws the users; the same seed and users give the same split.
    """
    frame = _in_order(interactions)
    long_enough = _assign_roles(frame, settings)
    dropped = frame.loc[~long_enough]
    frame = frame.loc[long_enough]
    sides = _draw_test_users(frame, settings, seed)
    ugm = _draw_ugm_users(sides, settings, seed)
    frame = frame.merge(sides, on=["user_id", "task"], how="left")
    users = _user_table(frame, ugm)
    table = pa.Table.from_pandas(frame[SCHEMAS["ifvr"].names], schema=SCHEMAS["ifvr"], preserve_index=False)
    result = SplitResult(table.replace_schema_metadata(), users)
    result.report = _report(result, dropped, settings)
    check_no_leak(result)
    return result


def check_no_leak(result: SplitResult) -> None:
    """Proves the border: no target in a history, no target before a history record, no test user in train or UGM.

    Raises:
        InputError: a rule is broken (a bug, or tables that were changed by hand).
    """
    frame = result.interactions.select(["interaction_id", "user_id", "task", "timestamp", "split", "role"]).to_pandas()
    target = frame["role"] == str(Role.TARGET)
    both = set(frame.loc[target, "interaction_id"]) & set(frame.loc[~target, "interaction_id"])
    if both:
        raise InputError(f"{len(both)} targets stand in a history, for example {min(both)}")
    key = [frame["user_id"], frame["task"]]
    last_seen = frame["timestamp"].where(~target).groupby(key).transform("max")
    early = frame.loc[target & (frame["timestamp"] < last_seen)]
    if len(early):
        raise InputError(
            f"{len(early)} targets lie before a history record, for example {early['interaction_id'].iloc[0]}"
        )
    users = result.users.to_pandas()
    test = set(users.loc[users["split"] == str(Split.TEST), "user_id"])
    for name, others in (("train", users["split"] == str(Split.TRAIN)), ("UGM", users["ugm"])):
        shared = test & set(users.loc[others, "user_id"])
        if shared:
            raise InputError(f"{len(shared)} test users are {name} users too, for example {min(shared)}")


def _in_order(interactions: pa.Table) -> pd.DataFrame:
    """By task, user and time; records without time keep their order."""
    frame = interactions.to_pandas(types_mapper=_nullable)
    frame["_row"] = np.arange(len(frame))
    frame["_time"] = frame["timestamp"].fillna(-1)
    return frame.sort_values(["task", "user_id", "_time", "_row"], kind="stable", ignore_index=True)


def _nullable(kind: pa.DataType) -> Any:
    # pandas would turn nullable integers into floats (losing digits of a timestamp) and booleans into objects
    return {pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype(), pa.bool_(): pd.BooleanDtype()}.get(kind)


def _assign_roles(frame: pd.DataFrame, settings: SplitSettings) -> "pd.Series[bool]":
    """Sets `role` in place; returns which rows belong to users with enough records."""
    groups = frame.groupby(["task", "user_id"], sort=False)["_row"]
    place, total = groups.cumcount(), groups.transform("size")
    history = np.where(frame["task"] == str(Task.SEQUENTIAL), total // 2, total - settings.click_targets)
    frame["role"] = np.where(place < history, str(Role.HISTORY), str(Role.TARGET))
    return pd.Series(history >= settings.min_history, index=frame.index)


def _draw_test_users(frame: pd.DataFrame, settings: SplitSettings, seed: int) -> pd.DataFrame:
    """One row a user and task with the `split`."""
    pairs = frame[["user_id", "task"]].drop_duplicates().sort_values(["user_id", "task"], ignore_index=True)
    tasks_of = pairs.groupby("user_id")["task"].apply(list)
    room = {task: min(settings.test_users, n // 2) for task, n in pairs["task"].value_counts().items()}
    tested: set[tuple[str, str]] = set()
    chosen: set[str] = set()
    order = np.random.default_rng([seed, 1]).permutation(tasks_of.index.to_numpy())
    for complete in (True, False):  # first users whom every task of theirs can take, then any who fill a gap
        for user in order:
            free = [t for t in tasks_of[user] if room[t] > 0]
            if user in chosen or not free or (complete and len(free) < len(tasks_of[user])):
                continue
            chosen.add(user)
            for task in free:
                room[task] -= 1
                tested.add((user, task))
    is_test = [pair in tested for pair in zip(pairs["user_id"], pairs["task"], strict=True)]
    held_out = pairs["user_id"].isin(chosen)
    pairs["split"] = str(Split.TRAIN)
    pairs.loc[held_out, "split"] = None
    pairs.loc[is_test, "split"] = str(Split.TEST)
    return pairs


def _draw_ugm_users(sides: pd.DataFrame, settings: SplitSettings, seed: int) -> set[str]:
    train = np.sort(sides.loc[sides["split"] == str(Split.TRAIN), "user_id"].unique().astype(str))
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
        "users": {f"{task}/{side}": int(n) for (task, side), n in counts.items()},
        "ugm_users": int(users.loc[users["ugm"], "user_id"].nunique()),
        "test_users_wanted": settings.test_users,
        "too_short": {
            str(task): {"users": int(r.users), "interactions": int(r.interactions)} for task, r in short.iterrows()
        },
        "targets_of_videos_in_own_history": _seen_targets(result.interactions),
    }


def _seen_targets(interactions: pa.Table) -> int:
    """Targets whose video the same user met in the history too: no leak (an earlier view), but worth knowing."""
    frame = interactions.select(["user_id", "video_id", "task", "role"]).to_pandas()
    history = frame[frame["role"] == str(Role.HISTORY)].drop(columns="role").drop_duplicates()
    targets = frame[frame["role"] == str(Role.TARGET)]
    return len(targets.merge(history, on=["user_id", "video_id", "task"]))
