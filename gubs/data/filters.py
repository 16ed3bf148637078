"""The paper's filters: three noise criteria, minimum views per video and exposures per user, with a count per step.

Plain functions over blocks: no Ray, no files. A block is any part of the interactions that holds all rows of its users.
`KnownValues` says which criteria apply; `PackedRows` keeps what the counts need of a block; `Tally` and `Round` are
counts, which add up over blocks. So the filters of one table (`apply_filters`) and of a log on many machines are the
same. A filter that needs columns which the source lacks is skipped, with a note.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import FilterSettings
from gubs.records import FAST_SKIP_BELOW, Task

Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]

COLUMNS = (
    *("user_id", "video_id", "task", "play_rate", "clicked"),
    *("prev_op_gap_s", "next_op_gap_s", "exited_app"),
)
"""Columns of `interactions` that the filters read."""


@dataclass(frozen=True)
class FilterStep:
    """Counts after one filter."""

    name: str
    applied: bool
    removed: int
    """Interactions that the filter removed."""
    interactions: int
    users: int
    videos: int
    sequential_users: int = 0
    """Users with a row of the sequential task."""
    click_users: int = 0
    """Users with a row of the click task."""
    note: str = ""
    """Why the filter was not applied."""


def apply_filters(interactions: pa.Table, settings: FilterSettings) -> tuple[pa.Table, list[FilterStep]]:
    """Applies all filters to one table, in the paper's order.

    Args:
        interactions: table of schema `interactions`.
        settings: which filters, with which limits.

    Returns:
        The interactions that pass, in their order, and one `FilterStep` for "read" and for each filter.
    """
    criteria = applicable(KnownValues.of(interactions), settings)
    rows = PackedRows.of(
        interactions, interactions["video_id"].combine_chunks().unique(), criteria, settings.noise_scope
    )
    limits, steps = decide(
        noise_tally(rows), criteria, settings, lambda before, kept: Round.of(rows, before, kept, settings)
    )
    return interactions.filter(pa.array(passing(rows, limits, settings))), steps


NEARLY_EMPTY = 0.05
"""Share of the users or videos below which what the filters leave is worth a warning."""


def shrinkage(steps: list[FilterStep], settings: FilterSettings) -> list[str]:
    """A warning if hardly any users, or hardly any videos, are left: which filter removed most, and its setting."""
    return [
        f"Only {getattr(steps[-1], kind):,} of {getattr(steps[0], kind):,} {kind} are left after the filters. "
        f"{blame(steps, kind, settings)}"
        for kind in ("users", "videos")
        if _nearly_gone(steps, kind)
    ]


def task_shrinkage(steps: list[FilterStep], settings: FilterSettings) -> list[str]:
    """A warning for each task of which no user, or hardly any, is left, if the log has both: users who stay in the
    other task hide that from `shrinkage`.
    """
    users = {task: f"{task}_users" for task in Task}
    if not all(getattr(steps[0], kind) for kind in users.values()):
        return []
    return [
        f"{_task_left(steps, task, kind)} {blame(steps, kind, settings)}"
        for task, kind in users.items()
        if _nearly_gone(steps, kind)
    ]


def _task_left(steps: list[FilterStep], task: Task, kind: str) -> str:
    before, after = getattr(steps[0], kind), getattr(steps[-1], kind)
    if after:
        return f"Only {after:,} of {before:,} users of the {task} task are left after the filters."
    return f"The {task} task is gone: none of its {before:,} users is left after the filters."


def _nearly_gone(steps: list[FilterStep], kind: str) -> bool:
    return bool(getattr(steps[-1], kind) < NEARLY_EMPTY * getattr(steps[0], kind))


def blame(steps: Sequence[FilterStep], kind: str, settings: FilterSettings) -> str:
    """The filter that removed most of something, how many others removed, and its setting; some must be removed.

    Args:
        steps: of the filters.
        kind: what is counted: a number of `FilterStep`.
        settings: of the filters.
    """
    lost = Counter[str]()
    for previous, step in pairwise(steps):
        lost[step.name.partition(_ROUND)[0]] += getattr(previous, kind) - getattr(step, kind)
    name, removed = lost.most_common(1)[0]
    also = [f"'{other}' {n:,}" for other, n in lost.most_common()[1:] if n > 0]
    rest = f" ({', '.join(also)})" if also else ""
    return f"'{name}' removed {removed:,} of them{rest}; its setting is {_settings_by_filter(settings)[name]}."


def _settings_by_filter(settings: FilterSettings) -> dict[str, str]:
    """The setting that decides each filter, by the filter's name."""
    operations, gap, stay = (criterion.name for criterion in noise_criteria(settings.max_gap_s))
    return {
        operations: f"filters.noise={str(settings.noise).lower()}",
        gap: f"filters.max_gap_s={settings.max_gap_s:g}",
        stay: f"filters.noise={str(settings.noise).lower()}",
        _views_filter(settings): f"filters.min_video_views={settings.min_video_views}",
        _exposures_filter(settings): f"filters.min_user_exposures={settings.min_user_exposures}",
    }


