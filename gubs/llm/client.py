"""The client that the UGM and the teachers ask: requests in, answers out, everything journaled on the way.

A request is a short dialog: a call and, if its answer cannot be used, a re-ask that shows the error. Each call is
looked up in the journal first, then goes to the pool. So a run that starts again passes everything finished without a
call, and a replay is the same without the pool; neither starts an actor or a server before it needs one. What stayed
without a usable answer in an earlier run is asked again, as a fresh sample.
"""

import collections
import contextlib
import dataclasses
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gubs.console import say
from gubs.errors import SettingsError
from gubs.llm import embedded
from gubs.llm.budget import Budget, CostEstimate, RoleCost, mean_output
from gubs.llm.calls import Answer, Cost, Entry, LLMRequest, estimate_prompt, identity, key_of
from gubs.llm.client_actor import Report
from gubs.llm.contract import NOT_TAKEN
from gubs.llm.endpoint import Assignment, Work, price
from gubs.llm.errors import BudgetReachedError, EndpointError, NotInJournalError, StoppedError
from gubs.llm.interrupts import Interrupts
from gubs.llm.journal import Journal
from gubs.llm.progress import OnProgress, Progress
from gubs.llm.redact import read_keys
from gubs.llm.settings import EMBEDDED, LLMSettings, RoleSettings
from gubs.llm.structured import UnusableError, read, reask

if TYPE_CHECKING:
    from gubs.llm.pool import PollResult, Pool

_SHOW_S = 0.5
_ROOM = 4
"""Times the tokens for an answer that was cut off."""
_PLAIN = ("empty", "only_reasoning")
"""Failures after which the same question is asked again as it was: there is no text to complain about."""


class Dialog:
    """One request on its way to an answer: the call to make next, and the calls so far."""

    def __init__(self, index: int, request: LLMRequest, role: RoleSettings, endpoint: str, model: str):
        self.index, self.request, self.endpoint = index, request, endpoint
        self._role, self._model = role, model
        self._fresh = 0
        """Samples of the request that could not be used."""
        self.live = False
        """Some call of it was made now, not replayed."""
        self._begin()

    def _begin(self) -> None:
        self._entries: list[Entry] = []
        self._wrong: UnusableError | None = None
        """What is wrong with the last answer, of which the next call is a consequence."""
        self._reasks, self._room = 0, 1
        self._ask(self.request)

    def _ask(self, request: LLMRequest) -> None:
        self.current = request
        self.identity = identity(request, self._role, self._model, fresh=self._fresh, room=self._room)
        self.key = key_of(self.identity)

    def renew(self) -> None:
        """Asks the request anew, as another sample than those that could not be used."""
        self._fresh += 1
        self._begin()

    @property
    def follows_up(self) -> bool:
        """Whether the call to make is about an answer that could not be used."""
        return self._wrong is not None

    @property
    def more_room(self) -> bool:
        """Whether the call to make asks for more tokens than usual."""
        return self._room > 1

    @property
    def renewed_key(self) -> str:
        """The key that `renew` would ask for."""
        return key_of(identity(self.request, self._role, self._model, fresh=self._fresh + 1))

    def advance(self, entry: Entry) -> Answer | None:
        """Takes a finished call; returns the answer, or None if a re-ask is now the call to make."""
        self._entries.append(entry)
        if self._wrong and entry.failure in NOT_TAKEN:  # then the answer is what it was
            then = f"{self._wrong}; {'with more room' if self.more_room else 'asked again'}"
            return self._answer(self._entries[-2], None, self._wrong.cause, f"{then}: {entry.failure}: {entry.error}")
        if entry.failure:
            return self._answer(entry, None, entry.failure, entry.error)
        try:
            value = read(self.request, entry.text, entry.finish_reason, entry.reasoning)
        except UnusableError as e:
            return None if self._asks_again(entry, e) else self._answer(entry, None, e.cause, str(e))
        return self._answer(entry, value, "", "")

    def _asks_again(self, entry: Entry, error: UnusableError) -> bool:
        """Prepares the next call after an unusable answer; False if there is none."""
        self._wrong = error
        if error.cause == "truncated":
            if self._room > 1:
                return False
            self._room = _ROOM
            self._ask(self.current)
            return True
        if error.cause == "refused" or self._reasks >= self._role.reasks:
            return False
        self._reasks += 1
        if error.cause in _PLAIN:
            self._fresh += 1
            self._ask(self.current)
        else:
            messages = reask(self.current.messages, entry.text, str(error))
            self._ask(dataclasses.replace(self.current, messages=messages))
        return True

    def _answer(self, last: Entry, value: object, failure: str, error: str) -> Answer:
        calls = self._entries
        summed = ("tokens_in", "tokens_out", "latency_s", "attempts", "price")
        return Answer(
            **{name: sum(getattr(c, name) for c in calls) for name in summed},
            role=self.request.role,
            label=self.request.label,
            key=calls[0].key,
            text=last.text,
            reasoning=last.reasoning,
            value=value,
            failure=failure,
            error=error,
            finish_reason=last.finish_reason,
            calls=len(calls),
            metadata=self.request.metadata,
            replayed=not self.live,
        )


