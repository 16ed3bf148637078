"""Splits users into train and test and their records into history and targets, and checks that nothing leaks.

Plain functions over blocks: no Ray, no files. A block is any part of the interactions that holds all rows of its users.
The rules (paper, A.3 and A.6): per task, some users are test users and the others train; the first half of a user's
records (sequential) or all but the last few (click) are history, the rest are targets. A page is never divided: its
clicks would give away the rest of it. With `held_out_videos`, test targets are about some of the videos, and all other
records about the others.

A block is first divided (`Division`), which says what it has for the draw (`Candidates`, which add up over blocks);
the draw is over all blocks (`draw`), and then each block is finished (`finish`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.partition import Hashes, Users, draw_hashes
from gubs.data.settings import SplitSettings
from gubs.errors import InputError
from gubs.records import SCHEMAS, Role, Split, Task

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_NOWHERE = np.iinfo(np.int64).max
_TASKS = sorted(Task)
"""In the order of the tables: click, sequential."""

COLUMNS = ("user_id", "task", "timestamp", "page_id")
"""Columns of `interactions` that decide the order and the roles."""

USERS_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("ugm", pa.bool_()),
        ("n_history", pa.int64()),
        ("n_target", pa.int64()),
    ]
)


@dataclass
class SplitResult:
    """The interactions with `split` and `role`, and the users of each split."""

    interactions: pa.Table
    """Schema `ifvr`; by task, user (in the order of `partition.Users`) and time."""
    users: pa.Table
    """One row per user and task: user_id, task, split (null: held out), ugm, n_history, n_target."""
    report: dict[str, Any] = field(default_factory=dict)


def split(interactions: pa.Table, settings: SplitSettings, seed: int) -> SplitResult:
    """Splits users into train and test, and each user's records into history and targets: the whole log in one block.

    Records are in order of time, or in the order of the log if none of a user's records has a time. If only some have
    one, the others are set aside, since their place is unknown.

    A user with too few records for a task (fewer than `min_history` and one target) is left out of that task. A test
    user of one task is never a training user of the other: if the other task has enough test users already, the user
    is held out of it (split null).

    Args:
        interactions: schema `interactions`, filtered.
        settings: sizes.
        seed: draws the users; see `draw`.
    """
    division = Division.of(interactions, settings)
    drawn = draw(Candidates.of(division, settings, seed), settings)
    result, counts = finish(interactions, division, drawn, settings, seed)
    result.report = counts.report(settings)
    return result


@dataclass(frozen=True)
class Division:
    """The records of a block in order, and their roles."""

    users: Users
    order: Ints
    """Rows of the block by task, user and time; rows that were set aside are missing."""
    group: Ints
    """For each of these, its user and task: a number from 0."""
    group_user: Ints
    """(groups,) place of the user in `users`."""
    group_task: Ints
    """(groups,) place of the task in `_TASKS`."""
    size: Ints
    """(groups,) records."""
    history: Ints
    """(groups,) how many of these, from the first, are history."""
    enough: Mask
    """(groups,) whether the user has enough records for the task."""
    set_aside: int
    """Records without a time of users who have times."""

    @classmethod
    def of(cls, block: pa.Table, settings: SplitSettings) -> "Division":
        """Divides a block; it has `COLUMNS`."""
        users = Users.of(block["user_id"])
        order, set_aside = _in_order(block, users.codes)
        task = _task_codes(block)[order]
        key = task * len(users.ids) + users.codes[order]
        group = np.cumsum(np.diff(key, prepend=key[:1]) != 0)
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        size = np.bincount(group).astype(np.int64)
        history = size // 2
        click = task[starts] == _TASKS.index(Task.CLICK)
        if click.any():
            history = np.where(click, _page_borders(block, order, group, starts, size, settings), history)
        enough = (history >= settings.min_history) & (history < size)
        return cls(users, order, group, users.codes[order][starts], task[starts], size, history, enough, set_aside)

    @cached_property
    def place(self) -> Ints:
        """For each record in order, its place among the user's records of the task."""
        return np.arange(len(self.order)) - (np.cumsum(self.size) - self.size)[self.group]


