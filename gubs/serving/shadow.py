"""The log of decisions, of versions that act and of versions in shadow: Parquet files that evaluation reads."""

import logging
import threading
import time
import uuid
from collections.abc import Sequence
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
"""Rows that wait while nothing can be written."""
_log = logging.getLogger("ray.serve")


class ShadowLog:
    """Collects rows and writes them as files, each whole, every few seconds."""

    def __init__(self, folder: str, seconds: float):
        self._fs, self._folder = fsspec.core.url_to_fs(folder)
        self._fs.makedirs(self._folder, exist_ok=True)
        self._rows: list[dict[str, Any]] = []
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
        common = {
            "time_ms": int(time.time() * 1e3),
            "request_id": request.request_id,
            "user_id": request.user.id,
            "task": str(request.task),
            "mode": str(mode),
            "app": app,
            "version": version,
            "acted": acted,
            "threshold": threshold,
        }
        rows = [
            common
            | {
                "video_id": r.id,
                "decision": str(r.decision),
                "option": str(r.option) if r.option else None,
                "skip_probability": r.skip_probability,
                "error": r.error.code if r.error else None,
            }
            for r in results
        ]
        with self._lock:
            self._rows += rows
            if len(self._rows) > _MOST_ROWS:  # nothing could be written for long
                _log.error("the log of decisions is full: %d rows are lost", len(self._rows) - _MOST_ROWS)
                self._rows = self._rows[-_MOST_ROWS:]

    def flush(self) -> None:
        """Writes what has been collected; returns when all of it is written, also by another thread."""
        with self._writing:
            with self._lock:
                rows, self._rows = self._rows, []
            if not rows:
                return
            try:
                self._write(rows)
            except BaseException:
                with self._lock:
                    self._rows = rows + self._rows
                raise

    def _write(self, rows: list[dict[str, Any]]) -> None:
        name = f"{self._folder}/decisions-{int(time.time() * 1e3):013d}-{uuid.uuid4().hex[:6]}"
        with self._fs.open(f"{name}.tmp", "wb") as f:
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), f, compression="zstd")
        self._fs.mv(f"{name}.tmp", f"{name}.parquet")

    def _flush_now_and_then(self) -> None:
        while True:
            time.sleep(self._seconds)
            try:
                self.flush()
            except (OSError, pa.ArrowException):
                _log.exception("the log of decisions cannot be written; it is tried again")


def read_log(folder: str) -> pa.Table:
    """All decisions in a folder."""
    fs, root = fsspec.core.url_to_fs(folder)
    tables = []
    for path in sorted(fs.glob(f"{root}/decisions-*.parquet")):
        with fs.open(path, "rb") as f:
            tables.append(pq.ParquetFile(f, pre_buffer=False).read(use_threads=False))
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()
