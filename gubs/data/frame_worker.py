"""A worker of the frame stage: files in, a part of the frame store and their outcomes out.

It fetches and hashes the next files while its decoder process decodes the present one, and asks the ledger which
contents are its own. It imports little, neither settings nor decoders: every worker of a run pays for it.
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
from typing import Any

import fsspec
import pyarrow as pa

from gubs.data.decoded import Decoded, DecodeOptions, Verdict
from gubs.data.decoder_process import PIPELINE, DecoderProcess
from gubs.data.frame_store import FrameStore
from gubs.data.video_file import Unfit, opened

SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(::|://)")
"""How a URI starts, other than a path."""

_AHEAD = 8
"""Files being fetched and hashed ahead of the decoder; as many more may be ready and wait for it."""
FETCHING = "gubs-fetch"
"""Name of the threads that do it."""
MAX_ATTEMPTS = 3
"""Workers a batch may cost before it is given up."""
LEDGER_TIMEOUT_S = 120.0
_UNSTORED = {Verdict.MISSING, Verdict.UNREADABLE, Verdict.EMPTY}
OUTCOME = pa.schema(
    [("row", pa.int64()), ("content_hash", pa.string()), ("verdict", pa.string()), ("detail", pa.string())]
)
"""What a worker says of each file; the verdict is null where the store had the content."""

Row = tuple[int, str | None]
"""Number of a video, and where it is."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may take: seconds, and MiB of address space beyond those of an idle decoder process."""

    timeout_s: float
    memory_mb: int


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


class _Fetch:
    """A file that a thread of its own fetches, which may hang on it for ever."""

    def __init__(self, fetch: Callable[[_File, str | None], None], row: int, uri: str | None):
        self._file = _File(row)
        self._answer: SimpleQueue[_File | Exception] = SimpleQueue()
        self._given_up = threading.Event()
        threading.Thread(target=self._run, args=(fetch, uri), name=FETCHING, daemon=True).start()

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

    def __init__(self, options: DecodeOptions, limits: Limits, store_uri: str, run_id: str, ledger: Any):
        self.options, self.limits, self.run_id, self.ledger = options, limits, run_id, ledger
        self.store = FrameStore(store_uri, options)
        self.decoder = DecoderProcess(options, limits.timeout_s, limits.memory_mb)
        self.decoder.start()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Takes batches of `_batches`, gives rows of `_OUTCOME`."""
        batches = zip(block["batch"].to_pylist(), block["rows"].to_pylist(), strict=True)
        return pa.concat_tables([self._batch(batch, pickle.loads(rows)) for batch, rows in batches])

    def _batch(self, batch: int, uris: Sequence[Row]) -> pa.Table:
        attempt = self._ask("begin", batch)
        if attempt > MAX_ATTEMPTS:
            gone = [
                _File(row, verdict=Verdict.CRASHED, detail=f"its batch cost {MAX_ATTEMPTS} workers") for row, _ in uris
            ]
            return _outcome_table(gone)
        part = f"{self.run_id}-{batch:06d}"
        before = self.store.facts_of_part(part) if attempt > 1 and self.store.has_part(part) else {}
        files, decoded = self._decode_batch(batch, uris, before)
        if decoded:
            self.store.write_part(part, decoded)
        return _outcome_table(files)

    def _decode_batch(
        self, batch: int, uris: Sequence[Row], before: Mapping[str, Verdict]
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

    def _fetched(self, batch: int, uris: Sequence[Row]) -> Generator[_File]:
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
                    ready.append(ahead.popleft().result(self.limits.timeout_s))
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

    def _ask(self, question: str, *args: Any) -> Any:
        import ray

        return ray.get(getattr(self.ledger, question).remote(*args), timeout=LEDGER_TIMEOUT_S)


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


def _outcome_table(files: Sequence[_File]) -> pa.Table:
    rows = [{"row": f.row, "content_hash": f.content_hash, "verdict": f.verdict, "detail": f.detail} for f in files]
    return pa.Table.from_pylist(rows, OUTCOME)