def _in_order(block: pa.Table, user: Ints) -> tuple[Ints, int]:
    """Rows by task, user and time (without times: in the order of the log), and how many were set aside."""
    timed = np.asarray(block["timestamp"].is_valid())
    any_timed = np.bincount(user[timed], minlength=int(user.max(initial=-1)) + 1) > 0
    rows = np.flatnonzero(timed | ~any_timed[user])
    times = block["timestamp"].fill_null(-1).to_numpy()
    order = np.lexsort((times[rows], user[rows], _task_codes(block)[rows]))
    return rows[order], len(user) - len(rows)


def _task_codes(block: pa.Table) -> Ints:
    return pc.index_in(block["task"], value_set=pa.array([str(t) for t in _TASKS])).to_numpy().astype(np.int64)


def _page_borders(block: pa.Table, order: Ints, group: Ints, starts: Ints, size: Ints, settings: SplitSettings) -> Ints:
    """For each group, how many of its records are history, so that no page has records on both sides.

    Of the borders between pages that leave a long enough history, takes the one whose number of targets is closest to
    `click_targets` (of two, the earlier); 0 if there is none.
    """
    place, total = np.arange(len(order)) - starts[group], size[group]
    page = _pages(block, order, group)
    ends = np.zeros(int(page.max(initial=-1)) + 1, np.int64)
    np.maximum.at(ends, page, np.arange(len(order)))
    open_until = np.maximum.accumulate(ends[page])
    border = (open_until == np.arange(len(order))) & (place + 1 >= settings.min_history)  # each page begun has ended
    ideal = total - settings.click_targets
    before = np.maximum.reduceat(np.where(border & (place + 1 <= ideal), place + 1, 0), starts)
    after = np.minimum.reduceat(
        np.where(border & (place + 1 > ideal) & (place + 1 < total), place + 1, _NOWHERE), starts
    )
    ideal = ideal[starts]
    earlier = (before > 0) & ((after == _NOWHERE) | (ideal - before <= after - ideal))
    return np.where(earlier, before, np.where(after < _NOWHERE, after, 0))


def _pages(block: pa.Table, order: Ints, group: Ints) -> Ints:
    """For each record in order, a number for its page (per user and task); a record without a page counts as one."""
    encoded = block["page_id"].combine_chunks().dictionary_encode()
    codes = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)[order]
    alone = codes < 0
    keys = np.where(alone, -1 - np.arange(len(order)), group * max(1, len(encoded.dictionary)) + codes)
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


_KINDS = (("click",), ("sequential",), ("click", "sequential"))
"""The tasks that users have."""
_TEST, _UGM, _VIDEOS = 1, 2, 3
"""What is drawn: independent draws."""


@dataclass(frozen=True)
class _Lots:
    """Users with the smallest lots, in order of their lots."""

    lots: Hashes
    ids: pa.Array
    most: int

    @classmethod
    def of(cls, ids: pa.Array, lots: Hashes, most: int) -> "_Lots":
        order = np.argsort(lots, kind="stable")[:most]
        return cls(lots[order], ids.take(pa.array(order)), most)

    def __add__(self, other: "_Lots") -> "_Lots":
        ids = pa.concat_arrays([self.ids, other.ids])
        by_id = pc.sort_indices(ids).to_numpy()  # equal lots: the ids decide
        return _Lots.of(ids.take(pa.array(by_id)), np.concatenate([self.lots, other.lots])[by_id], self.most)


