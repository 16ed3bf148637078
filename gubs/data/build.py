"""Makes the IF-VR data set `ifvr` from the raw tables: filtered and split, with a count for every step.

The raw tables are cut by user into parts. Each pass below is a function over one part, and what passes tell each other
are counts that add up: which videos stay, which users are drawn.
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import (
    Artifact,
    ArtifactWriter,
    Part,
    StageJob,
    code_version,
    part_file,
    write_atomically,
    write_part,
)
from gubs.console import say
from gubs.data import filters as filtering
from gubs.data import splits as splitting
from gubs.data.filters import Criterion, FilterStep, KnownValues, Mask, NoiseTally, PackedRows, Round
from gubs.data.ingest import row_counts
from gubs.data.settings import DataSettings, FilterSettings, SplitSettings
from gubs.data.splits import Candidates, Division, Drawn, SplitCounts
from gubs.data.work import Work, attempt_key, work
from gubs.errors import InputError
from gubs.ray_runtime import RaySettings
from gubs.records import Task


def make(
    job: StageJob, filters: FilterSettings, splits: SplitSettings, data: DataSettings, seed: int, ray: RaySettings
) -> str:
    """Filters and splits `raw` (tables users, videos, interactions, user_splits, filter_steps); returns a summary.

    Raises:
        InputError: no interaction passes the filters.
    """
    raw = job.input("raw")
    on_ray = raw.manifest.tables["interactions"].rows >= data.ray_from_rows
    key = attempt_key(job.recipe.fingerprint(job.kind), code_version()) if on_ray else None
    with job.writing(resume_key=key) as out, work(out.run.fs, out.path("work"), on_ray, ray) as workers:
        passes = _Passes(raw, out.run.fs, out.folder, filters, splits, seed)
        notes = _build(passes, workers, out)
        out.remove("work")
    for note in notes:
        say(f"         note: {note}")
    return out.summary


def _build(passes: "_Passes", workers: Work, out: ArtifactWriter) -> list[str]:
    """The passes, in order; returns notes."""
    kept, steps = _filter(passes, workers)
    if steps[-1].interactions == 0:
        _refuse(steps, passes.filters)
    numbers = range(passes.parts)
    divide = functools.partial(passes.candidates, kept)
    drawn = splitting.draw(workers.total("divide histories", divide, numbers), passes.splits)
    written = workers.run("write", functools.partial(passes.write, kept, drawn), numbers)
    counts = [asdict(step) for step in steps]
    notes = filtering.shrinkage(steps, passes.filters) + filtering.task_shrinkage(steps, passes.filters)
    for name in ("interactions", "user_splits", "users"):
        out.add_table(name, _in_order([part for w in written for part in w.parts[name]]))
    seen = functools.reduce(np.bitwise_or, (w.seen for w in written))
    videos = passes.raw.table("videos")
    out.write_table("videos", videos.filter(pa.array(np.unpackbits(seen, count=videos.num_rows).astype(bool))))
    out.write_table("filter_steps", pa.Table.from_pylist(counts))
    report = sum((w.counts for w in written), SplitCounts()).report(passes.splits)
    out.info = {"splits": report, "filter_steps": counts, "notes": notes}
    out.summary = row_counts(out.tables)
    return notes


def _filter(passes: "_Passes", workers: Work) -> tuple[Mask, list[FilterStep]]:
    """The videos to keep, and the steps."""
    numbers = range(passes.parts)
    criteria = filtering.applicable(workers.total("look for operations", passes.known_values, numbers), passes.filters)
    noise = workers.total("apply noise criteria", functools.partial(passes.noise, criteria), numbers)

    def run_round(before: Mask | None, kept: Mask) -> Round:
        return workers.total("apply minimum counts", functools.partial(passes.round, before, kept), numbers)

    return filtering.decide(noise, criteria, passes.filters, run_round)


def _refuse(steps: Sequence[FilterStep], settings: FilterSettings) -> None:
    rows = "\n".join(f"  {s.interactions:>10,} left after: {s.name}{s.note and f' - {s.note}'}" for s in steps)
    cause = filtering.blame(steps, "interactions", settings) if steps[0].interactions else "The log has none."
    raise InputError(f"no interaction passes the filters:\n{rows}\n{cause} Loosen it, or take more of the log.")


def _in_order(parts: Sequence[Part]) -> list[Part]:
    """By task, then by user: so the parts, one after the other, are in the order of one table."""
    return sorted(parts, key=lambda p: (p.keys.get("task", ""), p.file))


@dataclass(frozen=True)
class _Written:
    """The files of one part, and its counts."""

    parts: dict[str, list[Part]]
    counts: SplitCounts
    seen: np.ndarray
    """Bits: the videos that occur."""


@dataclass(frozen=True)
class _Passes:
    """The functions over one part; they run in this process or on workers."""

    raw: Artifact
    fs: fsspec.AbstractFileSystem
    folder: str
    filters: FilterSettings
    splits: SplitSettings
    seed: int

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self.raw.parts("interactions"))

    def read(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The interactions of a part."""
        return self.raw.part(self.raw.parts("interactions")[number], columns)

    def known_values(self, number: int) -> KnownValues:
        """How many values of the operations' columns the part has."""
        return KnownValues.of(self.read(number, [*filtering.OPERATIONS, "task"]))

    def noise(self, criteria: Sequence[Criterion], number: int) -> NoiseTally:
        """Applies the noise criteria, and leaves the part's packed rows for the passes that follow."""
        block = self.read(number, filtering.COLUMNS)
        rows = PackedRows.of(block, _video_ids(self.raw), criteria, self.filters.noise_scope)
        self._keep(number, rows)
        return filtering.noise_tally(rows)

    def round(self, before: Mask | None, kept: Mask, number: int) -> Round:
        """One round of the minimum counts."""
        return Round.of(self._packed(number), before, kept, self.filters)

    def candidates(self, kept: Mask, number: int) -> Candidates:
        """Divides the records, for the draw."""
        rows = self._passing(number, kept)
        block = self.read(number, splitting.COLUMNS).filter(rows)
        return Candidates.of(Division.of(block, self.splits), self.splits, self.seed)

    def write(self, kept: Mask, drawn: Drawn, number: int) -> _Written:
        """Writes the part."""
        block = self.read(number).filter(self._passing(number, kept))
        result, counts = splitting.finish(block, Division.of(block, self.splits), drawn, self.splits, self.seed)
        interactions = result.interactions
        users = self.raw.part(self.raw.parts("users")[number])
        ids = interactions["user_id"].unique()
        tables = {"user_splits": result.users, "users": users.filter(pc.is_in(users["user_id"], value_set=ids))}
        parts = {name: [self._write(name, number, table)] for name, table in tables.items()}
        parts["interactions"] = self._write_by_task(number, interactions)
        seen = pc.is_in(_video_ids(self.raw), value_set=interactions["video_id"].combine_chunks().unique())
        return _Written(parts, counts, np.packbits(seen.to_numpy(zero_copy_only=False)))

    def _write_by_task(self, number: int, interactions: pa.Table) -> list[Part]:
        if self.parts == 1:
            return [self._write("interactions", number, interactions)]
        tables = [(str(t), interactions.filter(pc.equal(interactions["task"], str(t)))) for t in sorted(Task)]
        return [self._write("interactions", number, t, task=name) for name, t in tables if t.num_rows]

    def _write(self, name: str, number: int, table: pa.Table, **keys: str) -> Part:
        file = part_file(name, number, self.parts, **keys)
        return write_part(self.fs, self.folder, file, table, users=f"{number}/{self.parts}", **keys)

    def _keep(self, number: int, rows: PackedRows) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **asdict(rows))
        self.fs.makedirs(f"{self.folder}/work", exist_ok=True)
        write_atomically(self.fs, self._packed_file(number), buffer.getvalue())

    def _packed(self, number: int) -> PackedRows:
        with self.fs.open(self._packed_file(number), "rb") as f, np.load(f) as arrays:
            fields = {name: arrays[name] for name in arrays}
        return PackedRows(**fields | {n: int(fields[n]) for n in ("videos", "criteria")})

    def _packed_file(self, number: int) -> str:
        return f"{self.folder}/work/rows-{number:06}.npz"

    def _passing(self, number: int, kept: Mask) -> pa.Array:
        return pa.array(filtering.passing(self._packed(number), kept, self.filters))


_cached: dict[tuple[str, str], pa.Array] = {}


def _video_ids(raw: Artifact) -> pa.Array:
    """The ids of all videos, kept between calls of a process."""
    key = raw.uri, raw.content
    if key not in _cached:
        _cached.clear()
        _cached[key] = raw.table("videos", ["video_id"])["video_id"].combine_chunks()
    return _cached[key]
