"""The client that the UGM and the teachers ask: requests in, answers out, everything journaled on the way.

A request is a short conversation: a call and, where its answer cannot be used, a re-ask that shows the error. Each
call is looked up in the journal first, then goes to the pool. So a run that starts again walks through what is
finished without a call, and a replay is the same walk with the pool left out; neither starts an actor or a server
before it needs one.
"""

import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gubs.errors import SettingsError
from gubs.llm import embedded
from gubs.llm.budget import Budget, Cost, Plan, RolePlan, mean_output
from gubs.llm.calls import Answer, Entry, LLMRequest, estimate_prompt, identity, key_of
from gubs.llm.endpoint import Work, price
from gubs.llm.errors import STOPS, BudgetReachedError, NotInJournalError
from gubs.llm.journal import Journal, Spent
from gubs.llm.pool import News, Pool
from gubs.llm.progress import OnProgress, Progress
from gubs.llm.redact import read_keys
from gubs.llm.settings import EMBEDDED, LLMSettings
from gubs.llm.structured import UnusableError, read, reask
from gubs.llm.worker import Assignment, Report, Stopped

log = logging.getLogger(__name__)

_TELL_S = 0.5


class Talk:
    """One request on its way to an answer: the call to make next, and what was said so far."""

    def __init__(self, index: int, request: LLMRequest, settings: LLMSettings, model: str):
        self.index, self.request = index, request
        self._role, self._model = settings.role(request.role), model
        self._entries: list[Entry] = []
        self.live = False
        """Some call of it was made now, not replayed."""
        self._ask(request)

    def _ask(self, request: LLMRequest) -> None:
        self.current = request
        self.identity = identity(request, self._role, self._model)
        self.key = key_of(self.identity)

    def advance(self, entry: Entry) -> Answer | None:
        """Takes in a finished call; returns the answer, or None where a re-ask is now the call to make."""
        self._entries.append(entry)
        if entry.failure and entry.failure != "refused":
            return self._answer(entry, None, entry.failure, entry.error)
        try:
            value = read(self.request, entry.text, entry.finish_reason, entry.error)
        except UnusableError as e:
            if e.cause == "refused" or len(self._entries) > self._role.reasks:
                return self._answer(entry, None, e.cause, str(e))
            self._ask(dataclasses.replace(self.current, messages=reask(self.current.messages, entry.text, str(e))))
            return None
        return self._answer(entry, value, "", "")

    def _answer(self, last: Entry, value: Any, failure: str, error: str) -> Answer:
        calls = self._entries
        return Answer(
            role=self.request.role,
            label=self.request.label,
            key=calls[0].key,
            text=last.text,
            reasoning=last.reasoning,
            value=value,
            failure=failure,
            error=error,
            finish_reason=last.finish_reason,
            tokens_in=sum(c.tokens_in for c in calls),
            tokens_out=sum(c.tokens_out for c in calls),
            latency_s=sum(c.latency_s for c in calls),
            attempts=sum(c.attempts for c in calls),
            calls=len(calls),
            price=sum(c.price for c in calls),
            metadata=self.request.metadata,
            replayed=not self.live,
        )


