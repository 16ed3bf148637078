"""From logs to the data set at 1, 10 and 100 M interactions: time, rows per second, peak memory of all processes.

Beside it, the same work in DuckDB and in Polars (streaming), where these packages are installed: repeated rows, play
rates, noise criteria, minimum counts to the fixed point, histories and targets without divided pages, test users by a
hash, sorted Parquet. All must keep equally many interactions. Every run is a process of its own; its memory is the sum
of PSS of it and its children, every half second. The log is written before, a part per million rows, by time: each part
has rows of all users. A run that fails is recorded with the end of its output, and the next one follows.

    python benchmarks/preprocess.py --work DIR --out out.json
    python benchmarks/preprocess.py --rows 1e7 --work DIR --engines gubs --nodes 1 2 --out nodes.json

With `--nodes`, gubs runs on Ray nodes of one core each. The row `bound` is what the machine gives processes that share
nothing: beside each other, cores are slower than alone. On a machine of more cores: `taskset -c 0,1 python ...`.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

RECORDS, SHOWN = 62, 37
"""Records of a user and of a video, as in the paper's data set."""
PAGE = 8
PART_ROWS = 1_000_000
AIMS = {"seconds": 900.0, "peak_gib": 6.0, "of_duckdb": 0.5, "speed_up": 1.7}
"""For 100 M rows; share of DuckDB's speed; from one node of one core to two."""
ENGINES = ("gubs", "duckdb", "polars")
BOUND_ROWS, BOUND_ROUNDS = 2_000_000, 20
_EVERY_S, _LIMIT_S = 0.5, 7200.0
_SPARED_GIB = 2
"""Memory of the machine that engines in one process leave alone; otherwise the kernel may kill anything."""
MIN_VIEWS, MIN_EXPOSURES, MIN_HISTORY, CLICK_TARGETS, TEST_USERS, MAX_GAP_S = 10, 30, 2, 10, 1000, 120