def has_operations(table: pa.Table) -> Mask:
    """Criterion 1: the user operated the app both before and after."""
    before, after = table["prev_op_gap_s"].is_valid(), table["next_op_gap_s"].is_valid()
    return pc.and_(before, after).to_numpy()


def within_gap(table: pa.Table, max_gap_s: float) -> Mask:
    """Criterion 2: at most `max_gap_s` seconds between the operations before and after; unknown gaps fail."""
    gap = pc.add(table["prev_op_gap_s"], table["next_op_gap_s"])
    return pc.fill_null(pc.less_equal(gap, max_gap_s), False).to_numpy()


def stayed_in_app(table: pa.Table) -> Mask:
    """Criterion 3: the user did not exit the app during the view."""
    return pc.invert(pc.fill_null(table["exited_app"], False)).to_numpy()


def is_fast_skip(table: pa.Table) -> Mask:
    """Sequential views with a play rate below 0.3; a view without a play rate is not a skip."""
    low = pc.fill_null(pc.less(table["play_rate"], FAST_SKIP_BELOW), False)
    return pc.and_(low, _is_task(table, Task.SEQUENTIAL)).to_numpy()


def is_view(table: pa.Table) -> Mask:
    """Counts as a view: every sequential view and every click, but no exposure without a click."""
    clicked = pc.fill_null(table["clicked"], False)
    return pc.or_(clicked, _is_task(table, Task.SEQUENTIAL)).to_numpy()


_GAPS = ("prev_op_gap_s", "next_op_gap_s")
OPERATIONS = (*_GAPS, "exited_app")
"""Columns that the noise criteria need."""


@dataclass(frozen=True)
class Criterion:
    """A noise criterion: rows that it judges and that do not meet it are removed."""

    name: str
    columns: tuple[str, ...]
    meets: Callable[[pa.Table], Mask]
    note: str = ""
    """Why it is not applied."""


def noise_criteria(gap: float) -> list[Criterion]:
    """The three criteria in the paper's order, the second with the longest gap in seconds."""
    return [
        Criterion("an operation before and after", _GAPS, has_operations),
        Criterion(f"at most {gap:g} s between them", _GAPS, partial(within_gap, max_gap_s=gap)),
        Criterion("no app exit", ("exited_app",), stayed_in_app),
    ]


@dataclass(frozen=True)
class KnownValues:
    """Values in the columns that the noise criteria need, among sequential views; adds up over blocks."""

    counts: dict[str, int]

    @classmethod
    def of(cls, block: pa.Table) -> "KnownValues":
        """The counts of a block."""
        views = block.select([*OPERATIONS, "task"]).filter(_is_task(block, Task.SEQUENTIAL))
        return cls({c: views.num_rows - views[c].null_count for c in OPERATIONS})

    def __add__(self, other: "KnownValues") -> "KnownValues":
        return KnownValues({c: n + other.counts[c] for c, n in self.counts.items()})