@dataclass(frozen=True)
class Candidates:
    """Of the users of some blocks with enough records, those who can be drawn; adds up over blocks."""

    users: Counter[str]
    """How many there are of each task."""
    test: dict[tuple[str, ...], _Lots]
    """By the tasks that they have."""
    ugm: _Lots

    @classmethod
    def of(cls, division: Division, settings: SplitSettings, seed: int) -> "Candidates":
        """The candidates of a block."""
        has = np.zeros((len(division.users.ids), len(_TASKS)), bool)
        has[division.group_user[division.enough], division.group_task[division.enough]] = True
        kinds = {k: has[:, 0] == ("click" in k) for k in _KINDS}
        kinds = {k: mask & (has[:, 1] == ("sequential" in k)) for k, mask in kinds.items()}
        ids, any_task = division.users.ids, has.any(axis=1)
        tested = len(_TASKS) * settings.test_users
        lots = draw_hashes(ids, seed, _TEST)
        return cls(
            users=Counter({str(t): int(has[:, i].sum()) for i, t in enumerate(_TASKS)}),
            test={k: _Lots.of(ids.filter(pa.array(mask)), lots[mask], tested) for k, mask in kinds.items()},
            ugm=_Lots.of(
                ids.filter(pa.array(any_task)), draw_hashes(ids, seed, _UGM)[any_task], settings.ugm_users + tested
            ),
        )

    def __add__(self, other: "Candidates") -> "Candidates":
        test = {kind: lots + other.test[kind] for kind, lots in self.test.items()}
        return Candidates(self.users + other.users, test, self.ugm + other.ugm)


@dataclass(frozen=True)
class Drawn:
    """The users that were drawn."""

    test: dict[str, frozenset[str]]
    """Test users by task."""
    ugm: frozenset[str]

    @cached_property
    def tested(self) -> frozenset[str]:
        """Test users of any task."""
        return frozenset[str]().union(*self.test.values())