def write_log(folder: Path, rows: int) -> None:
    """Writes `interactions/part-*.parquet` and `videos.parquet`, unless they are there."""
    done = folder / "done"
    if done.exists():
        return
    users, videos, parts = max(50, rows // RECORDS), max(20, rows // SHOWN), max(1, rows // PART_ROWS)
    (folder / "interactions").mkdir(parents=True, exist_ok=True)
    lengths = np.random.default_rng(0).uniform(10, 30, videos).round(1)
    pq.write_table(
        pa.table({"video_id": _ids("v", np.arange(videos)), "duration_s": lengths}), folder / "videos.parquet"
    )
    for part in range(parts):
        table = _part(part, rows // parts, users, lengths)
        pq.write_table(table, folder / "interactions" / f"part-{part:05}.parquet", compression="zstd")
    done.touch()


def _part(part: int, rows: int, users: int, lengths: np.ndarray) -> pa.Table:
    """One slice of time: half of the rows are views, half exposures in pages of `PAGE`."""
    rng = np.random.default_rng([1, part])
    user = rng.integers(0, users, rows)
    video = (len(lengths) * rng.random(rows) ** 1.5).astype(np.int64)
    click = np.arange(rows) % (2 * PAGE) < PAGE
    user = np.where(click, np.repeat(user[::PAGE], PAGE)[:rows], user)
    start = 1_700_000_000_000 + part * 3_600_000
    times = start + np.where(click, np.repeat(rng.integers(0, 3_600_000, rows)[::PAGE], PAGE)[:rows], 0)
    times = np.where(click, times + np.arange(rows) % PAGE, start + rng.integers(0, 3_600_000, rows))
    page = part * rows + np.arange(rows) // PAGE
    watch = np.minimum(rng.exponential(9, rows), 2 * lengths[video]).round(2)
    table = pa.table(
        {
            "user_id": _ids("u", user),
            "video_id": _ids("v", video),
            "task": pa.array(np.where(click, "click", "sequential")),
            "timestamp": times,
            "page_id": _masked(_ids("p", page), ~click),
            "clicked": pa.array(rng.random(rows) < 0.2, mask=~click),
            "watch_s": pa.array(watch, mask=click),
            "prev_op_gap_s": pa.array(rng.exponential(25, rows).round(1), mask=click | (rng.random(rows) < 0.02)),
            "next_op_gap_s": pa.array(rng.exponential(25, rows).round(1), mask=click | (rng.random(rows) < 0.02)),
            "exited_app": pa.array(rng.random(rows) < 0.02, mask=click),
        }
    )
    repeated = (rng.random(rows) < 0.005) & (np.arange(rows) > 0)
    return table.take(pa.array(np.arange(rows) - repeated))


def _ids(letter: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.string()), "")


def _masked(values: pa.Array, missing: np.ndarray) -> pa.Array:
    return pc.if_else(pa.array(missing), None, values)


def run_gubs(log: Path, out: Path, nodes: int) -> dict[str, float]:
    """The stages raw and ifvr; on `nodes` Ray nodes of one core each, if that is not 0."""
    from gubs import stages
    from gubs.artifacts import Run
    from gubs.config import load_settings

    chosen = ["source.kind=logs", f"source.path={log}", "filters.min_video_views=10", "filters.min_user_exposures=30"]
    chosen += ["splits.test_users=1000", "splits.ugm_users=1000", "splits.click_targets=10", "splits.min_history=2"]
    run, settings = Run(out.absolute()), load_settings("paper", chosen + (["data.ray_from_rows=0"] if nodes else []))
    with _nodes(nodes) if nodes else nullcontext():
        began = time.perf_counter()
        stages.make(["ifvr"], run, settings)
        seconds = round(time.perf_counter() - began, 1)  # without imports and the nodes' start
    return {"kept": run.artifact("ifvr").manifest.tables["interactions"].rows, "stages_s": seconds}


@contextmanager
def _nodes(nodes: int) -> Iterator[None]:
    """Machines of one core each: all processes of a node are pinned to a core. The head, which offers no CPUs, and the
    driver share the first one's.
    """
    cores = sorted(os.sched_getaffinity(0))
    if nodes > len(cores):
        raise SystemExit(f"--nodes {nodes}: this machine has {len(cores)} cores, and each node needs one of its own")
    first, *others = cores[:nodes]
    os.sched_setaffinity(0, {first})  # inherited by threads and processes that start later, so Ray comes after it
    import ray
    from ray.cluster_utils import Cluster

    store = 200 << 20
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store})
    for core in (first, *others):
        os.sched_setaffinity(0, {core})
        cluster.add_node(num_cpus=1, object_store_memory=store)
    os.sched_setaffinity(0, {first})
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


_RAW = """
SELECT *, CASE WHEN task = 'sequential' THEN least(watch_s / duration_s, 1.0) END AS play_rate FROM (
  SELECT i.*, v.duration_s, row_number() OVER (PARTITION BY user_id, video_id, timestamp, task) AS copy
  FROM read_parquet('{log}/interactions/*.parquet') i LEFT JOIN read_parquet('{log}/videos.parquet') v USING (video_id)
) WHERE copy = 1"""
_NOISE = f"""
SELECT *, (task = 'sequential' OR coalesce(clicked, false)) AS viewed FROM read_parquet('{{out}}/raw/*.parquet')
WHERE NOT (task = 'sequential' AND coalesce(play_rate < 0.3, false)) OR (
  prev_op_gap_s IS NOT NULL AND next_op_gap_s IS NOT NULL AND prev_op_gap_s + next_op_gap_s <= {MAX_GAP_S}
  AND NOT coalesce(exited_app, false))"""
