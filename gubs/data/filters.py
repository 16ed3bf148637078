"""The paper's filters: three noise criteria, minimum views per video and exposures per user, with a count per step.

Plain functions over tables: no Ray, no files. A filter that needs columns which the source lacks is skipped, with a
note.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import FilterSettings
from gubs.records import FAST_SKIP_BELOW, Task

Mask = npt.NDArray[np.bool_]


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
    note: str = ""
    """Why the filter was not applied."""


def apply_filters(interactions: pa.Table, settings: FilterSettings) -> tuple[pa.Table, list[FilterStep]]:
    """Applies all filters, in the paper's order.

    Args:
        interactions: table of schema `interactions`.
        settings: which filters, with which limits.

    Returns:
        The interactions that pass, in their order, and one `FilterStep` for "read" and for each filter.
    """
    steps = [_step("read", interactions, interactions)]
    if settings.noise:
        for criterion in _noise_criteria(settings):
            interactions, step = _apply_criterion(criterion, interactions, settings.noise_scope)
            steps.append(step)
    return _minimum_counts(interactions, settings, steps), steps


NEARLY_EMPTY = 0.05
"""Share of the users or videos below which what the filters leave is worth a warning."""


def shrinkage(steps: list[FilterStep], settings: FilterSettings) -> list[str]:
    """A warning if hardly any users, or hardly any videos, are left: which filter removed most, and its setting."""
    return [
        _warning(steps, kind, settings)
        for kind in ("users", "videos")
        if getattr(steps[-1], kind) < NEARLY_EMPTY * getattr(steps[0], kind)
    ]


def _warning(steps: list[FilterStep], kind: str, settings: FilterSettings) -> str:
    before, after = getattr(steps[0], kind), getattr(steps[-1], kind)
    lost = Counter[str]()
    for previous, step in pairwise(steps):
        lost[step.name.partition(_ROUND)[0]] += getattr(previous, kind) - getattr(step, kind)
    name, removed = lost.most_common(1)[0]
    also = [f"'{other}' {n:,}" for other, n in lost.most_common()[1:] if n > 0]
    rest = f" ({', '.join(also)})" if also else ""
    return (
        f"Only {after:,} of {before:,} {kind} are left after the filters. '{name}' removed {removed:,} of them{rest}; "
        f"its setting is {_settings_by_filter(settings)[name]}."
    )


def _settings_by_filter(settings: FilterSettings) -> dict[str, str]:
    """The setting that decides each filter, by the filter's name."""
    operations, gap, stay = (criterion.name for criterion in _noise_criteria(settings))
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


@dataclass(frozen=True)
class _Criterion:
    name: str
    columns: tuple[str, ...]
    meets: Callable[[pa.Table], Mask]


def _noise_criteria(settings: FilterSettings) -> list[_Criterion]:
    gap = settings.max_gap_s
    return [
        _Criterion("an operation before and after", _GAPS, has_operations),
        _Criterion(f"at most {gap:g} s between them", _GAPS, lambda t: within_gap(t, gap)),
        _Criterion("no app exit", ("exited_app",), stayed_in_app),
    ]


def _apply_criterion(criterion: _Criterion, table: pa.Table, scope: str) -> tuple[pa.Table, FilterStep]:
    sequential = _is_task(table, Task.SEQUENTIAL)
    views = table.filter(sequential)
    if missing := [c for c in criterion.columns if views[c].null_count == len(views)]:
        note = f"not applicable: the source has no {' and no '.join(missing)}"
        return table, _step(criterion.name, table, table, note)
    judged = is_fast_skip(table) if scope == "skips" else sequential.to_numpy()
    kept = table.filter(pa.array(~judged | criterion.meets(table)))
    return kept, _step(criterion.name, table, kept)


def _minimum_counts(table: pa.Table, settings: FilterSettings, steps: list[FilterStep]) -> pa.Table:
    """Removes rare videos and users with few exposures, once or until both limits hold.

    Removing a video shortens users' logs and vice versa, so one pass may leave videos or users below the limits; the
    fixed point is the largest set of interactions in which both limits hold.
    """
    views, exposures = settings.min_video_views, settings.min_user_exposures
    for number in count(1):
        by_video = table.filter(pa.array(_often_viewed(table, views)))
        by_user = by_video.filter(pa.array(_often_exposed(by_video, exposures)))
        suffix = f"{_ROUND} {number}" if number > 1 else ""
        stable = by_user.num_rows == table.num_rows
        if number == 1 or not stable:
            steps.append(_step(f"{_views_filter(settings)}{suffix}", table, by_video))
            steps.append(_step(f"{_exposures_filter(settings)}{suffix}", by_video, by_user))
        if stable or not settings.fixed_point:
            break
        table = by_user
    return by_user


_ROUND = ", round"


def _views_filter(settings: FilterSettings) -> str:
    return f"videos with at least {settings.min_video_views} views"


def _exposures_filter(settings: FilterSettings) -> str:
    return f"click users with at least {settings.min_user_exposures} exposures"


def _often_viewed(table: pa.Table, minimum: int) -> Mask:
    return _counts(table["video_id"], is_view(table)) >= minimum


def _often_exposed(table: pa.Table, minimum: int) -> Mask:
    click = _is_task(table, Task.CLICK).to_numpy()
    return ~click | (_counts(table["user_id"], click) >= minimum)


def _counts(ids: pa.ChunkedArray, counted: Mask) -> npt.NDArray[np.float64]:
    """For each row, the number of counted rows with the same id."""
    encoded = ids.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    return np.bincount(codes, weights=counted, minlength=len(encoded.dictionary))[codes]


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
