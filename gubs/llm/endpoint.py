"""Calls to one endpoint, from one actor: limits, attempts, second copies of overdue ones, the resulting entry."""

import asyncio
import functools
import json
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gubs.llm.calls import Entry, LLMRequest, estimate_prompt, estimate_tokens
from gubs.llm.limits import Limits
from gubs.llm.overdue import Watch
from gubs.llm.redact import Redactor, Secret
from gubs.llm.retry import Health, Patience
from gubs.llm.settings import EndpointSettings, RetrySettings, RoleSettings
from gubs.llm.structured import Support, fields
from gubs.llm.wire import AttemptError, Reply, read_response


@dataclass(frozen=True, slots=True)
class Work:
    """One call to be made."""

    key: str
    endpoint: str
    request: LLMRequest
    identity: dict[str, Any]


class StopError(Exception):
    """Nothing more can be done; `kind` is a name in `gubs.llm.errors.STOPS`."""

    def __init__(self, kind: str, message: str, endpoint: str = ""):
        super().__init__(message)
        self.kind, self.message, self.endpoint = kind, message, endpoint


class EndpointCaller:
    """One endpoint, with this actor's share of its limits."""

    def __init__(
        self,
        name: str,
        settings: EndpointSettings,
        retries: RetrySettings,
        *,
        concurrency: int,
        fraction: float,
        key: Secret | None,
        redactor: Redactor,
    ):
        """`concurrency`: calls in flight here; `fraction`: this actor's part of the limits a minute."""
        self.name, self._settings, self._retries, self._redactor = name, settings, retries, redactor
        self._client = _client(settings, key, concurrency + 16)
        self._limits = Limits(
            concurrency, settings.requests_per_minute * fraction, settings.tokens_per_minute * fraction
        )
        self.watch = Watch(settings.hedge_share)
        self._health = Health(retries)
        self._support = Support(settings.structured)
        self._mean_out: dict[str, float] = {}
        self._watcher = asyncio.create_task(self.watch.run()) if settings.hedge else None
        self.flying: dict[str, int] = {}
        """Attempts on the wire, by key of the call."""
        self.retried = 0
        self.draining = False

    async def call(self, work: Work, role: RoleSettings) -> Entry:
        """Makes a call; returns its answer, or the failure of this one request.

        Raises:
            StopError: the endpoint is down or refuses everything.
        """
        patience, attempts = Patience(self._retries), 0
        while True:
            attempts += 1
            try:
                reply, latency_s = await self._race(work, role)
            except AttemptError as fault:
                pause_s = self._pause_s(fault, patience)
                if pause_s is None:
                    return self._failure(work, fault, attempts)
                self.retried += 1
                await asyncio.sleep(pause_s)
            else:
                return self._answer(work, reply, latency_s, attempts)

    async def close(self) -> None:
        """Closes the connections."""
        if self._watcher:
            self._watcher.cancel()
        await self._client.close()

    def _body(self, work: Work, role: RoleSettings, mode: str) -> dict[str, Any]:
        parameters = dict(work.identity["parameters"])
        parameters[role.max_tokens_field] = parameters.pop("max_tokens")
        messages = work.identity["messages"]
        return {"model": self._settings.model, "messages": messages, **parameters, **fields(work.request, mode)}

    async def _race(self, work: Work, role: RoleSettings) -> tuple[Reply, float]:
        """One attempt, with another copy beside it whenever the youngest copy is overdue; the first to end counts."""
        if not self._settings.hedge:
            return await self._copy(work, role, None)
        copies: list[asyncio.Task[tuple[Reply, float]]] = []
        try:
            while True:
                # One future for "a copy ended" and "it is overdue": cheaper than asyncio.wait on all of them.
                news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                copies.append(asyncio.create_task(self._copy(work, role, news)))
                for copy in copies:
                    copy.add_done_callback(functools.partial(_tell, news))
                await news
                ended = next((c for c in copies if c.done()), None)
                if ended:
                    return ended.result()
        finally:
            if len(copies) > 1 or not copies[0].done():
                await _cancel(copies)

    async def _copy(self, work: Work, role: RoleSettings, due: asyncio.Future[None] | None) -> tuple[Reply, float]:
        name = work.request.role
        prompt = estimate_prompt(work.request.messages)
        taken = await self._limits.admit(lambda: prompt + int(self._mean_out.get(name, role.max_tokens)))
        async with self._limits.slots:
            with self.watch.flight(name, due) as flight, self._on_the_wire(work.key):
                reply = await self._ask(work, role)
            latency_s = time.monotonic() - flight.began
        self._health.alive()
        self.watch.answered(name, latency_s)
        if reply.tokens_out is not None:
            self._mean_out[name] = 0.9 * self._mean_out.get(name, reply.tokens_out) + 0.1 * reply.tokens_out
            self._limits.settle(taken, (reply.tokens_in or 0) + reply.tokens_out)
        return reply, latency_s

    async def _ask(self, work: Work, role: RoleSettings) -> Reply:
        """Sends a request; where the endpoint does not know a way to ask for structure, at once in the next way.

        Under the same slot, so that the requests which wait for one find the way known and are not refused too.
        """
        mode = self._support.mode(work.request)
        while True:
            try:
                reply = await self._post(self._body(work, role, mode))
            except AttemptError as fault:
                lower = self._support.after(work.request, mode, fault.message) if fault.advice == "give_up" else None
                if lower is None:
                    raise
                mode = lower
            else:
                self._support.works(work.request, mode)
                return reply

    async def _post(self, body: dict[str, Any]) -> Reply:
        """One HTTP request and its response; every failure of the transport becomes an AttemptError."""
        import openai

        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
        began = time.monotonic()
        split = self._settings.reasoning == "auto"
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                response = await self._client.send(content)
        except openai.APIStatusError as e:
            response = e.response
        except TimeoutError:
            raise self._noted(_broken(f"no answer within {self._settings.timeout_s:g} s"), began) from None
        except (openai.APIConnectionError, OSError) as e:
            why = str(e.__cause__ or e) or type(e.__cause__ or e).__name__
            raise self._noted(_broken(f"the connection failed: {why}"), began) from None
        try:
            return read_response(response.status_code, response.headers, response.content, split_reasoning=split)
        except AttemptError as fault:
            raise self._noted(fault, began) from None

    def _noted(self, fault: AttemptError, began: float) -> AttemptError:
        fault.message = self._redactor.message(fault.message)
        if fault.alive:
            self._health.alive()
        else:
            self._health.failed(began)
        return fault

    def _pause_s(self, fault: AttemptError, patience: Patience) -> float | None:
        """Seconds to wait before the next attempt; None ends the call as a failure."""
        where = f"endpoint {self.name} ({self._settings.base_url}, model {self._settings.model})"
        if fault.advice == "stop":
            raise StopError("refused", f"{where} refuses: {fault.message}. Check llm.endpoints.{self.name}", self.name)
        if fault.advice == "give_up":
            return None
        pause_s = patience.pause_s(fault)
        if self._health.down(exhausted=pause_s is None):
            told = f"{where} is down: {self._health.story()}; last: {fault.message}"
            raise StopError("down", f"{told}. What is finished is kept: run again when it is up", self.name)
        if self.draining and pause_s is not None:
            raise asyncio.CancelledError
        return pause_s

    def _answer(self, work: Work, reply: Reply, latency_s: float, attempts: int) -> Entry:
        estimated = reply.tokens_in is None or reply.tokens_out is None
        tokens_in = estimate_prompt(work.request.messages) if reply.tokens_in is None else reply.tokens_in
        tokens_out = estimate_tokens(reply.reasoning + reply.text) if reply.tokens_out is None else reply.tokens_out
        return Entry(
            **self._head(work),
            text=self._redactor.known(reply.text),
            reasoning=self._redactor.known(reply.reasoning),
            finish_reason=reply.finish_reason,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            tokens_estimated=estimated,
            latency_s=round(latency_s, 4),
            attempts=attempts,
            price=price(self._settings, tokens_in, tokens_out),
            failure="refused" if reply.refusal else "",
            error=self._redactor.known(reply.refusal),
        )

    def _failure(self, work: Work, fault: AttemptError, attempts: int) -> Entry:
        lasting = fault.advice == "give_up"
        return Entry(**self._head(work), attempts=attempts, failure=fault.cause, error=fault.message, lasting=lasting)

    def _head(self, work: Work) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        request = work.request
        common = {"key": work.key, "role": request.role, "label": request.label, "request": work.identity}
        return {**common, "endpoint": self.name, "time": now}

    @contextmanager
    def _on_the_wire(self, key: str) -> Any:
        self.flying[key] = self.flying.get(key, 0) + 1
        try:
            yield
        finally:
            self.flying[key] -= 1
            if not self.flying[key]:
                del self.flying[key]


def price(settings: EndpointSettings, tokens_in: int, tokens_out: int) -> float:
    """What a call costs, in the currency of the endpoint's prices."""
    return round((tokens_in * settings.input_price + tokens_out * settings.output_price) / 1e6, 9)


def _client(settings: EndpointSettings, key: Secret | None, connections: int) -> Any:
    from gubs.llm.lean import LeanOpenAI  # imports the OpenAI client: seconds, and only client actors need it

    return LeanOpenAI(settings.base_url, key.reveal() if key else "none", connections)


def _broken(message: str) -> AttemptError:
    return AttemptError("unreachable", message, "retry", alive=False)


def _tell(news: asyncio.Future[None], _: object) -> None:
    if not news.done():
        news.set_result(None)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
