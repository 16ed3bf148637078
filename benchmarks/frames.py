"""Frame extraction against a plain decord loop: videos per second, share of what the cores can give, peak memory.

Four measurements on the same files, the timed ones repeated in turn, since other work on the machine affects all:
(a) one process with a plain decord loop, the same frames at the same size as JPEG; (b) as many such processes as there
are cores, at once, which is what the cores can give; (c) the frame stage with a fresh store, from the call to the
table, with Ray running already; (d) the same from its first result on, without the start of its workers, which is
flattering with few videos: batches half done by then count in full. On a shared machine, look at CPU seconds per video
rather than at the clock. Memory is the summed RSS of this process and all below it (Ray's own included; shared pages
count several times), and what is left in Ray's object store.

    python benchmarks/frames.py --videos 200 2000 --json out.json
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gubs.config import FrameSettings
from gubs.video.frames import extract_frames

FPS, WIDTH, HEIGHT = 24, 320, 180


def make_video(path: str, seed: int) -> None:
    """Writes 6 to 10 s of H.264: drifting textures, moving boxes and a little noise."""
    import av

    rng = np.random.default_rng(seed)
    scene = np.kron(rng.integers(0, 256, (14, 24, 3)), np.ones((20, 20, 1))).astype(np.uint8)
    speed, box = rng.integers(1, 4, 2), rng.integers(0, 100, 2)
    noise = rng.integers(0, 12, (4, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(int(rng.integers(6 * FPS, 10 * FPS + 1))):
            dy, dx = (speed * i) % (280 - HEIGHT, 480 - WIDTH)
            picture = scene[dy : dy + HEIGHT, dx : dx + WIDTH] // 2 + noise[i % 4]
            y, x = (box + speed * i * 2) % (HEIGHT - 40, WIDTH - 40)
            picture[y : y + 40, x : x + 40] = 250 - picture[y : y + 40, x : x + 40]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def make_videos(folder: Path, count: int) -> list[str]:
    """Makes (or finds) that many distinct videos."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{i:05d}.mp4") for i in range(count)]
    missing = [(p, i) for i, p in enumerate(paths) if not Path(p).exists()]
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.starmap(make_video, missing, chunksize=8)
    return paths


