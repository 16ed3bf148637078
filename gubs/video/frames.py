"""The frame stage: puts every video's frames into the frame store, and decodes each content only once.

Videos go in batches through a Ray Data pool of workers (`decode_worker.py`). A worker writes the frames of its batch as
one part of the store and returns only hashes and verdicts. The part is the unit of progress: what is in the store is
never decoded again, whatever was killed in between.
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
from typing import Any, NamedTuple, cast

import pyarrow as pa

from gubs.artifacts import StageJob
from gubs.console import progress
from gubs.data.ifvr import IFVR
from gubs.data.settings import SourceSettings
from gubs.data.sources.media import videos_identity
from gubs.errors import PlatformError
from gubs.ray_runtime import beside_driver
from gubs.video.claims import Claims
from gubs.video.decode_worker import CLAIM_TIMEOUT_S, SCHEME, DecodeWorker, Limits, Row
from gubs.video.decoded import USABLE, DecodeOptions, Verdict
from gubs.video.frame_store import FrameStore
from gubs.video.settings import FrameSettings

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
"""Table `frames`: one row per video. `content_hash` (SHA-256) is the key of the frame store, null if the file could
not be read; `frames` is their number in the store, width and height their size; `duration_s` is the decodable span."""

_BATCH = 32
"""Most videos per batch, and so per part."""
_BATCHES_PER_WORKER = 8
"""Least number of batches per worker, if there are enough videos, so that all workers end at about the same time."""


class _Outcome(NamedTuple):
    content_hash: str | None = None
    verdict: str | None = None
    """None if the content is another batch's, or was in the store before."""
    detail: str = ""


@dataclass(frozen=True)
class FrameSummary:
    """The result of a run of the stage."""

    videos: int
    contents: int
    """Different contents of the readable files."""
    decoded: int
    """Contents decoded in this run; the store already had the others."""
    verdicts: dict[str, int]
    """Videos by verdict."""
    workers: int
    seconds: float
    store: str
    """The store's folder for these settings."""


