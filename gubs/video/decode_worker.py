"""A worker of the frame stage: turns a batch of files into a part of the frame store and their outcomes.

It fetches and hashes the next files while its decoder process decodes the current one, and asks the claims which
contents to decode. It imports little, neither settings nor decoders, since every worker of a run pays for it.
"""

import hashlib
import os
import pickle
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from gubs.video.decoded import Decoded, DecodeOptions, Verdict
from gubs.video.decoder_process import PIPELINE, DecoderProcess
from gubs.video.file import Unfit, opened
from gubs.video.frame_store import FrameStore

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from gubs.video.claims import Claims

SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(::|://)")
"""The start of a URI, which no path has."""

_AHEAD = 8
"""Files that are fetched and hashed ahead of the decoder; as many more may be ready and wait for it."""
FETCHING = "gubs-fetch"
"""Name of the threads that fetch files."""
MAX_ATTEMPTS = 3
"""Workers that may die over a batch before it is given up."""
CLAIM_TIMEOUT_S = 120.0
_UNSTORED = {Verdict.MISSING, Verdict.UNREADABLE, Verdict.EMPTY}
OUTCOME = pa.schema(
    [("row", pa.int64()), ("content_hash", pa.string()), ("verdict", pa.string()), ("detail", pa.string())]
)
"""One row per file; the verdict is null if the store already had the content."""

Row = tuple[int, str | None]
"""Row number of a video, and the path or URI of its file."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits per file: seconds, and MiB of address space beyond that of an idle decoder process."""

    timeout_s: float
    memory_mb: int


@dataclass
class _File:
    """A file on its way to the decoder."""

    row: int
    path: str = ""
    content_hash: str | None = None
    verdict: Verdict | None = None
    """Set if the file need not be decoded, and after it was."""
    detail: str = ""
    claimed: bool = False
    """Whether this batch decodes the content."""
    temporary: bool = False

    def discard(self) -> None:
        """Removes the file if it was fetched."""
        if self.temporary:
            Path(self.path).unlink(missing_ok=True)


class _Fetch:
    """Fetches a file in a separate thread, which may hang forever."""

    def __init__(self, fetch: Callable[[_File, str | None], None], row: int, uri: str | None):
        self._file = _File(row)
        self._result: SimpleQueue[_File | Exception] = SimpleQueue()
        self._given_up = threading.Event()
        threading.Thread(target=self._run, args=(fetch, uri), name=FETCHING, daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether `result` returns without waiting."""
        return not self._result.empty()

    def result(self, timeout_s: float) -> _File:
        """The file, with a verdict if it could not be fetched."""
        try:
            result = self._result.get(timeout=timeout_s)
        except Empty:
            self.give_up()
            return _File(self._file.row, verdict=Verdict.TIMEOUT, detail="could not be fetched in time")
        if isinstance(result, Exception):
            raise result
        return result

    def give_up(self) -> None:
        """Removes what the thread has written; the thread removes the rest when it ends."""
        self._given_up.set()
        self._file.discard()

    def _run(self, fetch: Callable[[_File, str | None], None], uri: str | None) -> None:
        result: _File | Exception = self._file
        try:
            fetch(self._file, uri)
        except Unfit as e:
            self._file.verdict, self._file.detail = e.verdict, e.detail
        except Exception as e:  # noqa: BLE001 - not a verdict: the main thread raises it
            result = e
        self._result.put(result)
        if self._given_up.is_set():
            self._file.discard()


class DecodeWorker:
    """An actor of the pool: owns a decoder process and turns batches of files into parts and outcomes."""

    def __init__(
        self, options: DecodeOptions, limits: Limits, store_uri: str, run_id: str, claims: "ActorHandle[Claims]"
    ):
        self.options, self.limits, self.run_id, self.claims = options, limits, run_id, claims
        self.store = FrameStore(store_uri, options)
        self.decoder = DecoderProcess(options, limits.timeout_s, limits.memory_mb)
        self.decoder.start()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Takes batches of `frames._batches`, returns rows of `OUTCOME`."""
        batches = zip(block["batch"].to_pylist(), block["rows"].to_pylist(), strict=True)
        return pa.concat_tables([self._outcomes(batch, pickle.loads(rows)) for batch, rows in batches])

    def _outcomes(self, batch: int, rows: Sequence[Row]) -> pa.Table:
        attempt = self._ask("begin", batch)
        if attempt > MAX_ATTEMPTS:
            detail = f"its batch cost {MAX_ATTEMPTS} workers"
            return _outcome_table([_File(row, verdict=Verdict.CRASHED, detail=detail) for row, _ in rows])
        part = f"{self.run_id}-{batch:06d}"
        stored = self.store.verdicts_of_part(part) if attempt > 1 else {}
        files, decoded = self._decode_batch(batch, rows, stored)
        self.store.write_part(part, decoded)
        return _outcome_table(files)

    def _decode_batch(
        self, batch: int, rows: Sequence[Row], stored: Mapping[str, Verdict]
    ) -> tuple[list[_File], list[tuple[str, Decoded]]]:
        """Decodes a batch except for what an earlier attempt has stored, with up to `PIPELINE` files in the decoder.

        Returns:
            All files with their verdicts, and the new results by content hash, to be stored.
        """
        files: list[_File] = []
        results: list[tuple[str, Decoded]] = []
        waiting: deque[_File] = deque()

        def collect() -> None:
            file, decoded = waiting.popleft(), self.decoder.result()
            file.verdict, file.detail = decoded.verdict, decoded.detail
            file.discard()
            if file.content_hash is not None and decoded.verdict not in _UNSTORED:
                results.append((file.content_hash, decoded))

        seen: set[str] = set()
        fetched = self._fetched(batch, rows)
        try:
            for file in fetched:
                files.append(file)
                if not file.claimed or file.content_hash in seen:
                    file.discard()
                elif verdict := stored.get(file.content_hash or ""):
                    file.verdict = verdict
                    file.discard()
                else:
                    seen.add(file.content_hash or "")
                    if len(waiting) == PIPELINE:
                        collect()
                    self.decoder.submit(file.path)
                    waiting.append(file)
            while waiting:
                collect()
        finally:
            fetched.close()
            for file in waiting:
                file.discard()
        return files, results

    def _fetched(self, batch: int, rows: Sequence[Row]) -> Generator[_File]:
        """Files in order, fetched and hashed ahead of the requested one; all that are ready are claimed together."""
        rest = iter(rows)
        ahead: deque[_Fetch] = deque()
        ready: deque[_File] = deque()
        try:
            ahead.extend(_Fetch(self._fetch, *row) for row in islice(rest, _AHEAD))
            while ahead:
                while ahead and (ahead[0].ready or not ready):
                    ready.append(ahead.popleft().result(self.limits.timeout_s))
                ahead.extend(_Fetch(self._fetch, *row) for row in islice(rest, _AHEAD - len(ahead)))
                hashed = [file for file in ready if file.content_hash is not None]
                claims = self._ask("claim", batch, [file.content_hash for file in hashed]) if hashed else []
                for file, claimed in zip(hashed, claims, strict=True):
                    file.claimed = claimed
                while ready:
                    yield ready.popleft()
        finally:
            for fetch in ahead:
                fetch.give_up()
            for file in ready:
                file.discard()

    def _fetch(self, file: _File, uri: str | None) -> None:
        """Makes a file local and hashes it; raises Unfit if it cannot be read."""
        if uri is None:
            raise Unfit(Verdict.MISSING, "the video has no file")
        limit = self.options.max_file_mb * 2**20
        if SCHEME.match(uri):
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

    def _ask(self, method: str, *args: object) -> Any:
        import ray

        return ray.get(getattr(self.claims, method).remote(*args), timeout=CLAIM_TIMEOUT_S)


def _download(file: _File, uri: str, limit: float) -> None:
    """Fetches a remote file into a temporary one; raises Unfit if it is missing, too large or unreadable."""
    try:
        fs, remote = fsspec.core.url_to_fs(uri)
        size = fs.size(remote) or 0
        if size <= limit:
            handle, file.path = tempfile.mkstemp(prefix="gubs-video-")
            file.temporary = True
            os.close(handle)
            fs.get_file(remote, file.path)
    except Exception as e:  # noqa: BLE001 - each file system has other errors; all are this file's verdict
        file.discard()
        verdict = Verdict.MISSING if isinstance(e, FileNotFoundError) else Verdict.UNREADABLE
        raise Unfit(verdict, f"cannot be fetched: {type(e).__name__}: {e}"[:500]) from None
    if size > limit:
        raise Unfit(Verdict.TOO_LARGE, f"{size / 2**20:.0f} MiB, the limit is {limit / 2**20:.0f}")


def _outcome_table(files: Sequence[_File]) -> pa.Table:
    return pa.Table.from_pylist([vars(file) for file in files], OUTCOME)