def plain_loop(paths: Sequence[str], settings: FrameSettings, out: str) -> float:
    """What a sensible person would write: open, pick, scale in decord, one JPEG file per video. Returns CPU seconds."""
    import decord
    from PIL import Image

    from gubs.video.decode import target_size

    started = time.process_time()
    for path in paths:
        height, width = decord.VideoReader(path, num_threads=1)[0].shape[:2]
        w, h = target_size(width, height, settings.min_pixels, settings.max_pixels)
        reader = decord.VideoReader(path, width=w, height=h, num_threads=1)
        n, count = len(reader), settings.count
        frames = reader.get_batch([0, *((2 * k + 1) * n // (2 * count) for k in range(count))]).asnumpy()
        jpegs = []
        for frame in frames:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "JPEG", quality=settings.quality)
            jpegs.append(buffer.getvalue())
        Path(out, Path(path).stem).write_bytes(b"".join(jpegs))
    return time.process_time() - started


def plain_in(processes: int, paths: Sequence[str], settings: FrameSettings) -> tuple[float, float]:
    """Videos per second of that many plain loops at once, once all are up, and CPU seconds per video."""
    with tempfile.TemporaryDirectory() as out:
        shares = [(paths[i::processes], settings, out) for i in range(processes)]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.starmap(plain_loop, [(share[:2], *rest) for share, *rest in shares], chunksize=1)  # imports done
            started = time.perf_counter()
            cpu = sum(pool.starmap(plain_loop, shares, chunksize=1))
            return len(paths) / (time.perf_counter() - started), cpu / len(paths)


class Watch:
    """Samples RSS and CPU time of this process and all below it while it is entered."""

    def __init__(self) -> None:
        self.peak_rss = 0
        self._own_s = 0.0
        self._before: dict[int, float] = {}
        self._cpu: dict[int, float] = {}
        self._stop = threading.Event()

    def __enter__(self) -> "Watch":
        self._sample()
        self._before = dict(self._cpu)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    @property
    def cpu_s(self) -> float:
        """CPU seconds since it was entered, without the sampling, nor what a process did after its last sample."""
        return -self._own_s + sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._cpu.items())

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self._sample()
        self._own_s = time.thread_time()

    def _sample(self) -> None:
        rss = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed
                times = process.cpu_times()
                self._cpu[process.pid] = times.user + times.system
                rss += process.memory_info().rss
        self.peak_rss = max(self.peak_rss, rss)


def stage(paths: Sequence[str], settings: FrameSettings) -> dict[str, float]:
    """Runs the stage on a fresh store."""
    import ray

    first: list[float] = []

    def progress(done: int, _total: int) -> None:
        if not first:
            first.extend((time.perf_counter() - started, done))

    store = tempfile.mkdtemp(prefix="gubs-bench-store-")
    with Watch() as watch:
        started = time.perf_counter()
        summary, table = extract_frames([(Path(p).stem, p) for p in paths], settings, store, progress)
        seconds = time.perf_counter() - started
    shutil.rmtree(store)
    if summary.verdicts != {"ok": len(paths)}:
        raise SystemExit(f"not all videos were decoded: {summary.verdicts}")
    used = ray._private.internal_api.memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    return {
        "videos_per_s": len(paths) / seconds,
        "steady_videos_per_s": (len(paths) - first[1]) / (seconds - first[0]) if seconds > first[0] else 0.0,
        "first_result_s": first[0],
        "peak_rss_mb": watch.peak_rss / 2**20,
        "cpu_s_per_video": watch.cpu_s / len(paths),
        "rows": table.num_rows,
        "object_store_mb": _store_mb(used),
    }


def _store_mb(summary: str) -> float:
    used = [line.split() for line in summary.splitlines() if line.startswith("Plasma memory usage")]
    return float(used[0][3]) if used else float("nan")


def measure(paths: Sequence[str], settings: FrameSettings, cores: int, repeats: int) -> dict[str, Any]:
    """All measurements for one number of videos, in turn, `repeats` times; medians, and the ratios of each turn."""
    alone = paths[: max(50, len(paths) // 5)]
    turns = []
    for _ in range(repeats):
        turn: dict[str, float] = {}
        turn["plain_1"], turn["plain_1_cpu_s"] = plain_in(1, alone, settings)
        turn["plain_all"], turn["plain_all_cpu_s"] = plain_in(cores, paths, settings)
        turn |= stage(paths, settings)
        turn["ratio_cpu"] = turn["plain_all_cpu_s"] / turn["cpu_s_per_video"]
        turn["ratio_end_to_end"] = turn["videos_per_s"] / (turn["plain_1"] * cores)
        turn["ratio_steady"] = turn["steady_videos_per_s"] / (turn["plain_1"] * cores)
        turn["ratio_to_plain_all"] = turn["videos_per_s"] / turn["plain_all"]
        turn["ratio_steady_to_plain_all"] = turn["steady_videos_per_s"] / turn["plain_all"]
        turn["load_1min"] = os.getloadavg()[0]
        turns.append(turn)
        print(json.dumps({k: round(v, 3) for k, v in turn.items()}), flush=True)
    return {"videos": len(paths), "turns": turns} | {k: statistics.median(t[k] for t in turns) for k in turns[0]}


def report(results: Sequence[Mapping[str, Any]], cores: int) -> None:
    """Prints the table."""
    print(f"\n{cores} cores; medians of {len(results[0]['turns'])} turns; videos/s unless said")
    for r in results:
        print(f"{r['videos']} videos:")
        print(f"  plain decord loop: 1 process {r['plain_1']:.1f}, {cores} processes {r['plain_all']:.1f}")
        print(f"  stage: {r['videos_per_s']:.1f} end to end, {r['steady_videos_per_s']:.1f} after its first batch")
        print(f"  stage / (plain x cores): {r['ratio_end_to_end']:.2f} end to end, {r['ratio_steady']:.2f} steady")
        steady = r["ratio_steady_to_plain_all"]
        print(f"  stage / plain in {cores} processes: {r['ratio_to_plain_all']:.2f} end to end, {steady:.2f} steady")
        cpu = f"plain {r['plain_all_cpu_s'] * 1e3:.0f} ms, stage {r['cpu_s_per_video'] * 1e3:.0f} ms"
        print(f"  CPU per video: {cpu}, with the start of its workers and Ray's own; ratio {r['ratio_cpu']:.2f}")
        print(f"  peak memory {r['peak_rss_mb']:.0f} MiB RSS, object store {r['object_store_mb']:.1f} MiB")


def main() -> None:
    """Command line."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--videos", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "gubs-bench-videos"))
    parser.add_argument("--max-pixels", type=int, default=64 * 28 * 28)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = FrameSettings(max_pixels=args.max_pixels, workers=args.cores)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    paths = make_videos(args.folder, max(args.videos))
    ray.init(
        address="local",
        num_cpus=args.cores,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    stage(paths[: 4 * args.cores], settings)  # Ray's first worker processes
    results = [measure(paths[:n], settings, args.cores, args.repeats) for n in args.videos]
    report(results, args.cores)
    if args.json:
        args.json.write_text(json.dumps({"cores": args.cores, "settings": settings.model_dump(), "results": results}))
    ray.shutdown()


if __name__ == "__main__":
    main()