def extract_frames(
    videos: Sequence[tuple[str, str | None]],
    settings: FrameSettings,
    store_uri: str,
    on_progress: Callable[[int, int], None] = lambda *_: None,
    *,
    base: str = "",
    retry_failed: bool = False,
) -> tuple[FrameSummary, pa.Table]:
    """Puts the frames of all videos into the store. A file that cannot be decoded gets a verdict and raises no error.

    Args:
        videos: (video_id, path or URI).
        settings: of the frames.
        store_uri: folder or URI of the store; every worker must reach it.
        on_progress: called with (videos done, all videos) after each batch.
        base: folder of relative paths; empty = the working folder.
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
    workers = max(1, min(settings.workers or int(ray.cluster_resources().get("CPU", 1)), len(videos)))
    outcomes = _run_pool(uris, settings, store, store.done(retry_failed), workers, on_progress) if videos else {}
    table = _table(videos, outcomes, store)
    readable = [o for o in outcomes.values() if o.content_hash is not None]
    summary = FrameSummary(
        videos=len(videos),
        contents=len({o.content_hash for o in readable}),
        decoded=len({o.content_hash for o in readable if o.verdict is not None}),
        verdicts=dict(sorted(Counter(table["verdict"].to_pylist()).items())),
        workers=workers,
        seconds=time.monotonic() - started,
        store=f"{store.uri}/{store.key}",
    )
    return summary, table


def files_identity(source: SourceSettings, **_: object) -> str:
    """Identity of the files in `source.videos_dir`; empty if there is none. Other videos belong to a stage of the run.

    Raises:
        InputError: the folder is missing.
    """
    return videos_identity(source.videos_dir, contents=True) if source.videos_dir else ""


def make(job: StageJob, frames: FrameSettings, **_: object) -> str:
    """Decodes the video files of the data set (table frames); returns a summary.

    With `job.force`, videos that timed out, crashed or were too large are decoded again.

    Raises:
        PlatformError: as `extract_frames`.
    """
    files = list(IFVR(job.run).video_files.items())
    store_uri = frames.store or f"{job.run.uri.rpartition('/')[0] or '.'}/frame-store"
    with progress("decoding videos") as on_progress:
        summary, table = extract_frames(files, frames, store_uri, on_progress, retry_failed=job.force)
    with job.writing() as out:
        out.write_table("frames", table)
        out.info.update(asdict(summary), store_uri=store_uri)
        counts = ", ".join(f"{n:,} {v}" for v, n in summary.verdicts.items())
        out.summary = counts or "this source has no video files"
    return out.summary


def _run_pool(
    uris: Sequence[str | None],
    settings: FrameSettings,
    store: FrameStore,
    done: set[str],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> dict[int, _Outcome]:
    import ray
    from ray.data import ActorPoolStrategy
    from ray.util.metrics import Counter as RayCounter

    decoded = RayCounter("gubs_decoded_videos", "Decoded videos", ("verdict",))
    claims = ray.remote(Claims).options(num_cpus=0, scheduling_strategy=beside_driver()).remote(done)
    run_id = f"{time.time_ns() // 10**6:012x}-{uuid.uuid4().hex[:6]}"
    limits = Limits(settings.timeout_s, settings.max_memory_mb)
    batches = list(_batches(uris, workers))
    dataset = ray.data.from_items(batches, override_num_blocks=len(batches)).map_batches(
        DecodeWorker,
        fn_constructor_args=(store.options, limits, store.uri, run_id, claims),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=min(1.0, ray.cluster_resources().get("CPU", 1.0) / workers),
    )
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = 600 + 2 * _BATCH * (settings.timeout_s + CLAIM_TIMEOUT_S)
    outcomes: dict[int, _Outcome] = {}
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in cast(pa.Table, table).to_pylist():
            outcomes[row["row"]] = _Outcome(row["content_hash"], row["verdict"], row["detail"])
            if row["verdict"]:
                decoded.inc(1, {"verdict": row["verdict"]})
        on_progress(len(outcomes), len(uris))
    return outcomes


def _batches(uris: Sequence[str | None], workers: int) -> Iterator[dict[str, Any]]:
    """Divides the videos into batches; their rows are pickled, since file names need not be text."""
    size = max(1, min(_BATCH, math.ceil(len(uris) / (workers * _BATCHES_PER_WORKER))))
    for batch, start in enumerate(range(0, len(uris), size)):
        rows: list[Row] = list(enumerate(uris[start : start + size], start))
        yield {"batch": batch, "rows": pickle.dumps(rows)}


def _table(videos: Sequence[tuple[str, str | None]], outcomes: Mapping[int, _Outcome], store: FrameStore) -> pa.Table:
    """Joins the outcomes with the rows of the store."""
    stored = store.index(refresh=True)
    hashes = sorted({o.content_hash for o in outcomes.values() if o.content_hash in stored})
    columns = ["content_hash", "verdict", "detail", "times_s", "duration_s", "width", "height"]
    facts = {row["content_hash"]: row for row in store.lookup(hashes, columns).to_pylist()}
    rows = []
    for i, (video_id, uri) in enumerate(videos):
        outcome = outcomes.get(i, _Outcome())
        name = None if uri is None else uri.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        fact = facts.get(outcome.content_hash or "") or {
            "verdict": outcome.verdict or Verdict.CRASHED,
            "detail": outcome.detail or "the batch that was to decode it was given up",
        }
        frames = len(fact.get("times_s") or []) if fact["verdict"] in USABLE else 0
        rows.append({"video_id": video_id, "uri": name, **fact, "content_hash": outcome.content_hash, "frames": frames})
    return pa.Table.from_pylist(rows, SCHEMA)


def _absolute(uri: str | None, base: str) -> str | None:
    """A URI with a scheme, or an absolute path, since workers have other working folders."""
    if not uri:
        return None
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    if SCHEME.match(uri):
        return uri
    if SCHEME.match(base):
        return f"{base.rstrip('/')}/{uri}"
    return os.path.abspath(Path(base, uri))  # noqa: PTH100 - resolves no links