_VIDEOS = f"SELECT video_id FROM remaining GROUP BY 1 HAVING count(*) FILTER (viewed) >= {MIN_VIEWS}"
_USERS = f"SELECT user_id, task FROM remaining WHERE task = 'click' GROUP BY ALL HAVING count(*) < {MIN_EXPOSURES}"
_BORDERS = f"""
SELECT *, CASE WHEN task = 'sequential' THEN total // 2 ELSE CASE
  WHEN before > 0 AND (after IS NULL OR total - {CLICK_TARGETS} - before <= after - total + {CLICK_TARGETS}) THEN before
  ELSE coalesce(after, 0) END END AS n_history FROM (
  SELECT *,
    coalesce(max(place) FILTER (border AND place <= total - {CLICK_TARGETS})
      OVER (PARTITION BY user_id, task), 0) AS before,
    min(place) FILTER (border AND place > total - {CLICK_TARGETS} AND place < total)
      OVER (PARTITION BY user_id, task) AS after
  FROM (
    SELECT *,
      place >= {MIN_HISTORY} AND place = max(page_end) OVER (PARTITION BY user_id, task ORDER BY place) AS border
    FROM (
      SELECT *, CASE WHEN page_id IS NULL THEN place ELSE max(place) OVER (PARTITION BY user_id, task, page_id) END
        AS page_end
      FROM (
        SELECT *, row_number() OVER (PARTITION BY user_id, task ORDER BY timestamp) AS place,
          count(*) OVER (PARTITION BY user_id, task) AS total
        FROM kept))))"""
_RESULT = """
SELECT *, CASE WHEN place <= n_history THEN 'history' ELSE 'target' END AS role,
  CASE WHEN t.user_id IS NULL THEN 'train' ELSE 'test' END AS split
FROM divided LEFT JOIN tested t USING (user_id)"""


def run_duckdb(log: Path, out: Path) -> dict[str, float]:
    """The same in SQL."""
    import duckdb

    db = duckdb.connect(str(out / "work.duckdb"))
    db.execute(f"SET threads = 2; SET memory_limit = '5GB'; SET temp_directory = '{out}/spill'")
    db.execute("SET preserve_insertion_order = false")
    (out / "raw").mkdir()
    db.execute(f"COPY ({_RAW.format(log=log)}) TO '{out}/raw/part.parquet' (FORMAT parquet, COMPRESSION zstd)")
    db.execute(f"CREATE TABLE quiet AS {_NOISE.format(out=out)}")
    db.execute("CREATE TABLE remaining AS SELECT user_id, video_id, task, viewed FROM quiet")
    before = -1
    while (now := db.execute("SELECT count(*) FROM remaining").fetchone()[0]) != before:
        before = now
        db.execute(f"CREATE OR REPLACE TABLE videos AS {_VIDEOS}")
        db.execute("CREATE OR REPLACE TABLE remaining AS SELECT c.* FROM remaining c SEMI JOIN videos USING (video_id)")
        db.execute(f"CREATE OR REPLACE TABLE rare AS {_USERS}")
        db.execute(
            "CREATE OR REPLACE TABLE remaining AS SELECT c.* FROM remaining c ANTI JOIN rare USING (user_id, task)"
        )
    db.execute("CREATE TABLE people AS SELECT DISTINCT user_id, task FROM remaining")
    db.execute(
        "CREATE VIEW kept AS SELECT q.* FROM quiet q SEMI JOIN videos USING (video_id) "
        "SEMI JOIN people USING (user_id, task)"
    )
    db.execute(
        f"CREATE TABLE divided AS SELECT * FROM ({_BORDERS}) WHERE n_history >= {MIN_HISTORY} AND n_history < total"
    )
    db.execute(
        f"CREATE TABLE tested AS SELECT user_id FROM (SELECT DISTINCT user_id FROM divided) ORDER BY hash(user_id) "
        f"LIMIT {TEST_USERS}"
    )
    db.execute(
        f"COPY ({_RESULT} ORDER BY task, user_id, place) TO '{out}/ifvr.parquet' (FORMAT parquet, COMPRESSION zstd)"
    )
    return {"kept": int(db.execute("SELECT count(*) FROM divided").fetchone()[0])}


