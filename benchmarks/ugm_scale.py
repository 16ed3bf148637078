"""The UGM at scale: time and peak memory for 10 K, 100 K and 1 M users, of whom 1,000 make 50 groups.

The whole stage without its calls (`ugm.author=evidence`): users and log are read from an artifact with 20 records per
user, groups are made, checked and measured, everybody is placed, and the result is written. Each size runs in a
process of its own, so that peak memory is its own; the data are made before.

    python benchmarks/ugm_scale.py --json out.json
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import Recipe, Run, StageJob, TableInfo, writing
from gubs.config import Settings, load_settings
from gubs.records import SCHEMAS

GROUPS, UGM_USERS, RECORDS = 50, 1000, 20
TOPICS, VIDEOS, OCCUPATIONS, TAGS, ARCHETYPES = 300, 5000, 20, 6, 60
MAX_GIB, MAX_S = 2.0, 180.0
"""For 1 M users."""
_BLOCK = 65_536

SPLITS = pa.schema([("user_id", pa.string()), ("task", pa.string()), ("split", pa.string()), ("ugm", pa.bool_())])


def make_data(run: Run, users: int, settings: Settings) -> None:
    """Writes an artifact `ifvr`: users of 60 kinds with six tags each, every hundredth without any, and their log."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, TOPICS, (ARCHETYPES, TAGS))
    topics = pa.array([f"topic {i}" for i in range(TOPICS)])
    every = max(1, users // UGM_USERS)
    with writing(run, "ifvr", recipe=Recipe(), settings=settings.model_dump(mode="json")) as out:
        videos = {"video_id": [f"v{i}" for i in range(VIDEOS)], "title": [f"Title {i % 97}" for i in range(VIDEOS)]}
        columns = videos | {
            "duration_s": rng.uniform(5, 120, VIDEOS),
            "tags": [[f"topic {i % TOPICS}"] for i in range(VIDEOS)],
        }
        out.write_table("videos", pa.table(columns, schema=_part("videos", columns)))
        ids = pa.array([f"u{i:07d}" for i in range(users)])
        wanted = pa.array(np.arange(users) % every == 0)
        splits = {"user_id": ids, "task": pa.repeat("sequential", users), "split": pa.repeat("train", users)}
        out.write_table("user_splits", pa.table(splits | {"ugm": wanted}, schema=SPLITS))
        names = pa.array([f"v{i}" for i in range(VIDEOS)])
        with _TableWriter(out, "users") as write_users, _TableWriter(out, "interactions") as write_log:
            for start in range(0, users, _BLOCK):
                n = min(_BLOCK, users - start)
                block, own = ids.slice(start, n), kinds[rng.integers(0, ARCHETYPES, n)].astype(np.int32)
                lengths = np.where(np.arange(start, start + n) % 100 == 50, 0, TAGS)
                flat = topics.take(pa.array(own[lengths > 0].ravel()))
                offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                write_users(user_id=block, age=rng.integers(15, 80, n), tags=pa.ListArray.from_arrays(offsets, flat))
                rows = n * RECORDS
                liked = np.repeat(own[:, 0], RECORDS) + TOPICS * rng.integers(0, VIDEOS // TOPICS, rows)
                shown = np.where(rng.random(rows) < 0.5, liked, rng.integers(0, VIDEOS, rows))
                write_log(
                    interaction_id=pa.repeat("i", rows),
                    user_id=block.take(pa.array(np.repeat(np.arange(n), RECORDS))),
                    video_id=names.take(pa.array(shown)),
                    task=pa.repeat("sequential", rows),
                    timestamp=np.tile(np.arange(RECORDS), n),
                    play_rate=np.where(shown == liked, 0.8, 0.2) + rng.uniform(-0.1, 0.1, rows),
                    disliked=rng.random(rows) < 0.05,
                    split=pa.repeat("train", rows),
                    role=pa.repeat("history", rows),
                )


def run_size(folder: str, users: int) -> dict[str, Any]:
    """Makes groups of that many users, and measures."""
    from gubs.ugm.stage import make

    settings = load_settings("paper", ["ugm.author=evidence", f"ugm.groups={GROUPS}"])
    job = StageJob(Run(folder), "ugm", "ugm", Recipe(inputs={"ifvr": ""}), settings.model_dump(mode="json"))
    before, started = _peak_gib(), time.perf_counter()
    summary = make(job, settings.ugm, settings.llm, settings.seed)
    seconds = time.perf_counter() - started
    return {"users": users, "seconds": seconds, "peak_gib": _peak_gib(), "before_gib": before, "summary": summary}


def _part(name: str, columns: Any) -> pa.Schema:
    return pa.schema([f for f in SCHEMAS[name] if f.name in columns])


class _TableWriter:
    """Writes a table of an artifact block by block; columns that are not given are null."""

    def __init__(self, out: Any, name: str):
        self._out, self._name, self._rows = out, name, 0
        self._schema = SCHEMAS["ifvr" if name == "interactions" else name]
        self._path = out.path(f"{name}.parquet")
        self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd")

    def __enter__(self) -> Any:
        return self.write

    def write(self, **columns: Any) -> None:
        n = len(columns["user_id"])
        arrays = [
            pa.array(columns[f.name]).cast(f.type) if f.name in columns else pa.nulls(n, f.type) for f in self._schema
        ]
        self._writer.write_table(pa.table(arrays, schema=self._schema), row_group_size=_BLOCK)
        self._rows += n

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._out.tables[self._name] = TableInfo(rows=self._rows, bytes=Path(self._path).stat().st_size)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _in_a_process(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Runs all sizes and prints one line per size; fails if 1 M users take more than the bounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for users in args.users:
        with tempfile.TemporaryDirectory() as folder:
            _in_a_process(make_data, Run(folder), users, load_settings("paper", []))
            r = _in_a_process(run_size, folder, users)
        results.append(r)
        memory = f"peak {r['peak_gib']:.2f} GiB ({r['before_gib']:.2f} before)"
        print(f"{users:>9,} users: {r['seconds']:6.1f} s, {memory}: {r['summary']}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"groups": GROUPS, "records_each": RECORDS, "results": results}, indent=1))
    large = [r for r in results if r["users"] >= 1_000_000]
    if any(r["peak_gib"] > MAX_GIB or r["seconds"] > MAX_S for r in large):
        raise SystemExit(f"1 M users may take {MAX_GIB:g} GiB and {MAX_S:g} s")


if __name__ == "__main__":
    main()
