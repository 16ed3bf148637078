"""Calls to one endpoint from one actor: limits, attempts, second copies of overdue ones, the resulting entries."""

import asyncio
import functools
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import SecretStr

from gubs.artifacts import JsonObject
from gubs.llm.calls import Entry, LLMRequest, estimate_prompt, estimate_tokens
from gubs.llm.errors import EndpointDownError, EndpointRefusedError
from gubs.llm.hedging import HedgeTimer
from gubs.llm.limits import Limits, Pace, share
from gubs.llm.parameters import Parameters, may_be_about_structure, named
from gubs.llm.probing import Probes
from gubs.llm.redact import Redactor
from gubs.llm.retry import Health, Patience, Refusals
from gubs.llm.settings import EMBEDDED, EndpointSettings, LLMSettings
from gubs.llm.structured import Support, fields
from gubs.llm.wire import AttemptError, Reply, read_response

Timed = tuple[Reply, float]
"""A reply and its latency in seconds."""


@dataclass(frozen=True)
class Assignment:
    """What an actor gets when it starts."""

    settings: LLMSettings
    endpoints: dict[str, EndpointSettings]
    journal: str
    journal_id: str
    number: int
    """Of this actor, from 0."""
    actors: int
    keys: dict[str, SecretStr] = field(default_factory=dict)

    @property
    def metered(self) -> bool:
        """Whether there is a budget, so that each further attempt of a call has to be admitted."""
        return any(self.settings.budget.model_dump().values())

    def slots(self, endpoint: str) -> int:
        """Calls that this actor may have in flight at an endpoint."""
        return share(self.endpoints[endpoint].max_concurrency, self.number, self.actors)


@dataclass(frozen=True, slots=True)
class Work:
    """One call to make."""

    key: str
    endpoint: str
    request: LLMRequest
    identity: JsonObject
    more_room: bool = False
    """It asks for more tokens than usual, which the endpoint may not have."""


@dataclass(slots=True, eq=False)
class Call:
    """A call while it is made."""

    work: Work
    attempts: int = 0
    """HTTP requests sent."""


@dataclass(frozen=True, slots=True)
class CallHandlers:
    """What an endpoint's caller reports to, and asks, while its calls are made."""

    keep: Callable[[Entry], None]
    """Takes the entry of an attempt that did not end its call."""
    may_repeat: Callable[[str], Awaitable[bool]]
    """Whether the call of that key may have another attempt that costs something."""
    tell: Callable[[str], None]
    """Takes a line for the person who waits."""