def run_polars(log: Path, out: Path) -> dict[str, float]:
    """The same in Polars' streaming engine."""
    import polars as pl

    me, sequential = ["user_id", "task"], pl.col("task") == "sequential"
    raw = pl.scan_parquet(f"{log}/interactions/*.parquet").join(
        pl.scan_parquet(f"{log}/videos.parquet"), on="video_id", how="left"
    )
    raw = raw.unique(["user_id", "video_id", "timestamp", "task"], keep="any")
    raw = raw.with_columns(
        play_rate=pl.when(sequential).then((pl.col("watch_s") / pl.col("duration_s")).clip(upper_bound=1))
    )
    raw.sink_parquet(out / "raw.parquet", compression="zstd", engine="streaming")
    skip = sequential & (pl.col("play_rate") < 0.3).fill_null(value=False)
    gap = (pl.col("prev_op_gap_s") + pl.col("next_op_gap_s") <= MAX_GAP_S).fill_null(value=False)
    noise = ~skip | (gap & ~pl.col("exited_app").fill_null(value=False))
    kept = pl.scan_parquet(out / "raw.parquet").filter(noise)
    kept = kept.with_columns(viewed=sequential | pl.col("clicked").fill_null(value=False))
    remaining = kept.select("user_id", "video_id", "task", "viewed").collect(engine="streaming").lazy()
    before, now = -1, -2
    while now != before:
        before = now
        counts = remaining.group_by("video_id").agg(pl.col("viewed").sum())
        videos = counts.filter(pl.col("viewed") >= MIN_VIEWS).select("video_id").collect(engine="streaming")
        remaining = remaining.join(videos.lazy(), on="video_id", how="semi")
        counts = remaining.filter(pl.col("task") == "click").group_by("user_id").len()
        users = counts.filter(pl.col("len") < MIN_EXPOSURES).select("user_id", task=pl.lit("click"))
        remaining = remaining.join(users, on=me, how="anti").collect(engine="streaming").lazy()
        users = users.collect(engine="streaming")
        now = remaining.select(pl.len()).collect().item()
    clickers = remaining.filter(pl.col("task") == "click").select(me).unique().collect(engine="streaming")
    kept = kept.join(videos.lazy(), on="video_id", how="semi")
    kept = kept.filter(sequential | pl.col("user_id").is_in(clickers["user_id"].implode()))
    _polars_divided(kept).sink_parquet(out / "divided.parquet", compression="zstd", engine="streaming")
    divided = pl.scan_parquet(out / "divided.parquet")
    tested = divided.select("user_id").unique().collect(engine="streaming")
    tested = tested.sort(pl.col("user_id").hash()).head(TEST_USERS)["user_id"]
    split = pl.when(pl.col("user_id").is_in(tested.implode())).then(pl.lit("test")).otherwise(pl.lit("train"))
    divided.with_columns(split=split).sort(["task", "user_id", "place"]).sink_parquet(
        out / "ifvr.parquet", compression="zstd", engine="streaming"
    )
    return {"kept": pq.ParquetFile(out / "ifvr.parquet").metadata.num_rows}


