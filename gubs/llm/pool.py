"""The driver's side of the pool: starts the client actors, hands work to whoever has room, gathers what they report.

Few Ray calls: work goes out in chunks, and one long `collect` call an actor brings answers back in batches. An actor
that dies is replaced; its unfinished work comes back as lost, to be looked up in the journal and asked again where it
is not there.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

from gubs.errors import GubsError, PlatformError
from gubs.llm.endpoint import Work
from gubs.llm.limits import share
from gubs.llm.worker import Assignment, Done, Report, Stopped, Worker

log = logging.getLogger(__name__)

_CHUNK = 50
_AHEAD = 1.5
"""Work an actor is given, as a multiple of what it may have in flight: the rest waits there for a free slot, so that
none stays free while answers wait to be reported."""
_WAIT_S = 1.0
_START_S = 120.0
_GRACE_S = 60.0
_MOST_DEATHS = 3


@dataclass
class Member:
    """An actor and what it is busy with."""

    number: int
    actor: Any
    outstanding: dict[str, Work] = field(default_factory=dict)
    per_endpoint: dict[str, int] = field(default_factory=dict)
    buffer: list[Work] = field(default_factory=list)
    collecting: Any = None
    last: Report = field(default_factory=lambda: Report([]))

    def take(self, work: Work, step: int) -> None:
        """Counts work as given (+1) or as back (-1)."""
        self.per_endpoint[work.endpoint] = self.per_endpoint.get(work.endpoint, 0) + step


@dataclass
class News:
    """What came from the actors."""

    done: list[Done] = field(default_factory=list)
    lost: list[Work] = field(default_factory=list)
    stop: Stopped | None = None


class Pool:
    """The client actors of one driver."""

    def __init__(self, assignment: Assignment):
        """Starts the actors (`assignment.number` is filled in for each) and waits until all are ready.

        Raises:
            PlatformError: Ray is not running, or an actor does not start. JournalError: see `Worker.open`.
        """
        import ray

        if not ray.is_initialized():
            raise PlatformError("LLM calls run on Ray, which is not started: call ray.init() first")
        self._a = assignment
        self._deaths = 0
        self._retired = Report([])
        self._members = [self._start(number) for number in range(assignment.actors)]
        self._open(self._members)

    def room(self, endpoint: str) -> bool:
        """Whether some actor can take more work for the endpoint."""
        return self._roomiest(endpoint) is not None

    def submit(self, work: Work) -> None:
        """Gives work to the actor with most room for it; it is sent with the next chunk."""
        member = self._roomiest(work.endpoint)
        assert member is not None, "submit() without room()"
        member.outstanding[work.key] = work
        member.take(work, +1)
        member.buffer.append(work)
        if len(member.buffer) >= _CHUNK:
            self._send(member)

    def poll(self, timeout_s: float = _WAIT_S) -> News:
        """Sends what is buffered and returns what has come in, after `timeout_s` at the latest."""
        import ray

        for member in self._members:
            self._send(member)
            if member.collecting is None:
                member.collecting = member.actor.collect.remote(_WAIT_S)
        ready, _ = ray.wait([m.collecting for m in self._members], num_returns=1, timeout=timeout_s)
        news = News()
        for member in list(self._members):
            if member.collecting in ready:
                self._take_report(member, news)
        return news

    def drain(self, dead: str = "") -> News:
        """Lets what is on the wire finish, drops the rest (see `Worker.drain`), and returns what came in."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        news = News()
        refs = [m.actor.drain.remote(_GRACE_S, dead) for m in self._members]
        for member, ref in zip(self._members, refs, strict=True):
            try:
                if member.collecting is not None:
                    self._settle(member, ray.get(member.collecting, timeout=_WAIT_S + 10), news)
                self._settle(member, ray.get(ref, timeout=_GRACE_S + 10), news)
            except (RayActorError, GetTimeoutError) as e:
                log.warning("a client actor did not finish in order (%s); what it journaled is kept", type(e).__name__)
            member.collecting = None
        return news

    @property
    def counts(self) -> Report:
        """The latest counts, summed over the actors."""
        reports = [self._retired, *(m.last for m in self._members)]
        total = {name: sum(getattr(r, name) for r in reports) for name in ("in_flight", "retried", "copies", "cpu_s")}
        return Report([], **total)

    @property
    def busy(self) -> bool:
        """Whether work is out."""
        return any(m.outstanding for m in self._members)

    def close(self) -> None:
        """Ends the actors; what is unfinished is dropped."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            ray.get([m.actor.close.remote() for m in self._members], timeout=15)
        except (RayActorError, GetTimeoutError) as e:
            log.warning("client actors did not close in order (%s); what they journaled is kept", type(e).__name__)
        for member in self._members:
            ray.kill(member.actor)
        self._members = []

    def _start(self, number: int) -> Member:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        where = "SPREAD" if self._a.settings.spread else here
        return Member(number, ray.remote(Worker).options(num_cpus=0, scheduling_strategy=where).remote())

    def _open(self, members: list[Member]) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayTaskError

        refs = [m.actor.open.remote(self._assignment(m.number)) for m in members]
        try:
            for member, report in zip(members, ray.get(refs, timeout=_START_S), strict=True):
                member.last = report
        except GetTimeoutError:
            raise PlatformError(
                f"the client actors did not start within {_START_S:.0f} s: is the cluster full?"
            ) from None
        except RayTaskError as e:
            raise (e.cause if isinstance(e.cause, GubsError) else e) from None

    def _assignment(self, number: int) -> Assignment:
        a = self._a
        return Assignment(a.settings, a.endpoints, a.journal, a.journal_id, number, a.actors, a.keys)

    def _roomiest(self, endpoint: str) -> Member | None:
        best, most = None, 0.0
        for member in self._members:
            part = share(self._a.endpoints[endpoint].max_concurrency, member.number, self._a.actors)
            room = part and part * _AHEAD + 1 - member.per_endpoint.get(endpoint, 0)
            if room >= 1 and room > most:
                best, most = member, room
        return best

    def _send(self, member: Member) -> None:
        if member.buffer:
            member.actor.submit.remote(member.buffer)
            member.buffer = []

    def _take_report(self, member: Member, news: News) -> None:
        import ray
        from ray.exceptions import RayActorError

        try:
            report = ray.get(member.collecting)
        except RayActorError as e:
            self._replace(member, news, e)
            return
        member.collecting = None
        self._settle(member, report, news)

    def _settle(self, member: Member, report: Report, news: News) -> None:
        member.last = report
        news.done += report.done
        news.stop = news.stop or report.stop
        for done in report.done:
            work = member.outstanding.pop(done.entry.key, None)
            if work:
                member.take(work, -1)

    def _replace(self, member: Member, news: News, error: Exception) -> None:
        self._deaths += 1
        if self._deaths > _MOST_DEATHS:
            raise PlatformError(f"client actors keep dying ({self._deaths} times): {error}") from None
        log.warning(
            "client actor %d died; starting another and asking its %d open calls again",
            member.number,
            len(member.outstanding),
        )
        news.lost += member.outstanding.values()
        gone = member.last
        self._retired = Report(
            [], retried=self._retired.retried + gone.retried, copies=self._retired.copies + gone.copies
        )
        fresh = self._start(member.number)
        self._open([fresh])
        self._members[self._members.index(member)] = fresh