def applicable(known_values: KnownValues, settings: FilterSettings) -> list[Criterion]:
    """The noise criteria, those that lack a column with a note; none if they are not wanted."""
    criteria = []
    for criterion in noise_criteria(settings.max_gap_s) if settings.noise else []:
        missing = [c for c in criterion.columns if not known_values.counts[c]]
        note = f"not applicable: the source has no {' and no '.join(missing)}" if missing else ""
        criteria.append(Criterion(criterion.name, criterion.columns, criterion.meets, note))
    return criteria


@dataclass(frozen=True)
class PackedRows:
    """The rows of a block, as far as the counts need them: one array per field."""

    user: Codes
    """Number of the row's user within the block, from 0."""
    video: Codes
    """The place of the row's video among those of all blocks."""
    videos: int
    """Number of videos of all blocks."""
    view: Mask
    click: Mask
    """Rows of the click task."""
    failed: npt.NDArray[np.int8]
    """Number of the noise criterion that removes the row, from 1; 0: none does."""
    criteria: int
    """Number of noise criteria."""

    @classmethod
    def of(cls, block: pa.Table, video_ids: pa.Array, criteria: Sequence[Criterion], scope: str) -> "PackedRows":
        """Packs the rows of a block.

        Args:
            block: `COLUMNS` of some users' interactions.
            video_ids: the videos of all blocks.
            criteria: the noise criteria; those with a note are not applied.
            scope: `filters.noise_scope`.
        """
        sequential = _is_task(block, Task.SEQUENTIAL).to_numpy()
        judged = is_fast_skip(block) if scope == "skips" else sequential
        failed = np.zeros(block.num_rows, np.int8)
        for number, criterion in enumerate(criteria, 1):
            if not criterion.note:
                failed[judged & (failed == 0) & ~criterion.meets(block)] = number
        user = block["user_id"].combine_chunks().dictionary_encode().indices
        return cls(
            user=user.to_numpy(zero_copy_only=False),
            video=pc.index_in(block["video_id"], value_set=video_ids).to_numpy(),
            videos=len(video_ids),
            view=is_view(block),
            click=~sequential,
            failed=failed,
            criteria=len(criteria),
        )


@dataclass(frozen=True)
class Tally:
    """How many interactions, users and videos rows have; adds up over blocks with different users."""

    interactions: int
    users: int
    sequential_users: int
    click_users: int
    seen: Mask
    """(videos,) whether a row has the video."""

    @classmethod
    def of(cls, packed: PackedRows, rows: Mask) -> "Tally":
        """The tally of some rows of a block."""
        seen = np.bincount(packed.video[rows], minlength=packed.videos) > 0
        return cls(
            interactions=int(rows.sum()),
            users=_distinct(packed.user[rows]),
            sequential_users=_distinct(packed.user[rows & ~packed.click]),
            click_users=_distinct(packed.user[rows & packed.click]),
            seen=seen,
        )

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            interactions=self.interactions + other.interactions,
            users=self.users + other.users,
            sequential_users=self.sequential_users + other.sequential_users,
            click_users=self.click_users + other.click_users,
            seen=self.seen | other.seen,
        )


def _distinct(codes: Codes) -> int:
    return int(np.count_nonzero(np.bincount(codes)))


@dataclass(frozen=True)
class NoiseTally:
    """Tallies of the rows as read and after each noise criterion, and the views of each video that remain."""

    steps: tuple[Tally, ...]
    views: Ints

    def __add__(self, other: "NoiseTally") -> "NoiseTally":
        pairs = zip(self.steps, other.steps, strict=True)
        return NoiseTally(tuple(a + b for a, b in pairs), self.views + other.views)


def noise_tally(packed: PackedRows) -> NoiseTally:
    """The tallies of a block."""
    steps = [Tally.of(packed, (packed.failed == 0) | (packed.failed > n)) for n in range(packed.criteria + 1)]
    return NoiseTally(tuple(steps), _views(packed, packed.failed == 0))


def _views(packed: PackedRows, rows: Mask) -> Ints:
    return np.bincount(packed.video[rows & packed.view], minlength=packed.videos)