def _polars_divided(kept: Any) -> Any:
    """The records that are left with their role, history or target; no page is divided."""
    import polars as pl

    me, sequential = ["user_id", "task"], pl.col("task") == "sequential"
    place = pl.int_range(1, pl.len() + 1).over(me)
    frame = kept.sort([*me, "timestamp"]).with_columns(place=place, total=pl.len().over(me).cast(pl.Int64))
    ends = pl.col("place").max().over([*me, "page_id"])
    frame = frame.with_columns(page_end=pl.when(pl.col("page_id").is_null()).then(pl.col("place")).otherwise(ends))
    border = (pl.col("page_end").cum_max().over(me) == pl.col("place")) & (pl.col("place") >= MIN_HISTORY)
    frame = frame.with_columns(border=border, ideal=pl.col("total") - CLICK_TARGETS)
    early, late = (
        pl.col("place") <= pl.col("ideal"),
        (pl.col("place") > pl.col("ideal")) & (pl.col("place") < pl.col("total")),
    )
    frame = frame.with_columns(
        before=pl.when(pl.col("border") & early).then(pl.col("place")).max().over(me).fill_null(0),
        after=pl.when(pl.col("border") & late).then(pl.col("place")).min().over(me),
    )
    nearer = (pl.col("before") > 0) & (
        pl.col("after").is_null() | (pl.col("ideal") - pl.col("before") <= pl.col("after") - pl.col("ideal"))
    )
    clicks = pl.when(nearer).then(pl.col("before")).otherwise(pl.col("after").fill_null(0))
    frame = frame.with_columns(n_history=pl.when(sequential).then(pl.col("total") // 2).otherwise(clicks))
    frame = frame.filter((pl.col("n_history") >= MIN_HISTORY) & (pl.col("n_history") < pl.col("total")))
    role = pl.when(pl.col("place") <= pl.col("n_history")).then(pl.lit("history")).otherwise(pl.lit("target"))
    return frame.with_columns(role=role)


class Memory(threading.Thread):
    """Watches the memory of a process and its children, and the CPU time they take."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.ended = pid, 0, threading.Event()
        self.seconds: dict[int, float] = {}

    def run(self) -> None:
        import psutil

        while not self.ended.wait(_EVERY_S):
            try:
                processes = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            total = 0
            for process in processes:
                try:
                    total += process.memory_full_info().pss
                    times = process.cpu_times()
                    self.seconds[process.pid] = times.user + times.system
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)

    @property
    def cpu_s(self) -> float:
        """CPU time so far, as last seen of each process."""
        return sum(self.seconds.values())


def measured(engine: str, log: Path, work: Path, nodes: int) -> dict[str, Any]:
    """Runs one engine in a process of its own."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [sys.executable, __file__, "--engine", engine, "--log", str(log), "--into", str(out), "--on", str(nodes)]
    printed, figures = watched(command, work / "errors.txt")
    if "failed" not in figures:
        figures |= json.loads(printed.splitlines()[-1])
    shutil.rmtree(out, ignore_errors=True)
    return figures


def watched(command: Sequence[str], errors: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Runs a command; what it printed, with its seconds, CPU time and peak memory.

    Args:
        command: is killed after two hours.
        errors: file for what it says on stderr. The last line is `error` if it fails; its exit code is `failed`.
    """
    began = time.perf_counter()
    with errors.open("w") if errors else nullcontext() as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        memory = Memory(process.pid)
        memory.start()
        try:
            printed, _ = process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            _kill(process.pid)
            printed, _ = process.communicate()
    seconds = time.perf_counter() - began
    memory.ended.set()
    figures: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "cpu_s": round(memory.cpu_s, 1),
        "peak_gib": round(memory.peak / 2**30, 2),
    }
    if process.returncode:
        error_lines = errors.read_text(errors="replace").strip().splitlines() if errors else []
        figures |= {"failed": process.returncode} | ({"error": error_lines[-1][:300]} if error_lines else {})
    return printed, figures


def _kill(pid: int) -> None:
    import psutil

    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        process.kill()


def bound(nodes: int) -> dict[str, Any]:
    """How much more Arrow work so many processes do than one, each pinned to a core and sharing nothing: no cluster of
    such nodes on this machine can be faster.
    """
    cores = sorted(os.sched_getaffinity(0))[:nodes]
    [alone], beside = _side_by_side(cores[:1]), _side_by_side(cores)
    return {"engine": "bound", "nodes": nodes, "alone_s": alone, "beside_s": beside} | {
        "speed_up": round(len(cores) * alone / max(beside), 2)
    }


def _side_by_side(cores: Sequence[int]) -> list[float]:
    """Seconds of the same work on each of the cores, begun at the same time."""
    context = multiprocessing.get_context("spawn")
    begin, seconds = context.Barrier(len(cores)), context.Queue()
    workers = [context.Process(target=_arrow_work, args=(c, BOUND_ROWS, begin, seconds), daemon=True) for c in cores]
    for worker in workers:
        worker.start()
    return sorted(seconds.get(timeout=_LIMIT_S) for _ in workers)


def _arrow_work(core: int, rows: int, begin: Barrier, seconds: "Queue[float]") -> None:
    os.sched_setaffinity(0, {core})
    pa.set_cpu_count(1)
    rng = np.random.default_rng(0)
    table = pa.table({"key": rng.integers(0, rows // RECORDS + 1, rows), "time": rng.random(rows)})
    begin.wait(_LIMIT_S)
    began = time.perf_counter()
    for _ in range(BOUND_ROUNDS):
        table.sort_by([("key", "ascending"), ("time", "ascending")]).group_by("key").aggregate([("time", "sum")])
    seconds.put(round(time.perf_counter() - began, 2))


def compared(runs: Sequence[dict[str, Any]]) -> None:
    """Adds to each run of gubs its share of DuckDB's speed and its speed-up against one node, at the same size."""
    by = {(run.get("rows"), run["engine"], run["nodes"]): run for run in runs if "failed" not in run}
    for (rows, engine, nodes), run in by.items():
        duckdb, one = by.get((rows, "duckdb", 0)), by.get((rows, "gubs", 1))
        if engine == "gubs" and duckdb and not nodes:
            run["of_duckdb"] = round(duckdb["seconds"] / run["seconds"], 2)
        if engine == "gubs" and one and nodes > 1:
            run["speed_up"] = round(one["stages_s"] / run["stages_s"], 2)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import psutil

    versions = {}
    for package in ("pyarrow", "ray", "duckdb", "polars"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    memory = round(psutil.virtual_memory().total / 2**30, 1)
    return {"cores": len(os.sched_getaffinity(0)), "memory_gib": memory, "versions": versions}


def runs_of(rows: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The runs at one size."""
    log = args.work / f"log-{rows}"
    write_log(log, rows)
    parts = list((log / "interactions").glob("*.parquet"))
    size = {"rows": rows, "parts": len(parts), "log_gib": round(sum(f.stat().st_size for f in parts) / 2**30, 3)}
    for engine in args.engines:
        for nodes in args.nodes if engine == "gubs" else [0]:
            run = size | {"engine": engine, "nodes": nodes} | measured(engine, log, args.work, nodes)
            yield run if "failed" in run else run | {"rows_per_s": round(rows / run["seconds"])}
    if "gubs" in args.engines:
        yield from ({"rows": rows} | bound(nodes) for nodes in args.nodes if nodes > 1)


def main() -> None:
    """Measures and prints; the file has what is measured so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--work", type=Path, help="folder for the logs and results")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=[0], help="gubs on so many Ray nodes of one core; 0: as usual"
    )
    parser.add_argument("--out", "--json", type=Path, help="JSON file of all runs")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--on", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        print(json.dumps(_run(args)))
        return
    runs: list[dict[str, Any]] = []
    for rows in map(int, args.rows):
        for run in runs_of(rows, args):
            runs.append(run)
            compared(runs)
            print(run, flush=True)
            if args.out:
                args.out.write_text(json.dumps({"machine": machine(), "aims": AIMS, "runs": runs}, indent=1) + "\n")
        if len(kept := {run["kept"] for run in runs if run["rows"] == rows and "kept" in run}) > 1:
            print(f"NOT THE SAME WORK: of {rows:,} rows they keep {sorted(kept)}", flush=True)


def _run(args: argparse.Namespace) -> dict[str, float]:
    """One engine, in this process."""
    if args.engine == "gubs":
        return run_gubs(args.log, args.into, args.on)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (total - (_SPARED_GIB << 30),) * 2)
    return (run_duckdb if args.engine == "duckdb" else run_polars)(args.log, args.into)


if __name__ == "__main__":
    main()
