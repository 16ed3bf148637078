"""Second stage: raw tables become the IF-VR data set `ifvr`: filtered, split, with a count of every step."""

import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Artifact, Run, fingerprint, writing
from gubs.config import Settings
from gubs.data.filters import FilterStep, apply_filters
from gubs.data.splits import split
from gubs.errors import InputError


def build_stage(run: Run, settings: Settings, *, force: bool = False) -> tuple[Artifact, bool]:
    """Filters and splits the artifact `raw`.

    Returns:
        The artifact `ifvr` (tables users, videos, interactions, user_splits, filter_steps) and whether it was made now.

    Raises:
        InputError: nothing is left after the filters.
    """
    raw = run.artifact("raw")
    inputs = {"raw": raw.fingerprint}
    recipe = {"filters": settings.filters.model_dump(), "splits": settings.splits.model_dump(), "seed": settings.seed}
    mark = fingerprint("ifvr", recipe, inputs)
    if found := run.finished("ifvr", mark, force):
        return found, False
    kept, steps = apply_filters(raw.table("interactions"), settings.filters)
    if kept.num_rows == 0:
        raise InputError(
            f"no interaction passes the filters:\n{_as_text(steps)}\n"
            "Lower filters.min_video_views or filters.min_user_exposures."
        )
    result = split(kept, settings.splits, settings.seed)
    with writing(run, "ifvr", fingerprint=mark, settings=settings, inputs=inputs) as out:
        out.write_table("interactions", result.interactions)
        out.write_table("user_splits", result.users)
        out.write_table("users", _used(raw.table("users"), "user_id", result.interactions))
        out.write_table("videos", _used(raw.table("videos"), "video_id", result.interactions))
        out.write_table("filter_steps", pa.Table.from_pylist([s.to_json() for s in steps]))
        out.info = {"splits": result.report, "filter_steps": [s.to_json() for s in steps]}
    return run.artifact("ifvr"), True


def _used(table: pa.Table, key: str, interactions: pa.Table) -> pa.Table:
    return table.filter(pc.is_in(table[key], value_set=interactions[key].combine_chunks().unique()))


def _as_text(steps: list[FilterStep]) -> str:
    return "\n".join(f"  {s.interactions:>10,} left after: {s.name}{' - ' + s.note if s.note else ''}" for s in steps)
