"""The frame stage: every video's frames into the frame store, each content decoded once, ever.

Videos go in batches through a Ray Data pool of workers. A worker fetches and hashes the next files while its decoder
process decodes the present one, asks the ledger whether a content is new, and writes the frames of its batch as one
part of the store; only hashes and verdicts come back. The part is the unit of progress: what is in the store is never
decoded again, whoever was killed in between.
"""

import hashlib
import math
import os
import pickle
import re
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, cast

import fsspec
import pyarrow as pa

from gubs.artifacts import Artifact, Run, fingerprint, writing
from gubs.config import FrameSettings, Settings
from gubs.data.decoded import USABLE, Decoded, DecodeOptions, Verdict
from gubs.data.decoder_process import PIPELINE, DecoderProcess
from gubs.data.frame_store import FrameStore
from gubs.data.video_file import Unfit, opened
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
_AHEAD = 8
"""Files being fetched and hashed ahead of the decoder; as many more may be ready and wait for it."""
_MAX_ATTEMPTS = 3
"""Workers a batch may cost before it is given up."""
_LEDGER_TIMEOUT_S = 120.0
_UNSTORED = {Verdict.MISSING, Verdict.UNREADABLE, Verdict.EMPTY}
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(::|://)")
_OUTCOME = pa.schema(
    [("row", pa.int64()), ("content_hash", pa.string()), ("verdict", pa.string()), ("detail", pa.string())]
)


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


class Ledger:
    """Who decodes what: an actor that gives each content to one batch, and counts the workers a batch has cost."""

    def __init__(self, done: set[str]):
        self._done, self._owner, self._attempts = done, dict[str, int](), Counter[int]()

    def begin(self, batch: int) -> int:
        """A worker starts a batch; returns which attempt that is, from 1."""
        self._attempts[batch] += 1
        return self._attempts[batch]

    def claim(self, batch: int, hashes: Sequence[str]) -> list[bool]:
        """Of each content, whether that batch is to decode it: it is new, or its own from an attempt before."""
        return [h not in self._done and self._owner.setdefault(h, batch) == batch for h in hashes]


@dataclass
class _File:
    """A file on its way to the decoder."""

    row: int
    path: str = ""
    content_hash: str | None = None
    verdict: Verdict | None = None
    """Known without decoding."""
    detail: str = ""
    mine: bool = False
    """To be decoded here."""
    temporary: bool = False

    def discard(self) -> None:
        """Removes the file if it was fetched."""
        if self.temporary:
            Path(self.path).unlink(missing_ok=True)


_Row = tuple[int, str | None]
"""Number of a video, and where it is."""


class _Fetch:
    """A file that a thread of its own fetches, which may hang on it for ever."""

    def __init__(self, fetch: Callable[[_File, str | None], None], row: int, uri: str | None):
        self._file = _File(row)
        self._answer: SimpleQueue[_File | Exception] = SimpleQueue()
        self._given_up = threading.Event()
        threading.Thread(target=self._run, args=(fetch, uri), daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether `result` would not wait."""
        return not self._answer.empty()

    def result(self, timeout_s: float) -> _File:
        """The file, with a verdict if it could not be fetched."""
        try:
            answer = self._answer.get(timeout=timeout_s)
        except Empty:
            self.give_up()
            return _File(self._file.row, verdict=Verdict.TIMEOUT, detail="could not be fetched in time")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def give_up(self) -> None:
        """Nobody waits for it any more: what it has written goes now, and what it has yet to write as it ends."""
        self._given_up.set()
        self._file.discard()

    def _run(self, fetch: Callable[[_File, str | None], None], uri: str | None) -> None:
        answer: _File | Exception = self._file
        try:
            fetch(self._file, uri)
        except Unfit as e:
            self._file.verdict, self._file.detail = e.verdict, e.detail
        except Exception as e:  # noqa: BLE001 - no verdict: the main thread raises it
            answer = e
        self._answer.put(answer)
        if self._given_up.is_set():
            self._file.discard()


class Worker:
    """One actor of the pool: owns a decoder process, turns a batch of files into a part and its outcomes."""

    def __init__(self, settings: FrameSettings, store_uri: str, run_id: str, ledger: Any):
        self.settings, self.run_id, self.ledger = settings, run_id, ledger
        options = DecodeOptions.of(settings)
        self.store = FrameStore(store_uri, options)
        self.decoder = DecoderProcess(options, settings.timeout_s, settings.max_memory_mb)
        self.decoder.start()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Takes batches of `_batches`, gives rows of `_OUTCOME`."""
        batches = zip(block["batch"].to_pylist(), block["rows"].to_pylist(), strict=True)
        return pa.concat_tables([self._batch(batch, pickle.loads(rows)) for batch, rows in batches])

    def _batch(self, batch: int, uris: Sequence[_Row]) -> pa.Table:
        attempt = self._ask("begin", batch)
        if attempt > _MAX_ATTEMPTS:
            gone = [
                _File(row, verdict=Verdict.CRASHED, detail=f"its batch cost {_MAX_ATTEMPTS} workers") for row, _ in uris
            ]
            return _outcome_table(gone)
        part = f"{self.run_id}-{batch:06d}"
        before = self.store.facts_of_part(part) if attempt > 1 and self.store.has_part(part) else {}
        files, decoded = self._decode_batch(batch, uris, before)
        if decoded:
            self.store.write_part(part, decoded)
        return _outcome_table(files)

    def _decode_batch(
        self, batch: int, uris: Sequence[_Row], before: Mapping[str, Verdict]
    ) -> tuple[list[_File], list[tuple[str, Decoded]]]:
        """Outcomes of all files, and what is to be stored; keeps the decoder `PIPELINE` deep in work."""
        files: list[_File] = []
        stored: list[tuple[str, Decoded]] = []
        waiting: deque[_File] = deque()

        def take() -> None:
            file, done = waiting.popleft(), self.decoder.result()
            file.verdict, file.detail = done.verdict, done.detail
            file.discard()
            if file.content_hash is not None and done.verdict not in _UNSTORED:
                stored.append((file.content_hash, done))

        seen: set[str] = set()
        fetched = self._fetched(batch, uris)
        try:
            for file in fetched:
                files.append(file)
                if not file.mine or file.content_hash in seen:
                    file.discard()
                elif verdict := before.get(file.content_hash or ""):
                    file.verdict = verdict
                    file.discard()
                else:
                    seen.add(file.content_hash or "")
                    if len(waiting) == PIPELINE:
                        take()
                    self.decoder.submit(file.path)
                    waiting.append(file)
            while waiting:
                take()
        finally:
            fetched.close()
            for file in waiting:
                file.discard()
        return files, stored

    def _fetched(self, batch: int, uris: Sequence[_Row]) -> Generator[_File]:
        """Files in order, fetched and hashed ahead of the one that is asked for, and claimed as many as are ready."""
        rest = iter(uris)
        ahead: deque[_Fetch] = deque()
        ready: deque[_File] = deque()
        try:
            while True:
                ahead.extend(_Fetch(self._fetch, *row) for row in islice(rest, _AHEAD - len(ahead)))
                if not ahead:
                    return
                while ahead and (ahead[0].ready or not ready):
                    ready.append(ahead.popleft().result(self.settings.timeout_s))
                ahead.extend(_Fetch(self._fetch, *row) for row in islice(rest, _AHEAD - len(ahead)))
                self._claim(batch, [file for file in ready if file.content_hash is not None])
                while ready:
                    yield ready.popleft()
        finally:
            for fetch in ahead:
                fetch.give_up()
            for file in ready:
                file.discard()

    def _claim(self, batch: int, files: Sequence[_File]) -> None:
        """Asks the ledger which of the files are to be decoded here."""
        if files:
            for file, mine in zip(files, self._ask("claim", batch, [f.content_hash for f in files]), strict=True):
                file.mine = mine

    def _fetch(self, file: _File, uri: str | None) -> None:
        """Makes the file local and hashes it.

        Raises:
            Unfit: it cannot be read.
        """
        if uri is None:
            raise Unfit(Verdict.MISSING, "the video has no file")
        limit = self.settings.max_file_mb * 2**20
        if _SCHEME.match(uri):
            _download(file, uri, limit)
        else:
            file.path = uri
        try:
            with opened(file.path, limit) as f:
                file.content_hash = hashlib.file_digest(f, "sha256").hexdigest()
        except OSError as e:
            raise Unfit(Verdict.UNREADABLE, f"cannot be read: {e.strerror}") from None
        finally:
            if file.content_hash is None:
                file.discard()

    def _ask(self, question: str, *args: Any) -> Any:
        import ray

        return ray.get(getattr(self.ledger, question).remote(*args), timeout=_LEDGER_TIMEOUT_S)


def _download(file: _File, uri: str, limit: float) -> None:
    """Fetches a remote file into a temporary one.

    Raises:
        Unfit: missing, too large, or unreadable for whatever reason.
    """
    try:
        fs, remote = fsspec.core.url_to_fs(uri)
        size = fs.size(remote) or 0
        if size <= limit:
            handle, file.path = tempfile.mkstemp(prefix="gubs-video-")
            file.temporary = True
            os.close(handle)
            fs.get_file(remote, file.path)
    except Exception as e:  # noqa: BLE001 - file systems have errors of their own; each is this file's verdict
        file.discard()
        verdict = Verdict.MISSING if isinstance(e, FileNotFoundError) else Verdict.UNREADABLE
        raise Unfit(verdict, f"cannot be fetched: {type(e).__name__}: {e}"[:500]) from None
    if size > limit:
        raise Unfit(Verdict.TOO_LARGE, f"{size / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f}")


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
    batches = list(_batches(uris, workers))
    dataset = ray.data.from_items(batches, override_num_blocks=len(batches)).map_batches(
        Worker,
        fn_constructor_args=(settings, store.uri, run_id, ledger),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=workers),
        num_cpus=min(1.0, ray.cluster_resources().get("CPU", 1.0) / workers),
    )
    dataset.context.enable_progress_bars = False
    dataset.context.execution_no_progress_timeout_s = 600 + 2 * _BATCH * (settings.timeout_s + _LEDGER_TIMEOUT_S)
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
        rows: list[_Row] = list(enumerate(uris[start : start + size], start))
        yield {"batch": batch, "rows": pickle.dumps(rows)}


def _worker_count(settings: FrameSettings, videos: int) -> int:
    import ray

    cpus = int(ray.cluster_resources().get("CPU", 1))
    return max(1, min(settings.workers or cpus, videos))


def _outcome_table(files: Sequence[_File]) -> pa.Table:
    rows = [{"row": f.row, "content_hash": f.content_hash, "verdict": f.verdict, "detail": f.detail} for f in files]
    return pa.Table.from_pylist(rows, _OUTCOME)


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
    if _SCHEME.match(uri):
        return uri
    if _SCHEME.match(base):
        return f"{base.rstrip('/')}/{uri}"
    return os.path.abspath(Path(base, uri))  # noqa: PTH100 - resolves no links