@dataclass(frozen=True)
class Round:
    """One round of the minimum counts: tallies once rare videos are gone, and once users with few exposures are too."""

    by_video: Tally
    by_user: Tally
    views: Ints
    """(videos,) views of each video that remain."""

    @classmethod
    def of(cls, packed: PackedRows, before: Mask | None, kept: Mask, settings: FilterSettings) -> "Round":
        """The round of one block.

        Args:
            packed: rows of the block.
            before: (videos,) the videos that the round before kept; None in the first round.
            kept: (videos,) the videos that this round keeps.
            settings: the limits.
        """
        rows = packed.failed == 0 if before is None else passing(packed, before, settings)
        rows &= kept[packed.video]
        by_user = rows & _often_exposed(packed, rows, settings)
        return cls(Tally.of(packed, rows), Tally.of(packed, by_user), _views(packed, by_user))

    def __add__(self, other: "Round") -> "Round":
        return Round(self.by_video + other.by_video, self.by_user + other.by_user, self.views + other.views)


def passing(packed: PackedRows, kept: Mask, settings: FilterSettings) -> Mask:
    """The rows of a block that pass all filters, if these videos are kept.

    A user who was removed in an earlier round, with more videos, is removed with fewer videos too: so the videos alone
    tell how far the rounds have come.
    """
    rows = (packed.failed == 0) & kept[packed.video]
    return rows & _often_exposed(packed, rows, settings)


def _often_exposed(packed: PackedRows, rows: Mask, settings: FilterSettings) -> Mask:
    exposures = np.bincount(packed.user[rows & packed.click], minlength=int(packed.user.max(initial=-1)) + 1)
    return ~packed.click | (exposures[packed.user] >= settings.min_user_exposures)


def decide(
    noise: NoiseTally,
    criteria: Sequence[Criterion],
    settings: FilterSettings,
    run_round: Callable[[Mask | None, Mask], Round],
) -> tuple[Mask, list[FilterStep]]:
    """Finds the videos to keep, and counts each step.

    Removing a video shortens users' logs and vice versa, so one round may leave videos or users below the limits; the
    fixed point is the largest set of interactions in which both limits hold.

    Args:
        noise: over all blocks.
        criteria: the noise criteria.
        settings: the limits.
        run_round: does one round over all blocks; see `Round.of`.

    Returns:
        (videos,) the videos that stay, for `passing`; and the steps.
    """
    first, *after = noise.steps
    steps = [_step("read", first, first)]
    for criterion, (before, tally) in zip(criteria, pairwise([first, *after]), strict=True):
        steps.append(_step(criterion.name, before, tally, criterion.note))
    return _minimum_counts(noise, settings, run_round, steps), steps


def _minimum_counts(
    noise: NoiseTally,
    settings: FilterSettings,
    run_round: Callable[[Mask | None, Mask], Round],
    steps: list[FilterStep],
) -> Mask:
    table, views, before = noise.steps[-1], noise.views, None
    for number in count(1):
        kept = views >= settings.min_video_views
        done = run_round(before, kept)
        suffix = f"{_ROUND} {number}" if number > 1 else ""
        stable = done.by_user.interactions == table.interactions
        if number == 1 or not stable:
            steps.append(_step(f"{_views_filter(settings)}{suffix}", table, done.by_video))
            steps.append(_step(f"{_exposures_filter(settings)}{suffix}", done.by_video, done.by_user))
        if stable or not settings.fixed_point:
            return kept
        table, views, before = done.by_user, done.views, kept
    raise AssertionError("unreachable")


_ROUND = ", round"


def _views_filter(settings: FilterSettings) -> str:
    return f"videos with at least {settings.min_video_views} views"


def _exposures_filter(settings: FilterSettings) -> str:
    return f"click users with at least {settings.min_user_exposures} exposures"


def _is_task(table: pa.Table, task: Task) -> pa.ChunkedArray:
    return pc.equal(table["task"], str(task))


def _step(name: str, before: Tally, after: Tally, note: str = "") -> FilterStep:
    return FilterStep(
        name=name,
        applied=not note,
        removed=before.interactions - after.interactions,
        interactions=after.interactions,
        users=after.users,
        videos=int(after.seen.sum()),
        sequential_users=after.sequential_users,
        click_users=after.click_users,
        note=note,
    )
