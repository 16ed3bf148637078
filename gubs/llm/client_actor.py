"""The actor's side of the pool: takes work, makes the calls, journals each answer, and reports what is on disk.

Only records and our own errors cross Ray: exceptions of the OpenAI client do not survive pickling.
"""

import asyncio
import contextlib
import dataclasses
import gc
import time
import traceback
from dataclasses import dataclass, field

from gubs.errors import GubsError
from gubs.llm.calls import Entry
from gubs.llm.endpoint import Assignment, CallHandlers, EndpointCaller, Work
from gubs.llm.journal import JournalWriter, Place, check_same
from gubs.llm.redact import Redactor

_BATCH_S = 0.4
"""Answers that come within this time are reported together while many calls are open: a report costs as much CPU as two
calls. The time shrinks with the number of open calls, since the last answers of a batch are waited for."""
_SYNC_S = 0.15
"""Answers that come within this time share an fsync; it shrinks likewise."""
_MANY = 200
"""Number of open calls from which these times apply in full."""


@dataclass(frozen=True, slots=True)
class Report:
    """What happened since the last report."""

    done: list[tuple[Entry, Place]]
    """Entries of attempts (without the request, which the driver has) and their place in the journal."""
    asking: list[str] = field(default_factory=list)
    """Keys of calls that need another attempt, which the budget has to admit."""
    returned: list[Work] = field(default_factory=list)
    """Calls that it did not admit."""
    notes: list[str] = field(default_factory=list)
    """What a person should know."""
    stop: Exception | None = None
    """What ended the actor's work: a `GubsError`, or a RuntimeError with the trace of a bug."""
    in_flight: int = 0
    retried: int = 0
    copies: int = 0
    cpu_s: float = 0.0
    """CPU time of this process since it started."""


class ClientActor:
    """A client actor."""

    async def open(self, assignment: Assignment) -> Report:
        """Gets ready. Not the constructor, because Ray stores constructor arguments.

        Raises:
            JournalError: this process does not see the driver's journal.
        """
        check_same(assignment.journal, assignment.journal_id)
        self._redactor = redactor = Redactor(assignment.keys.values())
        self._journal = JournalWriter(assignment.journal, redactor.hide_keys, lambda: _SYNC_S * self._load())
        handlers = CallHandlers(self._keep, self._may_repeat, self._tell)
        self._callers = {
            name: EndpointCaller(name, assignment, redactor, handlers)
            for name in assignment.endpoints
            if assignment.slots(name)
        }
        self._tasks: dict[asyncio.Task[None], Work] = {}
        self._keeping: set[asyncio.Task[None]] = set()
        self._done: list[tuple[Entry, Place]] = []
        self._asking: list[str] = []
        self._asked: dict[str, asyncio.Future[bool]] = {}
        self._returned: list[Work] = []
        self._notes: list[str] = []
        self._told: set[str] = set()
        self._stop: Exception | None = None
        self._changed = asyncio.Event()
        gc.freeze()  # what is imported by now stays: the collector need not look at it again
        gc.set_threshold(20_000, 20, 50)
        return self._report()

    async def submit(self, works: list[Work]) -> None:
        """Takes work; returns at once."""
        for work in works:
            task = asyncio.create_task(self._do(work))
            self._tasks[task] = work
            task.add_done_callback(self._ended)

    async def collect(self, wait_s: float) -> Report:
        """Finished calls; waits up to `wait_s` for one."""
        if not self._changed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
                await asyncio.sleep(_BATCH_S * self._load())
        return self._report()

    async def admit(self, key: str, admitted: bool) -> None:
        """Says whether a call that asked may have another attempt."""
        if (asked := self._asked.pop(key, None)) and not asked.done():
            asked.set_result(admitted)

    async def drain(self, grace_s: float) -> Report:
        """Finishes what is in flight (for up to `grace_s`), drops the rest, and reports."""
        for caller in self._callers.values():
            caller.draining = True
        in_flight = {key for caller in self._callers.values() for key in caller.in_flight}
        for task, work in self._tasks.items():
            if work.key not in in_flight:
                task.cancel()
        self._deny()
        if self._tasks:
            _, late = await asyncio.wait(list(self._tasks), timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._keeping:
            await asyncio.wait(list(self._keeping))
        return self._report()

    def _deny(self) -> None:
        """Grants no call another attempt: nobody answers them any more, and those in flight have an answer to come."""
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result(False)
        self._asked.clear()

    async def close(self) -> None:
        """Drops unfinished work; closes the journal segment and the connections."""
        await self.drain(0.0)
        await self._journal.close()
        for caller in self._callers.values():
            await caller.close()

    async def _do(self, work: Work) -> None:
        entry = await self._callers[work.endpoint].call(work)
        if entry is None:
            if self._keeping:  # the budget counts its attempts before it ends the call's reservation
                await asyncio.wait(list(self._keeping))
            self._returned.append(work)
            self._changed.set()
        else:
            await self._write(entry)

    async def _write(self, entry: Entry) -> None:
        place = await self._journal.append(entry)
        self._done.append((dataclasses.replace(entry, request={}), place))
        self._changed.set()

    def _keep(self, entry: Entry) -> None:
        """Journals an attempt on the way of its call, which does not wait for that."""
        task = asyncio.create_task(self._write(entry))
        self._keeping.add(task)
        task.add_done_callback(self._kept)

    def _kept(self, task: asyncio.Task[None]) -> None:
        self._keeping.discard(task)
        self._stop_for(task)

    async def _may_repeat(self, key: str) -> bool:
        self._asked[key] = answer = asyncio.get_running_loop().create_future()
        self._asking.append(key)
        self._changed.set()
        return await answer

    def _tell(self, note: str) -> None:
        if note not in self._told:
            self._told.add(note)
            self._notes.append(note)
            self._changed.set()

    def _load(self) -> float:
        """Share of `_MANY` that is open, from 0 to 1."""
        return min(1.0, len(self._tasks) / _MANY)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._stop_for(task)

    def _stop_for(self, task: asyncio.Task[None]) -> None:
        """Stops all work if a task failed."""
        error = None if task.cancelled() else task.exception()
        if error is None or self._stop:
            return
        if isinstance(error, GubsError):
            self._stop = error
        else:
            trace = "".join(traceback.format_exception(error))
            self._stop = RuntimeError(f"a client actor failed: {self._redactor.hide_all(trace)}")
        self._changed.set()

    def _report(self) -> Report:
        done, self._done = self._done, []
        asking, self._asking = self._asking, []
        returned, self._returned = self._returned, []
        notes, self._notes = self._notes, []
        self._changed.clear()
        callers = self._callers.values()
        return Report(
            done,
            asking,
            returned,
            notes,
            self._stop,
            in_flight=sum(len(c.in_flight) for c in callers),
            retried=sum(c.retried for c in callers),
            copies=sum(c.hedging.copies for c in callers),
            cpu_s=time.process_time(),
        )
