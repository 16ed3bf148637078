"""The stages of the simulated app: its tables (`raw`), its hidden facts (`truth`), its videos (`videos`)."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache

import pyarrow as pa

from gubs.artifacts import Run, StageJob, write_atomically
from gubs.console import progress
from gubs.data.ingest import write_raw
from gubs.data.settings import DataSettings
from gubs.data.sources import SourceTables
from gubs.ray_runtime import quiet_ray_data
from gubs.simulator.behaviour import simulate
from gubs.simulator.population import TOPICS
from gubs.simulator.render import Scene, render
from gubs.simulator.settings import RenderSettings, SyntheticSettings

_BATCH = 16
"""Videos per Ray task; a kill loses one unfinished file per worker."""


def make_raw(job: StageJob, synthetic: SyntheticSettings, seed: int, data: DataSettings) -> str:
    """Simulates the app's log; returns a summary."""
    return write_raw(job, _simulated(synthetic, seed), data)


def make_truth(job: StageJob, synthetic: SyntheticSettings, seed: int) -> str:
    """Writes what no model may see: true causes, interests, flaws (tables skips, users, videos); returns a summary."""
    truth = _simulated(synthetic, seed).truth
    with job.writing() as out:
        for name, table in truth.items():
            out.write_table(name, table)
        out.info = {"note": "What the simulation knows and no model may see: true causes, interests, flaws."}
        out.summary = f"{truth['skips'].num_rows:,} true causes of skips"
    return out.summary


def make_videos(job: StageJob, render: RenderSettings) -> str:
    """Renders the videos (table files: video_id, file, bytes), except those that a killed attempt has finished; returns
    a summary.
    """
    run = job.run
    scenes = _scenes(job.input("truth").table("videos"), job.input("raw").table("videos"), render)
    with job.writing(resume_key=job.recipe.fingerprint(job.kind)) as out, progress("rendering videos") as on_progress:
        finished = {name.rsplit("/", 1)[-1] for name in run.fs.ls(out.folder, detail=False)}
        missing = [s for s in scenes if _file_name(s.video_id) not in finished]
        kept = len(scenes) - len(missing)
        for count, _ in enumerate(_render_on_ray(missing, run.uri, out.folder, render), start=kept + 1):
            on_progress(count, len(scenes))
        for name in run.fs.ls(out.folder, detail=False):
            if ".mp4.tmp-" in name:  # half written by a killed attempt
                run.fs.rm_file(name)
        files = [_file_name(s.video_id) for s in scenes]
        sizes = {e["name"].rsplit("/", 1)[-1]: e["size"] for e in run.fs.ls(out.folder, detail=True)}
        columns = {"video_id": [s.video_id for s in scenes], "file": files, "bytes": [sizes[f] for f in files]}
        out.write_table("files", pa.table(columns))
        out.info = {"videos": len(scenes), "rendered_now": len(missing), "kept_from_earlier_attempt": kept}
        out.summary = f"{len(scenes):,} files" + (f", {kept:,} of them from an earlier attempt" if kept else "")
    return out.summary


@lru_cache(1)
def _simulated(synthetic: SyntheticSettings, seed: int) -> SourceTables:
    """The simulation, cached since two stages write it."""
    tables = simulate(synthetic, seed)
    tables.check()
    return tables


def _scenes(truth: pa.Table, videos: pa.Table, settings: RenderSettings) -> list[Scene]:
    topics = {t.name: i for i, t in enumerate(TOPICS)}
    duration = dict(zip(videos["video_id"].to_pylist(), videos["duration_s"].to_pylist(), strict=True))
    scenes = []
    for i, row in enumerate(truth.to_pylist()):
        seconds = min(duration[row["video_id"]], settings.max_seconds)
        scenes.append(Scene(row["video_id"], topics[row["topic"]], row["flaw"], seconds, seed=i))
    return scenes


def _render_on_ray(scenes: list[Scene], run_uri: str, folder: str, settings: RenderSettings) -> Iterator[str]:
    """Renders the scenes on the cluster; yields the ids of finished videos as they arrive."""
    import ray.data

    if not scenes:
        return
    quiet_ray_data()

    def render_batch(batch: pa.Table) -> pa.Table:
        fs = Run(run_uri).fs
        for row in batch.to_pylist():
            scene = Scene(**row)
            write_atomically(fs, f"{folder}/{_file_name(scene.video_id)}", render(scene, settings))
        return batch.select(["video_id"])

    table = pa.Table.from_pylist([asdict(s) for s in scenes])
    dataset = (
        ray.data.from_arrow(table)
        .repartition(max(1, math.ceil(len(scenes) / _BATCH)))
        .map_batches(render_batch, batch_size=_BATCH, batch_format="pyarrow")
    )
    for row in dataset.iter_rows():
        yield row["video_id"]


def _file_name(video_id: str) -> str:
    return f"{video_id}.mp4"
