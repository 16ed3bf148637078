"""The actor's side of the pool: takes work, makes the calls, journals each answer, and reports what is on disk.

Only plain records cross Ray: exceptions of the OpenAI client do not survive pickling and stay in here.
"""

import asyncio
import dataclasses
import gc
import time
import traceback
from dataclasses import dataclass, field

from gubs.llm.calls import Entry
from gubs.llm.endpoint import EndpointCaller, StopError, Work
from gubs.llm.errors import JournalError
from gubs.llm.journal import JournalWriter, Place, check_same
from gubs.llm.limits import share
from gubs.llm.redact import Redactor, Secret
from gubs.llm.settings import EndpointSettings, LLMSettings

_BATCH_S = 0.4
"""Answers that come this close together are reported together, where much is under way: a report costs as much CPU as
two calls. At the end of a batch of work, when others wait for the last answers, the time shrinks."""
_SYNC_S = 0.15
"""Answers that come this close together share an fsync, likewise."""
_MANY = 200
"""Calls under way from which on these times are waited in full."""


@dataclass(frozen=True, slots=True)
class Done:
    """A finished call: its entry (without the request, which the driver has) and where it stands in the journal."""

    entry: Entry
    place: Place


@dataclass(frozen=True, slots=True)
class Stopped:
    """Why the run cannot go on."""

    kind: str
    """A name in `gubs.llm.errors.STOPS`, or `bug`."""
    message: str
    endpoint: str = ""
    """The endpoint that is down or refuses, where it is one."""


@dataclass(frozen=True, slots=True)
class Report:
    """What happened since the last report."""

    done: list[Done]
    stop: Stopped | None = None
    in_flight: int = 0
    retried: int = 0
    copies: int = 0
    cpu_s: float = 0.0
    """CPU time of this process since it started."""


@dataclass(frozen=True)
class Assignment:
    """What an actor is told when it starts."""

    settings: LLMSettings
    endpoints: dict[str, EndpointSettings]
    journal: str
    journal_id: str
    number: int
    """Of this actor, from 0."""
    actors: int
    keys: dict[str, Secret] = field(default_factory=dict)


class Worker:
    """A client actor."""

    async def open(self, assignment: Assignment) -> Report:
        """Gets ready; returns the name of the journal segment. Not in the constructor: Ray stores constructor
        arguments.

        Raises:
            JournalError: this process does not see the driver's journal.
        """
        self._a = assignment
        check_same(assignment.journal, assignment.journal_id)
        self._redactor = redactor = Redactor(assignment.keys.values())
        self._journal = JournalWriter(assignment.journal, redactor.known, lambda: _SYNC_S * self._load())
        self._callers = {
            name: EndpointCaller(
                name,
                endpoint,
                assignment.settings.retries,
                concurrency=share(endpoint.max_concurrency, assignment.number, assignment.actors),
                fraction=1 / min(assignment.actors, endpoint.max_concurrency),
                key=assignment.keys.get(name),
                redactor=redactor,
            )
            for name, endpoint in assignment.endpoints.items()
            if share(endpoint.max_concurrency, assignment.number, assignment.actors)
        }
        self._tasks: dict[asyncio.Task[None], Work] = {}
        self._done: list[Done] = []
        self._stop: Stopped | None = None
        self._news = asyncio.Event()
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
        """What is finished; waits up to `wait_s` for something to be."""
        if not self._news.is_set():
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
                await asyncio.sleep(_BATCH_S * self._load())
            except TimeoutError:
                pass
        return self._report()

    async def drain(self, grace_s: float, dead: str = "") -> Report:
        """Finishes what is on the wire (up to `grace_s`; not at the endpoint `dead`), drops the rest, and reports."""
        for caller in self._callers.values():
            caller.draining = True
        for task, work in list(self._tasks.items()):
            if work.endpoint == dead or work.key not in self._callers[work.endpoint].flying:
                task.cancel()
        if self._tasks:
            _, late = await asyncio.wait(list(self._tasks), timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        return self._report()

    async def close(self) -> None:
        """Drops unfinished work; closes the journal segment and the connections."""
        await self.drain(0.0)
        await self._journal.close()
        for caller in self._callers.values():
            await caller.close()

    async def _do(self, work: Work) -> None:
        entry = await self._callers[work.endpoint].call(work, self._a.settings.role(work.request.role))
        place = await self._journal.append(entry)
        self._done.append(Done(dataclasses.replace(entry, request={}), place))
        self._news.set()

    def _load(self) -> float:
        """How much is under way, from 0 to 1."""
        return min(1.0, len(self._tasks) / _MANY)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        error = None if task.cancelled() else task.exception()
        if error is None or self._stop:
            return
        if isinstance(error, StopError):
            self._stop = Stopped(error.kind, error.message, error.endpoint)
        elif isinstance(error, JournalError):
            self._stop = Stopped("journal", str(error))
        else:
            trace = "".join(traceback.format_exception(error))
            self._stop = Stopped("bug", self._redactor.message(trace))
        self._news.set()

    def _report(self) -> Report:
        done, self._done = self._done, []
        self._news.clear()
        callers = self._callers.values()
        return Report(
            done,
            self._stop,
            in_flight=sum(len(c.flying) for c in callers),
            retried=sum(c.retried for c in callers),
            copies=sum(c.watch.copies for c in callers),
            cpu_s=time.process_time(),
        )
