"""The journal: every attempt, on disk before its call counts as done.

A journal is a folder of segments, `<time>-<host>-<pid>-<random>.jsonl`. Every writer has its own segment, locked while
the writer lives, so any number of actors, processes and nodes can write at once. A line is one attempt, and counts
once it is complete: the half line at the end of a killed writer's segment is ignored, and cut off by the next run.
Readers keep only the place of each entry in memory, not the entry.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from gubs.artifacts import Run
from gubs.llm.calls import Cost, Entry
from gubs.llm.errors import JournalError

FOLDER = "llm-journal"
"""In a run's folder; all stages share it."""
_SUFFIX = ".jsonl"
_ID = "journal-id"
_FIELDS = tuple(f.name for f in fields(Entry))
"""Journals of other versions may have others."""


def journal_folder(run: Run) -> str:
    """Where a run's calls are journaled unless `llm.journal` names a folder; a run at a URI needs that setting, and
    `LLMClient` raises if it is missing.
    """
    return run.path(FOLDER) if "://" not in run.uri or run.uri.startswith("file://") else run.full(FOLDER)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry is."""

    segment: str
    offset: int
    length: int


class JournalWriter:
    """Appends entries to its own segment.

    Group commit: entries that arrive during a write go to disk together with the next one, so a thousand calls that
    finish at once need a few fsyncs, not a thousand; and none is done before its fsync.
    """

    def __init__(self, folder: str | Path, redact: Callable[[str], str] = str, linger_s: Callable[[], float] = float):
        """`redact` is applied to each line; a write waits `linger_s()` for more entries."""
        stamp = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.segment = stamp + _SUFFIX
        self._redact, self._linger_s = redact, linger_s
        self._path = Path(folder) / self.segment
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        _fsync_folder(self._path.parent)
        self._end = 0
        self._waiting: list[tuple[bytes, asyncio.Future[Place]]] = []
        self._flusher: asyncio.Task[None] | None = None

    async def append(self, entry: Entry) -> Place:
        """Writes an entry; returns when it is on disk.

        Raises:
            JournalError: it cannot be written (e.g. the disk is full).
        """
        row = {name: getattr(entry, name) for name in _FIELDS}  # `asdict` would copy every prompt deeply
        line = self._redact(json.dumps(row, ensure_ascii=False)).encode("utf-8", "replace") + b"\n"
        done: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, done))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return await asyncio.shield(done)

    async def close(self) -> None:
        """Writes what is waiting and closes the segment; an empty one is removed."""
        if self._flusher:
            await self._flusher
        if self._end == 0:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)

    async def _flush(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._linger_s())
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._write, b"".join(line for line, _ in batch))
            except OSError as e:
                error = f"{self._path} cannot be written ({e}); the answers already in it are kept"
                for _, done in batch:
                    done.set_exception(JournalError(error))
                continue
            for line, done in batch:
                done.set_result(Place(self.segment, self._end, len(line)))
                self._end += len(line)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._end)  # no half lines in the middle of a segment
            raise


class Journal:
    """Reads a journal: which calls are finished, what they answered, what all attempts cost.

    Only answers last: the first one to a request counts. A failure counts for the run in which it happened (and for a
    replay, which shows what the last run saw); a later run asks again.
    """

    def __init__(self, folder: str | Path, *, writable: bool = True):
        """Opens a journal. With `writable`, a missing folder is made and torn ends are repaired.

        Raises:
            JournalError: it cannot be read, or there is no such folder (and not `writable`).
        """
        self.folder = Path(folder)
        self._writable = writable
        if writable:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.id = _journal_id(self.folder)
        elif not self.folder.is_dir():
            raise JournalError(f"{self.folder}: there is no journal to replay")
        self._places: dict[str, tuple[Place, bool]] = {}
        """Where the entry that counts for a key is, and whether it is an answer."""
        self._recent: set[str] = set()
        """Keys of calls that ended since the journal was opened."""
        self._read_until: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self.spent: dict[str, Cost] = defaultdict(Cost)
        """What all attempts have cost, by role."""
        self.total = Cost()
        self.load()
        self._recent.clear()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return self._place(key) is not None

    def load(self) -> None:
        """Reads what was added since the last time."""
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            for place, entry in self._new_entries(path):
                self._add(entry, place)

    def add(self, entry: Entry, place: Place) -> None:
        """Adds an entry that a writer has just reported, so that its segment need not be read again."""
        read_until = self._read_until.get(place.segment, 0)
        if place.offset == read_until:
            self._read_until[place.segment] = place.offset + place.length
            self._add(entry, place)
        elif place.offset > read_until:
            self.load()  # reports may overtake each other; the segment itself is in order

    def get(self, key: str) -> Entry | None:
        """The finished call of that key, if there is one."""
        place = self._place(key)
        return self._entry(place) if place else None

    def ended(self, key: str) -> Entry | None:
        """How the call of that key ended last, in whatever run."""
        place, _ = self._places.get(key, (None, True))
        return self._entry(place) if place else None

    def recent(self, key: str) -> bool:
        """Whether the call ended since the journal was opened, and not in an earlier run."""
        return key in self._recent

    def close(self) -> None:
        """Closes the files."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _place(self, key: str) -> Place | None:
        place, answered = self._places.get(key, (None, True))
        return place if answered or not self._writable or key in self._recent else None

    def _add(self, entry: Entry, place: Place) -> None:
        self.spent[entry.role].add(entry.cost)
        self.total.add(entry.cost)
        if entry.retried:
            return
        self._recent.add(entry.key)
        _, answered = self._places.get(entry.key, (place, False))
        if not answered:
            self._places[entry.key] = (place, not entry.failure)

    def _entry(self, place: Place) -> Entry:
        if place.segment not in self._files:
            self._files[place.segment] = os.open(self.folder / place.segment, os.O_RDONLY)
        entry = _parse(os.pread(self._files[place.segment], place.length, place.offset))
        if entry is None:
            raise JournalError(f"{self.folder / place.segment} has changed since it was read (at byte {place.offset})")
        return entry

    def _new_entries(self, path: Path) -> Iterator[tuple[Place, Entry]]:
        start = offset = self._read_until.get(path.name, 0)
        try:
            if path.stat().st_size == start:
                return
            with path.open("rb") as f:
                f.seek(start)
                for line in f:
                    entry = _parse(line) if line.endswith(b"\n") else None
                    if entry is None:
                        break
                    yield Place(path.name, offset, len(line)), entry
                    offset += len(line)
        except OSError as e:
            raise JournalError(f"{path} cannot be read: {e}") from None
        self._read_until[path.name] = offset
        if self._writable and path.stat().st_size > offset:
            _repair(path, offset)


