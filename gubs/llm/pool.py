"""The driver's side of the pool: starts the client actors, gives work to those with room, gathers what they report.

Few Ray calls: work goes out in chunks, and one long `collect` call per actor brings answers back in batches. An actor
that dies is replaced; its unfinished work comes back as lost, to be looked up in the journal and asked again if it is
missing there.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.metrics import Counter as RayCounter

from gubs.errors import GubsError, PlatformError
from gubs.llm.calls import Entry
from gubs.llm.client_actor import ClientActor, Report
from gubs.llm.endpoint import Assignment, Work
from gubs.llm.journal import Place
from gubs.ray_runtime import Actor, beside_driver

log = logging.getLogger(__name__)

_CHUNK = 50
_AHEAD = 1.5
"""Work an actor gets, as a multiple of what it may have in flight: the rest waits there, so that no slot stays free
while answers wait to be reported."""
_WAIT_S = 1.0
_START_S = 120.0
_LATE_S = 10.0
"""How much longer than allowed an actor may take to report."""
_PAUSES_S = (0.5, 5.0, 20.0)
"""Before an actor is started again after its first, second and third death; after another one it is given up. A lost
node counts as alive for some ten seconds, and gets new actors meanwhile."""


@dataclass
class Member:
    """An actor and its open work."""

    assignment: Assignment
    actor: Actor
    outstanding: dict[str, Work] = field(default_factory=dict)
    per_endpoint: Counter[str] = field(default_factory=Counter)
    """Number of `outstanding`."""
    buffer: list[Work] = field(default_factory=list)
    """Work not sent yet."""
    collecting: "ray.ObjectRef[Report] | None" = None
    last: Report = field(default_factory=lambda: Report([]))

    def room(self, endpoint: str) -> float:
        """How much more work for the endpoint it can take; below 1: none."""
        slots = self.assignment.slots(endpoint)
        return slots and slots * _AHEAD + 1 - self.per_endpoint[endpoint]


@dataclass
class PollResult:
    """What came from the actors."""

    done: list[tuple[Entry, Place]] = field(default_factory=list)
    lost: list[Work] = field(default_factory=list)
    """Unfinished work of actors that died, and calls that the budget ended."""
    asking: list[tuple[Member, str]] = field(default_factory=list)
    """Calls (by key) that need another attempt, and the actors that wait for an answer; see `Pool.admit`."""
    notes: list[str] = field(default_factory=list)
    """What a person should know."""
    stop: Exception | None = None


class _Metrics:
    """Finished calls and their tokens in Ray's metrics, for dashboards."""

    def __init__(self) -> None:
        self._calls = RayCounter("gubs_llm_calls", "Attempts of LLM calls", ("role", "endpoint", "failure"))
        self._tokens = RayCounter("gubs_llm_tokens", "Tokens of LLM calls", ("role", "endpoint", "direction"))

    def count(self, entry: Entry) -> None:
        """Counts a call."""
        tags = {"role": entry.role, "endpoint": entry.endpoint}
        self._calls.inc(1, {**tags, "failure": entry.failure or "none"})
        for direction, tokens in (("in", entry.tokens_in), ("out", entry.tokens_out)):
            if tokens > 0:
                self._tokens.inc(tokens, {**tags, "direction": direction})


