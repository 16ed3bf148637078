"""The frame stage: every video's frames into the frame store, each content decoded once, ever.

Videos go in batches through a Ray Data pool of workers (`frame_worker.py`). A worker writes the frames of its batch as
one part of the store; only hashes and verdicts come back. The part is the unit of progress: what is in the store is
never decoded again, whoever was killed in between.
"""

import math
import os
import pickle
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from gubs.artifacts import Artifact, Run, fingerprint, writing
from gubs.config import FrameSettings, Settings
from gubs.data.decoded import USABLE, DecodeOptions, Verdict
from gubs.data.frame_store import FrameStore
from gubs.data.frame_worker import LEDGER_TIMEOUT_S, SCHEME, Limits, Row, Worker
from gubs.data.ledger import Ledger
from gubs.errors import PlatformError

STAGE = "frames"

SCHEMA = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        ("uri", pa.string()),
        ("content_hash", pa.string()),
        pa.field("verdict", pa.string(), nullable=False),
        ("detail", pa.string()),
        ("frames", pa.int32()),
        ("duration_s", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""Table `frames`: one row a video. `content_hash` (SHA-256) is the key of the frame store, null where the file could
not be read; `frames` is how many the store has, width and height their size; `duration_s` is what can be decoded."""

Progress = Callable[[int, int, Mapping[str, int]], None]
"""Told (videos done, videos in all, videos by verdict so far; content met before counts as `known`)."""

_BATCH = 32
"""Most videos in a batch, and so in a part."""
_BATCHES_A_WORKER = 8
"""Batches each worker gets at least, if there are videos enough, so that all end at about the same time."""


@dataclass(frozen=True)
class FrameSummary:
    """What a run of the stage did."""

    videos: int
    contents: int
    """Different contents among the files that could be read."""
    decoded: int
    """Contents decoded in this run; the others were in the store."""
    verdicts: dict[str, int]
    """Videos by verdict."""
    workers: int
    seconds: float
    store: str
    """Where the frames are: the store's folder for these settings."""


def extract_frames(
    videos: Sequence[tuple[str, str | None]],
    settings: FrameSettings,
    store_uri: str,
    progress: Progress | None = None,
    *,
    base: str = "",
    retry_failed: bool = False,
) -> tuple[FrameSummary, pa.Table]:
    """Puts the frames of all videos into the store. A file that cannot be decoded gets a verdict, never an error.

    Args:
        videos: (video_id, path or URI).
        settings: of the frames.
        store_uri: folder or URI of the store; every worker must reach it.
        progress: told after each batch.
        base: what relative paths are relative to; the working folder if not given.
        retry_failed: decode again what timed out, crashed or was too large.

    Returns:
        The summary, and a table of `SCHEMA` in the order of `videos`.

    Raises:
        PlatformError: Ray is not running, or no decoder process can be started. ArtifactError: the store is damaged.
    """
    import ray

    if not ray.is_initialized():
        raise PlatformError("the frame stage runs on Ray, which is not started: call ray.init() first")
    started = time.monotonic()
    store = FrameStore(_absolute(store_uri, "") or "", DecodeOptions.of(settings))
    store.clean()
    uris = [_absolute(uri, base) for _, uri in videos]
    known = store.done(retry_failed)
    workers = _worker_count(settings, len(videos))
    outcomes = _run(uris, settings, store, known, workers, progress) if videos else {}
    table = _table(videos, outcomes, store)
    fresh = {h for h, verdict, _ in outcomes.values() if h is not None and verdict is not None}
    summary = FrameSummary(
        videos=len(videos),
        contents=len({h for h, _, _ in outcomes.values() if h is not None}),
        decoded=len(fresh),
        verdicts=dict(sorted(Counter(table["verdict"].to_pylist()).items())),
        workers=workers,
        seconds=time.monotonic() - started,
        store=f"{store.uri}/{store.key}",
    )
    return summary, table


def frame_stage(
    run: Run,
    settings: Settings,
    videos: pa.Table,
    inputs: Mapping[str, str],
    force: bool = False,
    progress: Progress | None = None,
    base: str = "",
) -> Artifact:
    """Writes the artifact `frames`: the table `frames`, and in its info the counts by verdict and the store's place.

    Args:
        run: the run's folder.
        settings: all settings; those that only decide speed do not make another artifact.
        videos: columns video_id and uri (null where a source has no file).
        inputs: fingerprints of the artifacts the videos come from.
        force: make it again, and retry the videos that timed out, crashed or were too large.
        progress: told after each batch.
        base: what relative URIs in the table are relative to.

    Raises:
        ArtifactError: an artifact with other settings is in the way. PlatformError: as `extract_frames`.
    """
    decisive = asdict(DecodeOptions.of(settings.frames))
    mark = fingerprint(STAGE, decisive, inputs)
    if finished := run.finished(STAGE, mark, force):
        return finished
    store_uri = settings.frames.store or f"{run.uri.rpartition('/')[0] or '.'}/frame-store"
    pairs = list(zip(videos["video_id"].to_pylist(), videos["uri"].to_pylist(), strict=True))
    summary, table = extract_frames(pairs, settings.frames, store_uri, progress, base=base, retry_failed=force)
    with writing(run, STAGE, fingerprint=mark, settings=settings, inputs=inputs) as writer:
        writer.write_table("frames", table)
        writer.info.update(asdict(summary), store_uri=store_uri)
    return run.artifact(STAGE)


def _run(
    uris: Sequence[str | None],
    settings: FrameSettings,
    store: FrameStore,
    known: set[str],
    workers: int,
    progress: Progress | None,
) -> dict[int, tuple[str | None, str | None, str]]:
    """Runs the pool; row -> (content hash, verdict if it was decoded or refused here, detail)."""
    import ray
    from ray.data import ActorPoolStrategy

    ledger = ray.remote(num_cpus=0)(Ledger).remote(known)
    run_id = f"{time.time_ns() // 10**6:012x}-{uuid.uuid4().hex[:6]}"
    limits = Limits(settings.timeout_s, settings.max_memory_mb)
    batches = list(_batches(uris, workers))
    dataset = ray.data.from_items(batches, override_num_blocks=len(batches)).map_batches(
        Worker,
        fn_constructor_args=(store.options, limits, store.uri, run_id, ledger),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=min(1.0, ray.cluster_resources().get("CPU", 1.0) / workers),
    )
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = 600 + 2 * _BATCH * (settings.timeout_s + LEDGER_TIMEOUT_S)
    outcomes: dict[int, tuple[str | None, str | None, str]] = {}
    counts: Counter[str] = Counter()
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for line in cast(pa.Table, table).to_pylist():
            outcomes[line["row"]] = (line["content_hash"], line["verdict"], line["detail"])
            counts[line["verdict"] or "known"] += 1
        if progress is not None:
            progress(len(outcomes), len(uris), counts)
    return outcomes


def _batches(uris: Sequence[str | None], workers: int) -> Iterator[dict[str, Any]]:
    """Cuts the work into batches; their rows are pickled, for file names need not be text."""
    size = max(1, min(_BATCH, math.ceil(len(uris) / (workers * _BATCHES_A_WORKER))))
    for batch, start in enumerate(range(0, len(uris), size)):
        rows: list[Row] = list(enumerate(uris[start : start + size], start))
        yield {"batch": batch, "rows": pickle.dumps(rows)}


def _worker_count(settings: FrameSettings, videos: int) -> int:
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    return max(1, min(settings.workers or cpus, videos))


def _table(
    videos: Sequence[tuple[str, str | None]],
    outcomes: Mapping[int, tuple[str | None, str | None, str]],
    store: FrameStore,
) -> pa.Table:
    """Joins outcomes with what the store knows of each content."""
    stored = store.index(refresh=True)
    hashes = sorted({h for h, _, _ in outcomes.values() if h in stored})
    columns = ["content_hash", "verdict", "detail", "times_s", "duration_s", "width", "height"]
    facts = {row["content_hash"]: row for row in store.lookup(hashes, columns).to_pylist()}
    rows = []
    for i, (video_id, uri) in enumerate(videos):
        content_hash, verdict, detail = outcomes.get(i, (None, None, ""))
        name = None if uri is None else uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        fact = facts.get(content_hash or "") or {
            "verdict": verdict or Verdict.CRASHED,
            "detail": detail or "the batch that was to decode it was given up",
        }
        frames = len(fact.get("times_s") or []) if fact["verdict"] in USABLE else 0
        rows.append({"video_id": video_id, "uri": name, **fact, "content_hash": content_hash, "frames": frames})
    return pa.Table.from_pylist(rows, SCHEMA)


def _absolute(uri: str | None, base: str) -> str | None:
    """A URI with a scheme, or an absolute path; workers have other working folders."""
    if not uri:
        return None
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    if SCHEME.match(uri):
        return uri
    if SCHEME.match(base):
        return f"{base.rstrip('/')}/{uri}"
    return os.path.abspath(Path(base, uri))  # noqa: PTH100 - resolves no links
