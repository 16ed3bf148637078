"""Makes the IF-VR data set `ifvr` from the raw tables: filtered and split, with a count for every step."""

from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import StageJob
from gubs.console import say
from gubs.data.filters import apply_filters, shrinkage
from gubs.data.ingest import row_counts
from gubs.data.settings import FilterSettings, SplitSettings
from gubs.data.splits import split
from gubs.errors import InputError


def make(job: StageJob, filters: FilterSettings, splits: SplitSettings, seed: int) -> str:
    """Filters and splits `raw` (tables users, videos, interactions, user_splits, filter_steps); returns a summary.

    Raises:
        InputError: no interaction passes the filters.
    """
    raw = job.input("raw")
    interactions, steps = apply_filters(raw.table("interactions"), filters)
    if interactions.num_rows == 0:
        rows = "\n".join(f"  {s.interactions:>10,} left after: {s.name}{s.note and f' - {s.note}'}" for s in steps)
        raise InputError(
            f"no interaction passes the filters:\n{rows}\nLower filters.min_video_views or filters.min_user_exposures."
        )
    counts, notes = [asdict(step) for step in steps], shrinkage(steps, filters)
    result = split(interactions, splits, seed)
    with job.writing() as out:
        out.write_table("interactions", result.interactions)
        out.write_table("user_splits", result.users)
        out.write_table("users", _used(raw.table("users"), "user_id", result.interactions))
        out.write_table("videos", _used(raw.table("videos"), "video_id", result.interactions))
        out.write_table("filter_steps", pa.Table.from_pylist(counts))
        out.info = {"splits": result.report, "filter_steps": counts, "notes": notes}
        out.summary = row_counts(out.tables)
    for note in notes:
        say(f"         note: {note}")
    return out.summary


def _used(table: pa.Table, key: str, interactions: pa.Table) -> pa.Table:
    return table.filter(pc.is_in(table[key], value_set=interactions[key].combine_chunks().unique()))