Queues = dict[str, collections.deque[Dialog]]
"""Dialogs whose next call is not sent yet, by endpoint."""


class LLMClient:
    """Asks text LLMs. A context manager; not for several threads at once."""

    def __init__(self, settings: LLMSettings, journal: str | Path = "", *, on_progress: OnProgress | None = None):
        """`journal`: the folder to use if the settings name none.

        Raises:
            SettingsError: no journal, or a key's environment variable is not set. JournalError: it cannot be read.
        """
        self.settings = settings
        folder = settings.journal or str(journal)
        if not folder:
            raise SettingsError("LLM calls need a journal: set llm.journal=FOLDER")
        if "://" in folder:
            raise SettingsError(f"llm.journal={folder}: a journal must be on a local or shared file system")
        self._live = settings.mode == "record"
        self._keys = read_keys(settings.endpoints) if self._live else {}
        self.journal = Journal(Path(folder).absolute(), writable=self._live)
        self._budget = Budget(settings.budget, self.journal)
        self._on_progress = on_progress
        self._shown_at = 0.0
        self._interrupts = Interrupts()
        self._waiting: dict[str, list[Dialog]] = {}
        self._server: embedded.EmbeddedServer | None = None
        self._pool: Pool | None = None
        self._endpoints = dict(settings.endpoints)
        if EMBEDDED in map(settings.endpoint_of, type(settings.roles).model_fields):
            self._endpoints[EMBEDDED] = embedded.endpoint(settings.embedded)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors and the embedded server."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.journal.close)
            if self._server:
                stack.callback(self._server.stop)
            if self._pool:
                stack.callback(self._pool.close)
            self._server = self._pool = None

    def start(self) -> None:
        """Starts the actors (and the embedded server, if a role uses it); otherwise the first call does.

        Raises:
            PlatformError: Ray is not running, or something does not start.
        """
        self._running_pool(Progress(0))

    def ask(self, requests: Iterable[LLMRequest]) -> list[Answer]:
        """Answers in the order of the requests. Errors: see `stream`."""
        answers = dict(self.stream(requests))
        return [answers[i] for i in range(len(answers))]

    def stream(self, requests: Iterable[LLMRequest]) -> Iterator[tuple[int, Answer]]:
        """Yields (index of the request, answer) as they come. A request that fails is an answer with its cause.

        Raises:
            EndpointDownError, EndpointRefusedError: an endpoint will answer nothing more.
            BudgetReachedError: the next attempt does not fit; calls in flight have finished.
            StoppedError: Ctrl-C or SIGTERM; calls in flight have finished, as far as `llm.retries.drain_s` allowed.
            NotInJournalError: replay, and the journal lacks a call. JournalError: it cannot be written.
            PlatformError: see `start`.
            In all cases the journal has what was finished.
        """
        queues: Queues = collections.defaultdict(collections.deque)
        self._waiting = {key: [] for key in self._waiting}  # calls of an abandoned batch are only journaled
        for dialog in self._dialogs(requests):
            queues[dialog.endpoint].append(dialog)
        progress = Progress(sum(map(len, queues.values())))
        with self._interrupts.held():
            for dialog, answer in self._answers(queues, progress):
                progress.finished(answer)
                yield dialog.index, answer
        self._show(progress, always=True)
        if stop := self._interrupted():
            raise stop

    def dry_run(self, requests: Iterable[LLMRequest]) -> CostEstimate:
        """What the requests would cost, without those that the journal answers."""
        estimate, seen = CostEstimate(), set[str]()
        for dialog in self._dialogs(requests):
            name, endpoint = dialog.request.role, dialog.endpoint
            model = self._endpoints[endpoint].model
            role = estimate.roles.setdefault(name, RoleCost(role=name, endpoint=endpoint, model=model))
            role.requests += 1
            if self._replay(dialog) is not None:
                role.journaled += 1
            elif dialog.key not in seen:
                seen.add(dialog.key)
                role.add(self._cost(dialog))
        return estimate

    def knows(self, request: LLMRequest) -> bool:
        """Whether the journal answers the request without a call."""
        return all(self._replay(dialog) is not None for dialog in self._dialogs([request]))

    @property
    def counts(self) -> Report:
        """What the client actors last reported: in flight, retried, second copies, CPU seconds since they started."""
        return self._pool.counts if self._pool else Report([])

    def _dialogs(self, requests: Iterable[LLMRequest]) -> Iterator[Dialog]:
        for index, request in enumerate(requests):
            role, endpoint = self.settings.role(request.role), self.settings.endpoint_of(request.role)
            yield Dialog(index, request, role, endpoint, self._endpoints[endpoint].model)

    def _replay(self, dialog: Dialog) -> Answer | None:
        """Advances a dialog as far as the journal goes; the answer, or None if a call has to be made.

        What could not be used in an earlier run becomes a fresh sample. A replay makes none, but follows those that
        later runs made.
        """
        answer = None
        while answer is None and (entry := self._journaled(dialog)):
            earlier = not self.journal.recent(dialog.key)
            answer = dialog.advance(entry)
            if answer and not answer.ok and (earlier if self._live else dialog.renewed_key in self.journal):
                dialog.renew()
                answer = None
        return answer

    def _journaled(self, dialog: Dialog) -> Entry | None:
        """The journal's entry for a dialog's next call. A request about an answer that cannot be used counts as ended
        if it was not taken: to send it again would keep that answer forever.
        """
        entry = self.journal.get(dialog.key)
        if entry is None and dialog.follows_up and (ended := self.journal.ended(dialog.key)):
            return ended if ended.failure in NOT_TAKEN else None
        return entry

    def _answers(self, queues: Queues, progress: Progress) -> Iterator[tuple[Dialog, Answer]]:
        """Sends and receives until nothing is open; the caller counts each answer before it asks for the next."""
        while True:
            over_budget: Cost | None = None
            for endpoint, queue in queues.items():
                cost = yield from self._send(endpoint, queue, progress)
                over_budget = over_budget or cost
            if progress.done == progress.total:
                return
            self._show(progress)
            if over_budget and not self._waiting:
                counts = f"{progress.total - progress.done} of {progress.total} requests are open"
                remedy = "Finished calls are kept: raise the budget and run again"
                raise BudgetReachedError(f"{self._budget.explain(over_budget)}; {counts}. {remedy}")
            yield from self._receive(queues, progress)

    def _send(
        self, endpoint: str, queue: collections.deque[Dialog], progress: Progress
    ) -> Generator[tuple[Dialog, Answer], None, Cost | None]:
        """Sends what can be sent now and yields what the journal answers; returns the cost that the budget refuses."""
        while queue:
            dialog = queue[0]
            answer = self._replay(dialog)
            if answer is not None:
                queue.popleft()
                yield dialog, answer
                continue
            if not self._live:
                raise NotInJournalError(
                    f"{self.journal.folder} has no answer for {dialog.request.role} {dialog.request.label!r} "
                    f"(key {dialog.key}), and llm.mode=replay makes no calls: run with llm.mode=record"
                )
            if dialog.key in self._waiting:  # the same request twice: one call serves both
                self._waiting[dialog.key].append(queue.popleft())
                continue
            pool, cost = self._running_pool(progress), self._cost(dialog)
            if not pool.has_room(endpoint):
                return None
            if not self._budget.fits(cost):
                return cost
            self._budget.reserve(dialog.key, cost)
            self._waiting[dialog.key] = [queue.popleft()]
            pool.submit(Work(dialog.key, endpoint, dialog.current, dialog.identity, dialog.more_room))
        return None

    def _receive(self, queues: Queues, progress: Progress) -> Iterator[tuple[Dialog, Answer]]:
        """Processes what the actors report; yields finished dialogs and puts the others back in front."""
        pool = self._running_pool(progress)
        result = pool.poll()
        yield from self._process(result, queues, progress)
        if stop := result.stop or self._interrupted():
            yield from self._drain(pool, stop, queues, progress)
            raise stop
        counts = pool.counts
        progress.in_flight, progress.retried, progress.copies = counts.in_flight, counts.retried, counts.copies

    def _interrupted(self) -> StoppedError | None:
        """The error to end with after a signal."""
        number = self._interrupts.received
        if number is None:
            return None
        kept = "Finished calls are kept: the same command resumes"
        return StoppedError(f"stopped by {signal.Signals(number).name}. {kept}", 128 + number)

    def _drain(self, pool: "Pool", stop: Exception, queues: Queues, progress: Progress) -> list[tuple[Dialog, Answer]]:
        """Lets calls in flight finish, which are paid for; what came in. The pool is gone then."""
        seconds = self.settings.retries.drain_s
        reason = str(stop) if isinstance(stop, StoppedError | EndpointError) else type(stop).__name__
        say(f"         calls in flight may finish for {seconds:g} s (Ctrl-C: end at once). {reason}")

        def show(left_s: float) -> None:
            progress.note = f"finishing calls in flight, {max(0.0, left_s):.0f} s left"
            self._show(progress, always=True)

        finished = self._process(pool.drain(seconds, show), queues, progress)
        for key in self._waiting:
            self._budget.release(key)
        self._waiting, self._pool = {}, None
        pool.close()
        return finished

    def _process(self, result: "PollResult", queues: Queues, progress: Progress) -> list[tuple[Dialog, Answer]]:
        """Processes all of the result, since the caller may stop at the first answer and must not lose the others."""
        finished = []
        for note in result.notes:
            say(f"         {note}")
        for entry, place in result.done:
            self.journal.add(entry, place)
            progress.cost.add(entry.cost)
            if entry.retried:
                if entry.billed:
                    self._budget.spent(entry.key)
                continue
            self._budget.release(entry.key)
            for dialog in self._waiting.pop(entry.key, []):
                dialog.live = True
                answer = dialog.advance(entry)
                if answer is not None:
                    finished.append((dialog, answer))
                else:
                    queues[dialog.endpoint].appendleft(dialog)
        if result.lost:
            self.journal.load()  # the dead actor may have journaled more than it reported
        for work in result.lost:
            self._budget.release(work.key)
            queues[work.endpoint].extendleft(self._waiting.pop(work.key, []))
        for member, key in result.asking:
            self._running_pool(progress).admit(member, key, self._admits(key))
        return finished

    def _admits(self, key: str) -> bool:
        """Whether a call may have another attempt; if so, its cost is reserved."""
        dialogs = self._waiting.get(key)
        if not dialogs or not self._budget.fits(cost := self._cost(dialogs[0])):
            return False
        self._budget.reserve(key, cost)
        return True

    def _cost(self, dialog: Dialog) -> Cost:
        """Expected cost of a dialog's next call."""
        role = dialog.current.role
        tokens_in = estimate_prompt(dialog.current.messages)
        tokens_out = mean_output(self.journal.spent.get(role), self.settings.role(role).max_tokens)
        return Cost(1, tokens_in, tokens_out, price(self._endpoints[dialog.endpoint], tokens_in, tokens_out))

    def _running_pool(self, progress: Progress) -> "Pool":
        if self._pool is not None:
            return self._pool
        from gubs.llm.pool import Pool  # imports Ray, which a dry run or a replay does not need

        def show(note: str) -> None:
            progress.note = note
            self._show(progress, always=True)

        if EMBEDDED in self._endpoints:
            self._server = self._server or embedded.EmbeddedServer(self.settings.embedded, show)
            self._endpoints[EMBEDDED] = self._server.endpoint
            self._keys[EMBEDDED] = self._server.key
        show("starting the client actors")
        folder, ident, actors = str(self.journal.folder), self.journal.id, self.settings.actors
        self._pool = Pool(Assignment(self.settings, self._endpoints, folder, ident, 0, actors, self._keys))
        progress.note = ""
        return self._pool

    def _show(self, progress: Progress, always: bool = False) -> None:
        now = time.monotonic()
        if self._on_progress and (always or now - self._shown_at >= _SHOW_S):
            self._shown_at = now
            progress.waiting = max(0, progress.total - progress.done - progress.in_flight)
            self._on_progress(progress)
