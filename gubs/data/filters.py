"""The paper's filters: three noise criteria, minimum views of a video and exposures of a user, with a count a step.

Plain functions over tables: no Ray, no files. A filter whose columns a source does not have is not applied and says so.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gubs.config import FilterSettings
from gubs.records import FAST_SKIP_BELOW, Task

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FilterStep:
    """What is left after a step."""

    name: str
    applied: bool
    removed: int
    """Interactions taken out by this step."""
    interactions: int
    users: int
    videos: int
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def apply_filters(interactions: pa.Table, settings: FilterSettings) -> tuple[pa.Table, list[FilterStep]]:
    """Applies all filters, in the paper's order.

    Args:
        interactions: table of schema `interactions`.
        settings: which filters, with which limits.

    Returns:
        The interactions that are left, in their order, and one `FilterStep` for "read" and for each filter.
    """
    steps = [_step("read", interactions, interactions)]
    if settings.noise:
        for name, columns, meets in _noise_criteria(settings):
            interactions = _apply_criterion(name, columns, meets, interactions, settings.noise_scope, steps)
    return _minimum_counts(interactions, settings, steps), steps


def has_operations(table: pa.Table) -> Mask:
    """Criterion 1: the user did something both before and after."""
    before, after = table["prev_op_gap_s"].is_valid(), table["next_op_gap_s"].is_valid()
    return pc.and_(before, after).to_numpy()


def within_gap(table: pa.Table, max_gap_s: float) -> Mask:
    """Criterion 2: at most `max_gap_s` seconds between the operations before and after; unknown gaps fail."""
    gap = pc.add(table["prev_op_gap_s"], table["next_op_gap_s"])
    return pc.fill_null(pc.less_equal(gap, max_gap_s), False).to_numpy()


def stayed_in_app(table: pa.Table) -> Mask:
    """Criterion 3: the user did not leave the app during the view."""
    return pc.invert(pc.fill_null(table["exited_app"], False)).to_numpy()


def is_fast_skip(table: pa.Table) -> Mask:
    """Sequential views with a play rate below 0.3; an unknown play rate is no skip."""
    low = pc.fill_null(pc.less(table["play_rate"], FAST_SKIP_BELOW), False)
    return pc.and_(low, _is_task(table, Task.SEQUENTIAL)).to_numpy()


def is_view(table: pa.Table) -> Mask:
    """What counts as a view of a video: every sequential view, and a click; an exposure without a click does not."""
    clicked = pc.fill_null(table["clicked"], False)
    return pc.or_(clicked, _is_task(table, Task.SEQUENTIAL)).to_numpy()


_Criterion = tuple[str, list[str], Callable[[pa.Table], Mask]]


def _noise_criteria(settings: FilterSettings) -> list[_Criterion]:
    gap = settings.max_gap_s
    return [
        ("an operation before and after", ["prev_op_gap_s", "next_op_gap_s"], has_operations),
        (f"at most {gap:g} s between them", ["prev_op_gap_s", "next_op_gap_s"], lambda t: within_gap(t, gap)),
        ("no app exit", ["exited_app"], stayed_in_app),
    ]


def _apply_criterion(
    name: str,
    columns: list[str],
    meets: Callable[[pa.Table], Mask],
    table: pa.Table,
    scope: str,
    steps: list[FilterStep],
) -> pa.Table:
    judged = is_fast_skip(table) if scope == "skips" else _is_task(table, Task.SEQUENTIAL).to_numpy()
    views = table.filter(_is_task(table, Task.SEQUENTIAL))
    missing = [c for c in columns if views[c].null_count == len(views)]
    if missing:
        steps.append(_step(name, table, table, f"not applicable: the source has no {' and no '.join(missing)}"))
        return table
    kept = table.filter(pa.array(~judged | meets(table)))
    steps.append(_step(name, table, kept))
    return kept


def _minimum_counts(table: pa.Table, settings: FilterSettings, steps: list[FilterStep]) -> pa.Table:
    """Takes out rare videos and users with few exposures, once or until both hold.

    Taking out a video shortens users' logs and the other way round, so one pass may leave videos or users below the
    limits; the fixed point is the largest set of interactions in which both limits hold.
    """
    rounds = 0
    while True:
        rounds += 1
        by_video = table.filter(pa.array(_often_viewed(table, settings.min_video_views)))
        by_user = by_video.filter(pa.array(_often_exposed(by_video, settings.min_user_exposures)))
        suffix = f", round {rounds}" if rounds > 1 else ""
        if rounds == 1 or by_user.num_rows < table.num_rows:
            steps.append(_step(f"videos with at least {settings.min_video_views} views{suffix}", table, by_video))
            steps.append(
                _step(f"click users with at least {settings.min_user_exposures} exposures{suffix}", by_video, by_user)
            )
        if not settings.fixed_point or by_user.num_rows == table.num_rows:
            return by_user
        table = by_user


def _often_viewed(table: pa.Table, least: int) -> Mask:
    video = table["video_id"].combine_chunks().dictionary_encode()
    codes = video.indices.to_numpy(zero_copy_only=False)
    views = np.bincount(codes, weights=is_view(table), minlength=len(video.dictionary))
    return views[codes] >= least


def _often_exposed(table: pa.Table, least: int) -> Mask:
    click = _is_task(table, Task.CLICK).to_numpy()
    user = table["user_id"].combine_chunks().dictionary_encode()
    codes = user.indices.to_numpy(zero_copy_only=False)
    exposures = np.bincount(codes, weights=click, minlength=len(user.dictionary))
    return ~click | (exposures[codes] >= least)


def _is_task(table: pa.Table, task: Task) -> pa.ChunkedArray:
    return pc.equal(table["task"], str(task))


def _step(name: str, before: pa.Table, after: pa.Table, note: str = "") -> FilterStep:
    return FilterStep(
        name=name,
        applied=not note,
        removed=before.num_rows - after.num_rows,
        interactions=after.num_rows,
        users=pc.count_distinct(after["user_id"]).as_py(),
        videos=pc.count_distinct(after["video_id"]).as_py(),
        note=note,
    )