class Pool:
    """The client actors of one driver."""

    def __init__(self, assignment: Assignment):
        """Starts the actors (`assignment.number` is filled in for each) and waits until all are ready.

        Raises:
            PlatformError: Ray is not running, or an actor does not start. JournalError: see `ClientActor.open`.
        """
        if not ray.is_initialized():
            raise PlatformError("LLM calls run on Ray, which is not started: call ray.init() first")
        self._deaths = Counter[int]()
        """By the actors' numbers."""
        self._retired: list[Report] = []
        """Counts of actors that died."""
        self._metrics = _Metrics()
        self._members = [self._start(replace(assignment, number=n)) for n in range(assignment.actors)]
        self._open(self._members)

    def has_room(self, endpoint: str) -> bool:
        """Whether some actor can take more work for the endpoint."""
        return any(m.room(endpoint) >= 1 for m in self._members)

    def submit(self, work: Work) -> None:
        """Gives work to the actor with most room for it; it is sent with the next chunk."""
        member = max(self._members, key=lambda m: m.room(work.endpoint))
        member.outstanding[work.key] = work
        member.per_endpoint[work.endpoint] += 1
        member.buffer.append(work)
        if len(member.buffer) >= _CHUNK:
            self._send(member)

    def poll(self, timeout_s: float = _WAIT_S) -> PollResult:
        """Sends what is buffered and returns what has come in, after `timeout_s` at the latest."""
        for member in self._members:
            self._send(member)
            if member.collecting is None:
                member.collecting = member.actor.collect.remote(_WAIT_S)
        members = {m.collecting: m for m in self._members if m.collecting is not None}
        ready, _ = ray.wait(list(members), num_returns=1, timeout=timeout_s)
        result = PollResult()
        for ref in ready:
            member = members[ref]
            try:
                report = ray.get(ref)
            except RayActorError as e:
                self._replace(member, result, e)
            else:
                member.collecting = None
                self._settle(member, report, result)
        return result

    def admit(self, member: Member, key: str, admitted: bool) -> None:
        """Answers a call that asked for another attempt."""
        member.actor.admit.remote(key, admitted)

    def drain(self, grace_s: float, waiting: Callable[[float], None]) -> PollResult:
        """Lets calls in flight finish, drops the rest (see `ClientActor.drain`), and returns what came in.

        `waiting` is called every second with the time left.
        """
        result, deadline = PollResult(), time.monotonic() + grace_s
        refs = [m.actor.drain.remote(grace_s) for m in self._members]
        while len(ray.wait(refs, num_returns=len(refs), timeout=_WAIT_S)[0]) < len(refs):
            waiting(left_s := deadline - time.monotonic())
            if left_s < -_LATE_S:
                break
        for member, ref in zip(self._members, refs, strict=True):
            try:
                if member.collecting is not None:
                    self._settle(member, ray.get(member.collecting, timeout=_WAIT_S + _LATE_S), result)
                self._settle(member, ray.get(ref, timeout=_LATE_S), result)
            except (RayActorError, GetTimeoutError) as e:
                log.warning("a client actor did not finish in order (%s); what it journaled is kept", type(e).__name__)
            member.collecting = None
        return result

    @property
    def counts(self) -> Report:
        """The latest counts, summed over the actors."""
        reports = [*self._retired, *(m.last for m in self._members)]
        total = {name: sum(getattr(r, name) for r in reports) for name in ("in_flight", "retried", "copies", "cpu_s")}
        return Report([], **total)

    def close(self) -> None:
        """Ends the actors; unfinished work is dropped."""
        try:
            ray.get([m.actor.close.remote() for m in self._members], timeout=15)
        except (RayActorError, GetTimeoutError) as e:
            log.warning("client actors did not close in order (%s); what they journaled is kept", type(e).__name__)
        for member in self._members:
            ray.kill(member.actor)
        self._members = []

    def _start(self, assignment: Assignment) -> Member:
        where = "SPREAD" if assignment.settings.spread else beside_driver()
        return Member(assignment, ray.remote(ClientActor).options(num_cpus=0, scheduling_strategy=where).remote())

    def _open(self, members: list[Member]) -> None:
        """Waits until all are ready. One that dies as it starts (its node is lost, perhaps) is started again."""
        opening = [(m, m.actor.open.remote(m.assignment)) for m in members]
        for member, ready in opening:
            try:
                member.last = ray.get(ready, timeout=_START_S)
            except GetTimeoutError:
                raise PlatformError(
                    f"client actors did not start within {_START_S:.0f} s: is the cluster full?"
                ) from None
            except RayTaskError as e:
                raise (e.cause if isinstance(e.cause, GubsError) else e) from None
            except RayActorError as e:
                log.warning("client actor %d died as it started; starting another", member.assignment.number)
                self._after_death(member, e)
                member.actor = self._start(member.assignment).actor
                self._open([member])

    def _after_death(self, member: Member, error: Exception) -> None:
        """Counts an actor's death, and waits before it is started again."""
        number = member.assignment.number
        deaths = self._deaths[number]
        self._deaths[number] += 1
        if deaths >= len(_PAUSES_S):
            raise PlatformError(f"client actor {number} died {deaths + 1} times: {error}") from None
        time.sleep(_PAUSES_S[deaths])

    def _send(self, member: Member) -> None:
        if member.buffer:
            member.actor.submit.remote(member.buffer)
            member.buffer = []

    def _settle(self, member: Member, report: Report, result: PollResult) -> None:
        member.last = report
        result.done += report.done
        result.stop = result.stop or report.stop
        result.asking += [(member, key) for key in report.asking]
        result.notes += report.notes
        result.lost += report.returned
        for entry, _ in report.done:
            self._metrics.count(entry)
        ended = [entry.key for entry, _ in report.done if not entry.retried] + [w.key for w in report.returned]
        for key in ended:
            if work := member.outstanding.pop(key, None):
                member.per_endpoint[work.endpoint] -= 1

    def _replace(self, member: Member, result: PollResult, error: Exception) -> None:
        number, calls = member.assignment.number, len(member.outstanding)
        log.warning("client actor %d died; starting another and asking its %d open calls again", number, calls)
        self._after_death(member, error)
        result.lost += member.outstanding.values()
        self._retired.append(Report([], retried=member.last.retried, copies=member.last.copies))
        replacement = self._start(member.assignment)
        self._open([replacement])
        self._members[self._members.index(member)] = replacement