class LLMClient:
    """Asks text LLMs. A context manager; not for several threads at once."""

    def __init__(self, settings: LLMSettings, journal: str | Path = "", *, on_progress: OnProgress | None = None):
        """`journal`: folder of the journal, where the settings name none.

        Raises:
            SettingsError: no journal, or a key's environment variable is not set. JournalError: it cannot be read.
        """
        self.settings = settings
        folder = settings.journal or str(journal)
        if not folder:
            raise SettingsError("LLM calls need a journal: set llm.journal=FOLDER")
        if "://" in folder:
            raise SettingsError(
                f"llm.journal={folder}: a journal is appended to and must lie on a local or shared file system"
            )
        self._live = settings.mode == "record"
        self._keys = read_keys(settings.endpoints) if self._live else {}
        self.journal = Journal(Path(folder).absolute(), writable=self._live)
        self._budget = Budget(settings.budget, self.journal)
        self._on_progress = on_progress
        self._told = 0.0
        self._waiting: dict[str, list[Talk]] = {}
        self._server: embedded.EmbeddedServer | None = None
        self._pool: Pool | None = None
        self._endpoints = dict(settings.endpoints)
        if EMBEDDED in map(settings.endpoint_of, type(settings.roles).model_fields):
            self._endpoints[EMBEDDED] = embedded.endpoint(settings.embedded)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors and the embedded server."""
        pool, self._pool = self._pool, None
        server, self._server = self._server, None
        with contextlib.ExitStack() as stack:
            stack.callback(self.journal.close)
            if server:
                stack.callback(server.stop)
            if pool:
                stack.callback(pool.close)

    def start(self) -> None:
        """Starts the actors (and the embedded server, where a role uses it); else the first call that is needed does.

        Raises:
            PlatformError: Ray is not running, or something does not start.
        """
        if self._pool is None:
            self._pool = self._start_pool(Progress(0))

    def ask(self, requests: Iterable[LLMRequest]) -> list[Answer]:
        """Answers in the order of the requests. Errors: see `stream`."""
        answers = dict(self.stream(requests))
        return [answers[i] for i in range(len(answers))]

    def stream(self, requests: Iterable[LLMRequest]) -> Iterator[tuple[int, Answer]]:
        """Yields (index of the request, answer) as they come. A request that fails is an answer with its cause.

        Raises:
            EndpointDownError, EndpointRefusedError: nothing more is to be had from an endpoint.
            BudgetReachedError: the next call does not fit; what was in flight has been finished.
            NotInJournalError: replay, and the journal lacks a call. JournalError: it cannot be written.
            PlatformError: see `start`.
            In all cases what was finished stands in the journal.
        """
        todo: dict[str, collections.deque[Talk]] = collections.defaultdict(collections.deque)
        total = 0
        self._waiting = {key: [] for key in self._waiting}  # of a batch nobody listens to any more: only journaled
        for talk in self._talks(requests):
            todo[self.settings.endpoint_of(talk.request.role)].append(talk)
            total += 1
        progress = Progress(total)
        while progress.done < total:
            refused: Cost | None = None
            for endpoint, queue in todo.items():
                for talk, answer in self._feed(endpoint, queue, progress):
                    progress.finished(answer)
                    yield talk.index, answer
                refused = refused or self._does_not_fit(queue)
            if progress.done == total:
                break
            self._tell(progress)
            if refused and not self._waiting:
                left = total - progress.done
                story = self._budget.story(refused)
                raise BudgetReachedError(
                    f"{story}; {left} of {total} requests are open. What is finished is kept: raise it and run again"
                )
            for talk, answer in self._listen(todo, progress):
                progress.finished(answer)
                yield talk.index, answer
        self._tell(progress, last=True)

    def dry_run(self, requests: Iterable[LLMRequest]) -> Plan:
        """What the requests would cost, before anything is spent and without what the journal has."""
        plan, seen = Plan(), set[str]()
        for talk in self._talks(requests):
            name = self.settings.endpoint_of(talk.request.role)
            role = plan.roles.setdefault(
                talk.request.role, RolePlan(talk.request.role, name, self._endpoints[name].model)
            )
            role.requests += 1
            if self._replay(talk) is not None:
                role.journaled += 1
            elif talk.key not in seen:
                seen.add(talk.key)
                cost = self._cost(talk)
                role.calls += 1
                role.tokens_in += cost.tokens_in
                role.tokens_out += cost.tokens_out
                role.money += cost.money
        return plan

    @property
    def spent(self) -> dict[str, Spent]:
        """What the journal's calls have cost, by role."""
        return dict(self.journal.spent)

    @property
    def counts(self) -> Report:
        """What the client actors last reported: in flight, retried, second copies, CPU seconds since they started."""
        return self._pool.counts if self._pool else Report([])

    def _talks(self, requests: Iterable[LLMRequest]) -> Iterator[Talk]:
        for index, request in enumerate(requests):
            model = self._endpoints[self.settings.endpoint_of(request.role)].model
            yield Talk(index, request, self.settings, model)

    def _replay(self, talk: Talk) -> Answer | None:
        """Walks a talk as far as the journal goes; the answer, or None where a call has to be made."""
        while True:
            entry = self.journal.get(talk.key)
            answer = talk.advance(entry) if entry else None
            if entry is None or answer is not None:
                return answer

    def _feed(self, endpoint: str, queue: collections.deque[Talk], progress: Progress) -> Iterator[tuple[Talk, Answer]]:
        """Sends what can be sent now; yields what the journal answers."""
        while queue:
            talk = queue[0]
            answer = self._replay(talk)
            if answer is not None:
                queue.popleft()
                yield talk, answer
                continue
            if not self._live:
                raise NotInJournalError(
                    f"{self.journal.folder} has no answer for {talk.request.role} {talk.request.label!r} "
                    f"(key {talk.key}), and llm.mode=replay makes no calls: run with llm.mode=record"
                )
            if talk.key in self._waiting:  # the same request twice: one call serves both
                self._waiting[talk.key].append(queue.popleft())
                continue
            if self._pool is None:
                self._pool = self._start_pool(progress)
            if not self._pool.room(endpoint) or not self._budget.fits(self._cost(talk)):
                return
            self._send(queue.popleft(), endpoint)

    def _send(self, talk: Talk, endpoint: str) -> None:
        assert self._pool is not None
        self._budget.hold(talk.key, self._cost(talk))
        self._waiting[talk.key] = [talk]
        self._pool.submit(Work(talk.key, endpoint, talk.current, talk.identity))

    def _does_not_fit(self, queue: collections.deque[Talk]) -> Cost | None:
        if not queue or not self._live:
            return None
        cost = self._cost(queue[0])
        return None if self._budget.fits(cost) else cost

    def _listen(self, todo: dict[str, collections.deque[Talk]], progress: Progress) -> Iterator[tuple[Talk, Answer]]:
        """Takes in what the actors report; yields finished talks, puts the others back in front."""
        assert self._pool is not None
        news = self._pool.poll()
        yield from self._take(news, todo, progress)
        if news.stop:
            yield from self._take(self._pool.drain(news.stop.endpoint), todo, progress)
            self._raise(news.stop)
        counts = self._pool.counts
        progress.in_flight, progress.retried, progress.copies = counts.in_flight, counts.retried, counts.copies

    def _take(
        self, news: News, todo: dict[str, collections.deque[Talk]], progress: Progress
    ) -> list[tuple[Talk, Answer]]:
        """Takes in all of the news: whoever listens may stop at the first answer, and the others must not be lost."""
        finished = []
        for done in news.done:
            self.journal.add(done.entry, done.place)
            self._budget.release(done.entry.key)
            progress.calls += 1
            progress.tokens_in += done.entry.tokens_in
            progress.tokens_out += done.entry.tokens_out
            progress.money += done.entry.price
            for talk in self._waiting.pop(done.entry.key, []):
                talk.live = True
                answer = talk.advance(done.entry)
                if answer is not None:
                    finished.append((talk, answer))
                else:
                    todo[self.settings.endpoint_of(talk.request.role)].appendleft(talk)
        if news.lost:
            self.journal.load()  # the dead actor may have journaled more than it reported
        for work in news.lost:
            self._budget.release(work.key)
            todo[work.endpoint].extendleft(self._waiting.pop(work.key, []))
        return finished

    def _raise(self, stop: Stopped) -> None:
        for key in self._waiting:
            self._budget.release(key)
        self._waiting.clear()
        pool, self._pool = self._pool, None
        if pool:
            pool.close()
        if stop.kind not in STOPS:
            raise RuntimeError(f"a client actor failed: {stop.message}")
        raise STOPS[stop.kind](stop.message)

    def _cost(self, talk: Talk) -> Cost:
        """Expected cost of a talk's next call."""
        role = talk.current.role
        endpoint = self._endpoints[self.settings.endpoint_of(role)]
        tokens_in = estimate_prompt(talk.current.messages)
        tokens_out = mean_output(self.journal.spent.get(role), self.settings.role(role).max_tokens)
        return Cost(tokens_in, tokens_out, price(endpoint, tokens_in, tokens_out))

    def _start_pool(self, progress: Progress) -> Pool:
        if EMBEDDED in self._endpoints:
            self._start_embedded(progress)
        progress.note = "starting the client actors"
        self._tell(progress, last=True)
        folder, ident = str(self.journal.folder), self.journal.id
        pool = Pool(Assignment(self.settings, self._endpoints, folder, ident, 0, self.settings.actors, self._keys))
        progress.note = ""
        return pool

    def _start_embedded(self, progress: Progress) -> None:
        def tell(note: str) -> None:
            progress.note = note
            self._tell(progress, last=True)

        if self._server is None:
            self._server = embedded.EmbeddedServer(self.settings.embedded, tell)
        self._endpoints[EMBEDDED] = self._server.endpoint
        self._keys[EMBEDDED] = self._server.key

    def _tell(self, progress: Progress, last: bool = False) -> None:
        now = time.monotonic()
        if self._on_progress and (last or now - self._told >= _TELL_S):
            self._told = now
            progress.waiting = max(0, progress.total - progress.done - progress.in_flight)
            self._on_progress(progress)