class EndpointCaller:
    """One endpoint, with this actor's share of its limits."""

    def __init__(self, name: str, assignment: Assignment, redactor: Redactor, handlers: CallHandlers):
        from gubs.llm.transport import Transport  # imports the OpenAI client: seconds, and only client actors need it

        self.name, self._redactor, self._role, self._handlers = name, redactor, assignment.settings.role, handlers
        self._settings, self._retries = settings, retries = assignment.endpoints[name], assignment.settings.retries
        slots, fraction, key = assignment.slots(name), 1 / assignment.actors, assignment.keys.get(name)
        self._client = Transport(settings.base_url, key.get_secret_value() if key else "none", slots + 16)
        self._limits = Limits(slots, settings.requests_per_minute * fraction, settings.tokens_per_minute * fraction)
        self._pace, self._probes = Pace(retries), Probes()
        self.hedging = HedgeTimer(settings.hedge_share)
        self._health, self._refusals = Health(retries), Refusals()
        self._support, self._parameters = Support(settings.structured), Parameters()
        self._mean_out: dict[str, float] = {}
        self._watcher = asyncio.create_task(self.hedging.run()) if settings.hedge else None
        self._metered = assignment.metered
        self.retried = 0
        self.draining = False

    async def call(self, work: Work) -> Entry | None:
        """Makes a call; returns its answer, or the failure of this one request; None if the budget ended it.

        Raises:
            EndpointDownError, EndpointRefusedError: it will answer nothing more.
        """
        call, patience = Call(work), Patience(self._retries)
        while True:
            try:
                reply, latency_s = await self._race(call)
            except AttemptError as fault:
                pause_s = self._pause_s(call, fault, patience)
                if pause_s is None:
                    return self._failed(call, fault)
                self._note(call, fault)
                if self.draining:
                    raise asyncio.CancelledError from None
                if fault.billed and not await self._may_repeat(call):
                    return None
                self.retried += 1
                await asyncio.sleep(pause_s)
            else:
                return self._answer(call, reply, latency_s)

    @property
    def in_flight(self) -> list[str]:
        """Keys of the calls with an attempt in flight, once per attempt."""
        return [flight.key for flight in self.hedging.flights]

    @property
    def _where(self) -> str:
        """Where its settings are."""
        return "llm.embedded" if self.name == EMBEDDED else f"llm.endpoints.{self.name}"

    async def close(self) -> None:
        """Closes the connections."""
        if self._watcher:
            self._watcher.cancel()
        await self._client.close()

    def _body(self, work: Work, mode: str) -> JsonObject:
        parameters = dict(work.identity["parameters"])
        parameters[self._role(work.request.role).max_tokens_field] = parameters.pop("max_tokens")
        messages, fitting = work.identity["messages"], self._parameters.fit(parameters)
        return {"model": self._settings.model, "messages": messages, **fitting, **fields(work.request, mode)}

    async def _race(self, call: Call) -> Timed:
        """One attempt, with another copy whenever the youngest copy is overdue; the first answer counts."""
        if not self._settings.hedge:
            return await self._copy(call, None)
        copies: list[asyncio.Task[Timed]] = []
        another = True
        try:
            while True:
                # One future for "a copy ended" and "it is overdue": cheaper than asyncio.wait on all of them.
                wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                if another:
                    copies.append(asyncio.create_task(self._copy(call, wake)))
                for copy in copies:
                    copy.add_done_callback(functools.partial(_wake, wake))
                await wake
                ended = [c for c in copies if c.done()]
                for copy in ended:
                    # All but the youngest are overdue, perhaps hung: if it fails, the call begins anew.
                    decides = len(copies) == 1 or (copy is copies[-1] and not copy.cancelled())
                    if decides or not self._set_aside(call, copy):
                        return copy.result()
                    copies.remove(copy)
                another = not (ended or self.draining) and await self._may_repeat(call)
                another = another and not any(c.done() for c in copies)
        finally:
            if len(copies) > 1 or not copies[0].done():
                for copy in copies:
                    copy.cancel()
                await asyncio.gather(*copies, return_exceptions=True)
            elif not copies[0].cancelled():
                copies[0].exception()  # else asyncio complains if this call was cancelled at the same moment

    def _set_aside(self, call: Call, copy: "asyncio.Task[Timed]") -> bool:
        """Notes the failure of a copy beside which others run; False if it answered or all must stop."""
        if copy.cancelled():  # it was not sent any more
            return True
        fault = copy.exception()
        if not isinstance(fault, AttemptError) or fault.advice == "stop":
            return False
        self._note(call, fault)
        return True

    async def _copy(self, call: Call, copy_wanted: asyncio.Future[None] | None) -> Timed:
        work, name = call.work, call.work.request.role
        prompt, most_out = estimate_prompt(work.request.messages), self._role(name).max_tokens
        kind = _kind(work)
        if not self._probes.is_known(kind):
            async with self._probes.turn(kind):
                return await self._sent(call, copy_wanted, prompt, most_out)
        return await self._sent(call, copy_wanted, prompt, most_out)

    async def _sent(self, call: Call, copy_wanted: asyncio.Future[None] | None, prompt: int, most_out: int) -> Timed:
        name = call.work.request.role
        reserved = await self._limits.admit(lambda: prompt + int(self._mean_out.get(name, most_out)))
        async with self._limits.slots:
            await self._pace.turn()
            if self.draining:
                raise asyncio.CancelledError
            with self.hedging.flight(name, call.work.key, copy_wanted) as flight:
                try:
                    reply = await self._ask(call)
                except asyncio.CancelledError:
                    self._note_overtaken(call)
                    raise
            latency_s = time.monotonic() - flight.began
        self._health.answered()
        self._pace.answered()
        self._refusals.answered()
        self.hedging.answered(name, latency_s)
        if reply.tokens_out is not None:
            self._mean_out[name] = 0.9 * self._mean_out.get(name, reply.tokens_out) + 0.1 * reply.tokens_out
            self._limits.settle(reserved, (reply.tokens_in or 0) + reply.tokens_out)
        return reply, latency_s

    async def _ask(self, call: Call) -> Reply:
        """Sends a request; if the endpoint does not take a parameter or a way to ask for structure, changes that and
        sends it again.

        Under the same slot, so that requests waiting for one already know the right way and are not refused too.
        """
        request = call.work.request
        mode = self._support.mode(request)
        while True:
            body = self._body(call.work, mode)
            try:
                reply = await self._post(call, body)
            except AttemptError as fault:
                if fault.cause != "rejected" or (call.work.more_room and self._health.has_answered):
                    raise  # a refusal of more room than usual is about this request alone
                if change := self._parameters.adapt(body, fault):
                    self._handlers.tell(f"endpoint {self.name} is asked {change} from now on: {fault.message}")
                elif may_be_about_structure(body, fault) and (
                    fallback := self._support.fallback(request, mode, fault.message)
                ):
                    mode = fallback
                else:
                    if not call.work.more_room and self._refusals.refused(fault, len(self.in_flight) - 1):
                        fault.advice, self.draining = "stop", True  # before another call takes its turn
                    raise
                self._note(call, fault)
                await self._limits.admit(lambda: 0)
            else:
                self._support.works(request, mode)
                return reply

    async def _post(self, call: Call, body: JsonObject) -> Reply:
        """One HTTP request and its response, counted for the endpoint's health; keys do not get into error messages."""
        began = time.monotonic()
        call.attempts += 1
        try:
            return await self._exchange(body)
        except AttemptError as fault:
            fault.message = self._redactor.hide_all(fault.message)
            if fault.cause == "rate_limited":
                self._pace.refused(began, fault.after_s)
            if fault.alive:
                self._health.alive()
            else:
                self._health.failed(fault, began, call.work.key)
            raise

    async def _exchange(self, body: JsonObject) -> Reply:
        import httpx2
        import openai

        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        split = self._settings.reasoning == "auto"
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                response = await self._client.send(content)
        except openai.APIStatusError as e:
            response = e.response
        except TimeoutError:
            raise _silent(f"no answer within {self._settings.timeout_s:g} s") from None
        except (openai.APIConnectionError, OSError) as e:
            why = str(e.__cause__ or e) or type(e.__cause__ or e).__name__
            connected = not isinstance(e.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout)
            raise _silent(f"the connection failed: {why}", billed=connected) from None
        return read_response(response.status_code, response.headers, response.content, split_reasoning=split)

    async def _may_repeat(self, call: Call) -> bool:
        return not self._metered or await self._handlers.may_repeat(call.work.key)

    def _pause_s(self, call: Call, fault: AttemptError, patience: Patience) -> float | None:
        """Seconds until the next attempt; None ends the call as a failure.

        Raises:
            EndpointDownError, EndpointRefusedError: no call would be answered.
        """
        where = f"endpoint {self.name} ({self._settings.base_url}, model {self._settings.model})"
        kept = ". Finished calls are kept: run again when it is up"
        if fault.advice == "give_up":
            return None
        if fault.advice == "stop":
            self._give_up(call, fault)
            rejected = fault.cause == "rejected"
            remedy = self._remedy(call, fault) if rejected else f"Check {self._where}"
            every = " every call" if rejected else ""
            raise EndpointRefusedError(f"{where} refuses{every}: {fault.message}. {remedy}", self.name)
        pause_s = patience.pause_s(fault, self._health.answered_at)
        if not fault.alive and self._health.down():
            self._give_up(call, fault)
            message = f"{where} is down: {self._health.explain()}; last: {fault.message}{kept}"
            raise EndpointDownError(message, self.name)
        if fault.advice == "wait" and pause_s is None:
            self._give_up(call, fault)
            message = f"{where} only asks to slow down, for {self._retries.patience_s:g} s: {fault.message}{kept}"
            raise EndpointDownError(message, self.name)
        return pause_s

    def _give_up(self, call: Call, fault: AttemptError) -> None:
        """Notes the attempt after which nothing more is sent."""
        self._note(call, fault)
        self.draining = True

    def _remedy(self, call: Call, fault: AttemptError) -> str:
        """Which parameter to drop, as far as the server says."""
        role = call.work.request.role
        extra = self._role(role).extra
        sent = {**call.work.identity["parameters"], **fields(call.work.request, self._support.mode(call.work.request))}
        names = named(sent, fault)
        drop = [
            f"take {n} out of llm.roles.{role}.extra" if n in extra else f"set llm.roles.{role}.{n}=null"
            for n in names
            if n in extra or n in ("temperature", "top_p", "seed")
        ]
        return f"Drop {' and '.join(names)}: {' and '.join(drop)}" if drop else f"Check llm.roles.{role}"

    def _answer(self, call: Call, reply: Reply, latency_s: float) -> Entry:
        estimated = reply.tokens_in is None or reply.tokens_out is None
        prompt = estimate_prompt(call.work.request.messages)
        tokens_in = prompt if reply.tokens_in is None else reply.tokens_in
        tokens_out = estimate_tokens(reply.reasoning + reply.text) if reply.tokens_out is None else reply.tokens_out
        return Entry(
            **self._head(call),
            text=self._redactor.hide_keys(reply.text),
            reasoning=self._redactor.hide_keys(reply.reasoning),
            finish_reason=reply.finish_reason,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            tokens_estimated=estimated,
            latency_s=round(latency_s, 4),
            price=price(self._settings, tokens_in, tokens_out),
            failure="refused" if reply.refusal else "",
            error=self._redactor.hide_keys(reply.refusal),
        )

    def _failed(self, call: Call, fault: AttemptError, *, retried: bool = False, tokens_out: int = 0) -> Entry:
        """The entry of an attempt without an answer; what it may cost is estimated."""
        tokens_in = estimate_prompt(call.work.request.messages) if fault.billed else 0
        return Entry(
            **(self._head(call) | ({"request": {}} if retried else {})),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            tokens_estimated=fault.billed,
            price=price(self._settings, tokens_in, tokens_out),
            billed=fault.billed,
            failure=fault.cause,
            error=fault.message,
            retried=retried,
        )

    def _note(self, call: Call, fault: AttemptError) -> None:
        """Journals an attempt that does not end its call."""
        self._handlers.keep(self._failed(call, fault, retried=True))

    def _note_overtaken(self, call: Call) -> None:
        """Journals an attempt whose answer is not waited for any more; the server may bill it all the same."""
        fault = AttemptError("overtaken", "another attempt was faster, or the run ended", "retry", billed=True)
        tokens_out = int(self._mean_out.get(call.work.request.role, 0))
        self._handlers.keep(self._failed(call, fault, retried=True, tokens_out=tokens_out))

    def _head(self, call: Call) -> JsonObject:
        work, now = call.work, datetime.now(UTC).isoformat(timespec="milliseconds")
        names = {"key": work.key, "role": work.request.role, "label": work.request.label, "endpoint": self.name}
        counts = {"model": self._settings.model, "attempts": call.attempts}
        return {**names, **counts, "request": work.identity, "time": now}


def _kind(work: Work) -> tuple[object, ...]:
    """What decides whether an endpoint takes a request: the fields it sends."""
    return (*work.identity["parameters"], work.request.schema is not None, work.request.regex is not None)


def price(settings: EndpointSettings, tokens_in: int, tokens_out: int) -> float:
    """What a call costs, in the currency of the endpoint's prices."""
    return round((tokens_in * settings.input_price + tokens_out * settings.output_price) / 1e6, 9)


def _silent(message: str, *, billed: bool = True) -> AttemptError:
    return AttemptError("unreachable", message, "retry", alive=False, responded=False, billed=billed)


def _wake(future: asyncio.Future[None], _: object) -> None:
    if not future.done():
        future.set_result(None)