def check_same(folder: str | Path, expected: str) -> None:
    """Makes sure that the folder, as this process sees it, is the driver's journal.

    Raises:
        JournalError: it is another one, or none.
    """
    path = Path(folder) / _ID
    if not path.is_file() or path.read_text() != expected:
        raise JournalError(
            f"{folder} on {socket.gethostname()} is not the journal that the driver sees: put llm.journal on a file "
            "system that all nodes share, or set llm.spread=false"
        )


def _parse(line: bytes) -> Entry | None:
    try:
        values = json.loads(line)
        return Entry(**{name: values[name] for name in _FIELDS if name in values})
    except (ValueError, TypeError):
        return None  # torn, or zeros after a power cut


def _repair(path: Path, end: int) -> None:
    """Cuts off a torn end, unless the segment's writer is alive and about to complete it."""
    with path.open("rb+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        lines = path.read_bytes()[end:].splitlines(keepends=True)
        if any(line.endswith(b"\n") and _parse(line) for line in lines):
            raise JournalError(f"{path} is damaged at byte {end}: remove that line to continue without its call")
        f.truncate(end)
        os.fsync(f.fileno())


def _journal_id(folder: Path) -> str:
    path = folder / _ID
    if not path.exists():
        temporary = folder / f"{_ID}.{uuid.uuid4().hex[:8]}"
        temporary.write_text(uuid.uuid4().hex)
        with contextlib.suppress(FileExistsError):  # the first of several processes wins
            os.link(temporary, path)
        temporary.unlink()
    return path.read_text()


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
