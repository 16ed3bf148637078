"""Calls to one endpoint from one actor: limits, attempts, second copies of overdue ones, the resulting entry."""

import asyncio
import functools
import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pydantic import SecretStr

from gubs.artifacts import JsonObject
from gubs.llm.calls import Entry, LLMRequest, estimate_prompt, estimate_tokens
from gubs.llm.errors import EndpointDownError, EndpointRefusedError
from gubs.llm.hedging import HedgeTimer
from gubs.llm.limits import Limits, share
from gubs.llm.redact import Redactor
from gubs.llm.retry import Health, Patience
from gubs.llm.settings import EndpointSettings, LLMSettings
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


class EndpointCaller:
    """One endpoint, with this actor's share of its limits."""

    def __init__(self, name: str, assignment: Assignment, redactor: Redactor):
        from gubs.llm.transport import Transport  # imports the OpenAI client: seconds, and only client actors need it

        self.name, self._redactor, self._role = name, redactor, assignment.settings.role
        self._settings, self._retries = settings, retries = assignment.endpoints[name], assignment.settings.retries
        slots, fraction, key = assignment.slots(name), 1 / assignment.actors, assignment.keys.get(name)
        self._client = Transport(settings.base_url, key.get_secret_value() if key else "none", slots + 16)
        self._limits = Limits(slots, settings.requests_per_minute * fraction, settings.tokens_per_minute * fraction)
        self.hedging = HedgeTimer(settings.hedge_share)
        self._health = Health(retries)
        self._support = Support(settings.structured)
        self._mean_out: dict[str, float] = {}
        self._watcher = asyncio.create_task(self.hedging.run()) if settings.hedge else None
        self.retried = 0
        self.draining = False

    async def call(self, work: Work) -> Entry:
        """Makes a call; returns its answer, or the failure of this one request.

        Raises:
            EndpointDownError, EndpointRefusedError: it will answer nothing more.
        """
        patience, attempts = Patience(self._retries), 0
        while True:
            attempts += 1
            try:
                reply, latency_s = await self._race(work)
            except AttemptError as fault:
                pause_s = self._pause_s(fault, patience)
                if pause_s is None:
                    return self._failure(work, fault, attempts)
                self.retried += 1
                await asyncio.sleep(pause_s)
            else:
                return self._answer(work, reply, latency_s, attempts)

    @property
    def in_flight(self) -> list[str]:
        """Keys of the calls with an attempt in flight, once per attempt."""
        return [flight.key for flight in self.hedging.flights]

    async def close(self) -> None:
        """Closes the connections."""
        if self._watcher:
            self._watcher.cancel()
        await self._client.close()

    def _body(self, work: Work, mode: str) -> JsonObject:
        parameters = dict(work.identity["parameters"])
        parameters[self._role(work.request.role).max_tokens_field] = parameters.pop("max_tokens")
        messages = work.identity["messages"]
        return {"model": self._settings.model, "messages": messages, **parameters, **fields(work.request, mode)}

    async def _race(self, work: Work) -> Timed:
        """One attempt, with another copy whenever the youngest copy is overdue; the first to end counts."""
        if not self._settings.hedge:
            return await self._copy(work, None)
        copies: list[asyncio.Task[Timed]] = []
        try:
            while True:
                # One future for "a copy ended" and "it is overdue": cheaper than asyncio.wait on all of them.
                wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                copies.append(asyncio.create_task(self._copy(work, wake)))
                for copy in copies:
                    copy.add_done_callback(functools.partial(_wake, wake))
                await wake
                if ended := next((c for c in copies if c.done()), None):
                    return ended.result()
        finally:
            if len(copies) > 1 or not copies[0].done():
                for copy in copies:
                    copy.cancel()
                await asyncio.gather(*copies, return_exceptions=True)

    async def _copy(self, work: Work, overdue: asyncio.Future[None] | None) -> Timed:
        name = work.request.role
        prompt, most_out = estimate_prompt(work.request.messages), self._role(name).max_tokens
        reserved = await self._limits.admit(lambda: prompt + int(self._mean_out.get(name, most_out)))
        async with self._limits.slots:
            with self.hedging.flight(name, work.key, overdue) as flight:
                reply = await self._ask(work)
            latency_s = time.monotonic() - flight.began
        self._health.alive()
        self.hedging.answered(name, latency_s)
        if reply.tokens_out is not None:
            self._mean_out[name] = 0.9 * self._mean_out.get(name, reply.tokens_out) + 0.1 * reply.tokens_out
            self._limits.settle(reserved, (reply.tokens_in or 0) + reply.tokens_out)
        return reply, latency_s

    async def _ask(self, work: Work) -> Reply:
        """Sends a request; if the endpoint does not know a way to ask for structure, tries the next one at once.

        Under the same slot, so that requests waiting for one already know the right way and are not refused too.
        """
        mode = self._support.mode(work.request)
        while True:
            try:
                reply = await self._post(self._body(work, mode))
            except AttemptError as fault:
                if fault.advice != "give_up":
                    raise
                fallback = self._support.fallback(work.request, mode, fault.message)
                if fallback is None:
                    raise
                mode = fallback
            else:
                self._support.works(work.request, mode)
                return reply

    async def _post(self, body: JsonObject) -> Reply:
        """One HTTP request and its response, counted for the endpoint's health; keys do not get into error messages."""
        began = time.monotonic()
        try:
            return await self._exchange(body)
        except AttemptError as fault:
            fault.message = self._redactor.hide_all(fault.message)
            if fault.alive:
                self._health.alive()
            else:
                self._health.failed(began)
            raise

    async def _exchange(self, body: JsonObject) -> Reply:
        import openai

        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        split = self._settings.reasoning == "auto"
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                response = await self._client.send(content)
        except openai.APIStatusError as e:
            response = e.response
        except TimeoutError:
            raise _unreachable(f"no answer within {self._settings.timeout_s:g} s") from None
        except (openai.APIConnectionError, OSError) as e:
            why = str(e.__cause__ or e) or type(e.__cause__ or e).__name__
            raise _unreachable(f"the connection failed: {why}") from None
        return read_response(response.status_code, response.headers, response.content, split_reasoning=split)

    def _pause_s(self, fault: AttemptError, patience: Patience) -> float | None:
        """Seconds until the next attempt; None ends the call as a failure."""
        where = f"endpoint {self.name} ({self._settings.base_url}, model {self._settings.model})"
        if fault.advice == "stop":
            message = f"{where} refuses: {fault.message}. Check llm.endpoints.{self.name}"
            raise EndpointRefusedError(message, self.name)
        if fault.advice == "give_up":
            return None
        pause_s = patience.pause_s(fault)
        if self._health.down(exhausted=pause_s is None):
            message = f"{where} is down: {self._health.explain()}; last: {fault.message}"
            message += ". Finished calls are kept: run again when it is up"
            raise EndpointDownError(message, self.name)
        if self.draining and pause_s is not None:
            raise asyncio.CancelledError
        return pause_s

    def _answer(self, work: Work, reply: Reply, latency_s: float, attempts: int) -> Entry:
        estimated = reply.tokens_in is None or reply.tokens_out is None
        tokens_in = estimate_prompt(work.request.messages) if reply.tokens_in is None else reply.tokens_in
        tokens_out = estimate_tokens(reply.reasoning + reply.text) if reply.tokens_out is None else reply.tokens_out
        return Entry(
            **self._head(work),
            text=self._redactor.hide_keys(reply.text),
            reasoning=self._redactor.hide_keys(reply.reasoning),
            finish_reason=reply.finish_reason,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            tokens_estimated=estimated,
            latency_s=round(latency_s, 4),
            attempts=attempts,
            price=price(self._settings, tokens_in, tokens_out),
            failure="refused" if reply.refusal else "",
            error=self._redactor.hide_keys(reply.refusal),
        )

    def _failure(self, work: Work, fault: AttemptError, attempts: int) -> Entry:
        lasting = fault.advice == "give_up"
        return Entry(**self._head(work), attempts=attempts, failure=fault.cause, error=fault.message, lasting=lasting)

    def _head(self, work: Work) -> JsonObject:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        names = {"key": work.key, "role": work.request.role, "label": work.request.label, "endpoint": self.name}
        return {**names, "request": work.identity, "time": now}


def price(settings: EndpointSettings, tokens_in: int, tokens_out: int) -> float:
    """What a call costs, in the currency of the endpoint's prices."""
    return round((tokens_in * settings.input_price + tokens_out * settings.output_price) / 1e6, 9)


def _unreachable(message: str) -> AttemptError:
    return AttemptError("unreachable", message, "retry", alive=False)


def _wake(future: asyncio.Future[None], _: object) -> None:
    if not future.done():
        future.set_result(None)
