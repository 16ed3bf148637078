"""The log of decisions, of versions that act and of versions in shadow: Parquet files that evaluation reads."""

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.serving.filter import Mode
from gubs.serving.schemas import FilterRequest, Result

SCHEMA = pa.schema(
    [
        pa.field("time_ms", pa.int64(), nullable=False),
        ("request_id", pa.string()),
        ("user_id", pa.string()),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("app", pa.string(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("acted", pa.bool_(), nullable=False),
        pa.field("decision", pa.string(), nullable=False),
        ("option", pa.string()),
        ("skip_probability", pa.float64()),
        ("threshold", pa.float64()),
        ("error", pa.string()),
    ]
)
"""One row per candidate and version. `user_id` is null for a user who was sent with the request."""

_MOST_ROWS = 1_000_000
"""Rows that wait while nothing can be written; of more, the oldest are lost."""
_Row = tuple[Any, ...]
"""In the order of `SCHEMA`."""
_log = logging.getLogger("ray.serve")


class ShadowLog:
    """Collects rows and writes them as files, each whole, every few seconds."""

    def __init__(self, folder: str, seconds: float):
        self._fs, self._folder = fsspec.core.url_to_fs(folder)
        self._fs.makedirs(self._folder, exist_ok=True)
        self._rows = deque[_Row](maxlen=_MOST_ROWS)
        self._lost = 0
        """Rows that were lost since somebody was told."""
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._seconds = seconds
        threading.Thread(target=self._flush_now_and_then, daemon=True, name="gubs-log").start()

    def add(
        self,
        app: str,
        version: str,
        request: FilterRequest,
        mode: Mode,
        threshold: float,
        results: Sequence[Result],
        *,
        acted: bool,
    ) -> None:
        """Adds the decisions about a request's candidates."""
        asked = (int(time.time() * 1e3), request.request_id, request.user.id)
        how = (str(request.task), str(mode), app, version, acted)
        rows = [(*asked, r.id, *how, *_outcome(r, threshold)) for r in results]
        with self._lock:
            self._put(self._rows, rows)

    def _put(self, rows: deque[_Row], more: Iterable[_Row]) -> None:
        """Adds rows; counts those that go for lack of room."""
        before = len(rows)
        more = list(more)
        rows.extend(more)
        self._lost += before + len(more) - len(rows)

    def flush(self) -> None:
        """Writes what has been collected; returns when all of it is written, also by another thread."""
        with self._writing:
            with self._lock:
                rows, self._rows = self._rows, deque(maxlen=_MOST_ROWS)
            if not rows:
                return
            try:
                self._write(rows)
            except BaseException:
                with self._lock:
                    self._put(rows, self._rows)
                    self._rows = rows
                raise

    def _write(self, rows: Iterable[_Row]) -> None:
        name = f"{self._folder}/decisions-{int(time.time() * 1e3):013d}-{uuid.uuid4().hex[:6]}"
        columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
        try:
            with self._fs.open(f"{name}.tmp", "wb") as f:
                pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), f, compression="zstd")
            self._fs.mv(f"{name}.tmp", f"{name}.parquet")
        except BaseException:
            with contextlib.suppress(Exception):  # it may not be there, and what failed before is told
                self._fs.rm(f"{name}.tmp")
            raise

    def _flush_now_and_then(self) -> None:
        while True:
            time.sleep(self._seconds)
            try:
                self.flush()
            except Exception:  # noqa: BLE001 - each kind of storage has errors of its own, and this thread must go on
                _log.exception("the log of decisions cannot be written; it is tried again")
            self._tell_lost()

    def _tell_lost(self) -> None:
        with self._lock:
            lost, self._lost = self._lost, 0
        if lost:
            _log.error("the log of decisions was full: %d rows are lost", lost)


def _outcome(result: Result, threshold: float) -> _Row:
    """From column `decision` on."""
    error = result.error.code if result.error else None
    option = str(result.option) if result.option else None
    return str(result.decision), option, result.skip_probability, threshold, error


def read_log(folder: str) -> pa.Table:
    """All decisions in a folder."""
    fs, root = fsspec.core.url_to_fs(folder)
    tables = []
    for path in sorted(fs.glob(f"{root}/decisions-*.parquet")):
        with fs.open(path, "rb") as f:
            tables.append(pq.ParquetFile(f, pre_buffer=False).read(use_threads=False))
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()