def draw(candidates: Candidates, settings: SplitSettings) -> Drawn:
    """Draws test users and UGM users: those with the smallest lots, a hash of the seed and the user's id.

    So the draw depends neither on the order of the rows nor on how they are divided into blocks. At most half of a
    task's users are test users. First come users for whom all their tasks have room, then any who fill a gap.
    """
    room = {task: min(settings.test_users, n // 2) for task, n in candidates.users.items()}
    test: dict[str, set[str]] = {str(t): set() for t in _TASKS}
    tested: set[str] = set()
    order = list(_by_lot(candidates))
    for complete in (True, False):
        for user, tasks in order:
            free = [t for t in tasks if room.get(t, 0) > 0]
            if user in tested or not free or (complete and len(free) < len(tasks)):
                continue
            tested.add(user)
            for task in free:
                room[task] -= 1
                test[task].add(user)
    ugm = [u for u in candidates.ugm.ids.to_pylist() if u not in tested][: settings.ugm_users]
    return Drawn({task: frozenset(users) for task, users in test.items()}, frozenset(ugm))


def _by_lot(candidates: Candidates) -> Iterator[tuple[str, tuple[str, ...]]]:
    drawn = [
        (int(lot), user, kind)
        for kind, lots in candidates.test.items()
        for lot, user in zip(lots.lots, lots.ids.to_pylist(), strict=True)
    ]
    for _, user, kind in sorted(drawn):
        yield user, kind


@dataclass(frozen=True)
class SplitCounts:
    """What became of the records; adds up over blocks."""

    users: Counter[str] = field(default_factory=Counter)
    """By task and split: `click/test`."""
    ugm: int = 0
    short_users: Counter[str] = field(default_factory=Counter)
    """Users with too few records, by task."""
    short_rows: Counter[str] = field(default_factory=Counter)
    seen_targets: int = 0
    set_aside: int = 0
    held_out_videos: int = 0
    """Records left out since their video is held out, or since test targets are about held-out videos only."""

    def __add__(self, other: "SplitCounts") -> "SplitCounts":
        return SplitCounts(
            self.users + other.users,
            self.ugm + other.ugm,
            self.short_users + other.short_users,
            self.short_rows + other.short_rows,
            self.seen_targets + other.seen_targets,
            self.set_aside + other.set_aside,
            self.held_out_videos + other.held_out_videos,
        )

    def report(self, settings: SplitSettings) -> dict[str, Any]:
        """The report for the manifest."""
        return {
            "users": dict(sorted(self.users.items())),
            "ugm_users": self.ugm,
            "test_users_wanted": settings.test_users,
            "too_short": {
                task: {"users": n, "interactions": self.short_rows[task]}
                for task, n in sorted(self.short_users.items())
            },
            "targets_of_videos_in_own_history": self.seen_targets,
            "set_aside": {"no_time": self.set_aside, "held_out_videos": self.held_out_videos},
        }


def finish(
    block: pa.Table, division: Division, drawn: Drawn, settings: SplitSettings, seed: int
) -> tuple[SplitResult, SplitCounts]:
    """The result of a block (without a report) and its counts.

    Raises:
        InputError: something leaks; see `check_no_leak`.
    """
    d = division
    target = d.place >= d.history[d.group]
    splits, ugm = _splits(d, drawn), pc.is_in(d.users.ids, value_set=_texts(drawn.ugm))
    kept = d.enough[d.group]
    others = 0
    if settings.held_out_videos:
        tested = pc.fill_null(pc.equal(splits, str(Split.TEST)), False).to_numpy(zero_copy_only=False)[d.group]
        fits = (tested & target) == _held_out(block["video_id"], settings.held_out_videos, seed)[d.order]
        others = int((kept & ~fits).sum())
        d = _of_records(d, kept & fits, target, settings)
        kept &= fits & d.enough[d.group]
    target = target[kept]
    rows = block.take(pa.array(d.order[kept]))
    columns = {
        "split": splits.take(pa.array(d.group[kept])),
        "role": pc.if_else(pa.array(target), str(Role.TARGET), str(Role.HISTORY)),
    }
    table = pa.table([columns.get(f.name, _column(rows, f.name)) for f in SCHEMAS["ifvr"]], schema=SCHEMAS["ifvr"])
    result = SplitResult(table, _user_table(d, splits, ugm))
    check_no_leak(result)
    return result, replace(_count(d, result), held_out_videos=others)


def _held_out(videos: pa.ChunkedArray, share: float, seed: int) -> Mask:
    """Whether each record's video is held out: by a hash of the seed and its id."""
    encoded = videos.combine_chunks().dictionary_encode()
    lots = draw_hashes(encoded.dictionary, seed, _VIDEOS)
    return (lots < np.uint64(share * 2.0**64))[encoded.indices.to_numpy()]


def _of_records(d: Division, kept: Mask, target: Mask, settings: SplitSettings) -> Division:
    """The division with the counts of the records that are kept."""
    groups = len(d.size)
    history = np.where(d.enough, np.bincount(d.group[kept & ~target], minlength=groups), d.history).astype(np.int64)
    size = np.where(d.enough, np.bincount(d.group[kept], minlength=groups), d.size).astype(np.int64)
    enough = d.enough & (history >= settings.min_history) & (history < size)
    return replace(d, history=history, size=size, enough=enough)


def _column(rows: pa.Table, name: str) -> pa.ChunkedArray | None:
    return rows[name] if name in rows.column_names else None


def _texts(values: frozenset[str]) -> pa.Array:
    return pa.array(sorted(values), pa.string())


def _splits(d: Division, drawn: Drawn) -> pa.Array:
    """The split of each group."""
    tested = pc.is_in(d.users.ids, value_set=_texts(drawn.tested)).to_numpy(zero_copy_only=False)
    split = np.where(tested[d.group_user], "", str(Split.TRAIN))
    for number, task in enumerate(_TASKS):
        chosen = pc.is_in(d.users.ids, value_set=_texts(drawn.test[str(task)])).to_numpy(zero_copy_only=False)
        split[(d.group_task == number) & chosen[d.group_user]] = str(Split.TEST)
    return pc.if_else(pa.array(split == ""), None, pa.array(split, pa.string()))


def _user_table(d: Division, splits: pa.Array, ugm: pa.Array) -> pa.Table:
    """One row per user and task, by user."""
    groups = np.flatnonzero(d.enough)
    groups = groups[np.lexsort((d.group_task[groups], d.group_user[groups]))]
    user, wanted = pa.array(d.group_user[groups]), pa.array(groups)
    tasks = pa.array([str(t) for t in _TASKS]).take(pa.array(d.group_task[groups]))
    history = d.history[groups]
    columns = [d.users.ids.take(user), tasks, splits.take(wanted), ugm.take(user), history, d.size[groups] - history]
    return pa.table(columns, schema=USERS_SCHEMA)


def _count(d: Division, result: SplitResult) -> SplitCounts:
    short = np.flatnonzero(~d.enough)
    names = [str(_TASKS[t]) for t in d.group_task[short]]
    rows = Counter[str]()
    for name, n in zip(names, d.size[short].tolist(), strict=True):
        rows[name] += n
    users = result.users
    labels = pc.binary_join_element_wise(users["task"], users["split"].fill_null("held out"), "/")
    return SplitCounts(
        users=Counter({v["values"]: v["counts"] for v in pc.value_counts(labels).to_pylist()}),
        ugm=len(users.filter(users["ugm"])["user_id"].unique()),
        short_users=Counter(names),
        short_rows=rows,
        seen_targets=_seen_targets(result.interactions),
        set_aside=d.set_aside,
    )


def _seen_targets(interactions: pa.Table) -> int:
    """Targets whose video is in the same user's history too: an earlier view, so no leak, but worth knowing."""
    target = _is_target(interactions)
    key = _joint_codes(interactions, "user_id", "task", "video_id")
    return int(np.isin(key[target], key[~target]).sum())


def _is_target(interactions: pa.Table) -> Mask:
    return pc.equal(interactions["role"], str(Role.TARGET)).to_numpy()


def _joint_codes(table: pa.Table, *names: str) -> Ints:
    """A number for each combination of values; equal for equal ones. Null is a value."""
    key = np.zeros(table.num_rows, np.int64)
    for name in names:
        encoded = table[name].combine_chunks().dictionary_encode()
        codes = encoded.indices.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False) + 1
        key = np.unique(key, return_inverse=True)[1] * (len(encoded.dictionary) + 1) + codes
    return key


def check_no_leak(result: SplitResult) -> None:
    """Checks that no target is in a history, before a history record or on a page with one, and that no test user is
    in train or UGM.

    Raises:
        InputError: a rule is broken (by a bug, or because tables were changed by hand).
    """
    rows, target = result.interactions, _is_target(result.interactions)
    _check_records(rows, target)
    _check_pages(rows, target)
    users = result.users
    test = users.filter(pc.equal(users["split"], str(Split.TEST)))["user_id"].unique()
    for name, others in (("train", pc.equal(users["split"], str(Split.TRAIN))), ("UGM", users["ugm"])):
        ids = users.filter(others)["user_id"].unique()
        shared = ids.filter(pc.is_in(ids, value_set=test))
        if len(shared):
            raise InputError(f"{len(shared)} test users are {name} users too, for example {pc.min(shared)}")


def _check_records(rows: pa.Table, target: Mask) -> None:
    ids = rows["interaction_id"].combine_chunks()
    targets, history = (ids.filter(pa.array(mask)).unique() for mask in (target, ~target))
    both = targets.filter(pc.is_in(targets, value_set=history))
    if len(both):
        raise InputError(f"{len(both)} targets are in a history too, for example {pc.min(both)}")
    group = np.unique(_joint_codes(rows, "user_id", "task"), return_inverse=True)[1]
    times = rows["timestamp"].fill_null(-1).to_numpy()
    last_seen = np.full(int(group.max(initial=-1)) + 1, -1, np.int64)
    np.maximum.at(last_seen, group[~target], times[~target])
    early = np.flatnonzero(target & (times >= 0) & (times < last_seen[group]))
    if len(early):
        raise InputError(f"{len(early)} targets lie before a history record, for example {ids[early[0]]}")


def _check_pages(rows: pa.Table, target: Mask) -> None:
    paged = np.asarray(rows["page_id"].is_valid())
    if not paged.any():
        return
    rows, target = rows.filter(pa.array(paged)), target[paged]
    pages = np.unique(_joint_codes(rows, "user_id", "task", "page_id"), return_inverse=True)[1]
    n = int(pages.max()) + 1
    divided = (np.bincount(pages[target], minlength=n) > 0) & (np.bincount(pages[~target], minlength=n) > 0)
    if divided.any():
        first = min(rows.filter(pa.array(divided[pages])).select(["user_id", "page_id"]).to_pylist(), key=str)
        raise InputError(
            f"{int(divided.sum())} pages have both history and targets, for example page {first['page_id']} of user "
            f"{first['user_id']}"
        )
