"""A stand-in for a real LLM endpoint, in a process of its own: known latencies, known faults, and a count of every
call.

It speaks the part of the OpenAI chat API that gubs uses, over real HTTP. `python benchmarks/standin_llm.py --config
JSON` prints `listening PORT` and serves until it is ended. Latency and faults are functions of the request (the text
of its last message, and how often that text was asked before), so that the time an ideal client would need can be
computed.
"""

import argparse
import asyncio
import collections
import dataclasses
import hashlib
import heapq
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from aiohttp import web

Rule = dict[str, Any]
"""A scripted reply. `match`: part of the last message ("" = every request); `nth`: only that call of the message,
from 1; then one of `text`, `body` (the whole JSON), `raw` (as sent), `fault`; and as wanted `status`, `headers`,
`message` (further fields), `finish_reason`, `latency_s`."""


@dataclass(frozen=True)
class StandinConfig:
    """What the endpoint is like."""

    median_s: float = 0.0
    """Median of the log-normal latency; 0 = answers at once."""
    sigma: float = 0.5
    seed: int = 0
    faults: dict[str, float] = field(default_factory=dict)
    """Share of calls per fault: `429`, `500`, `hang`, `drip`, `cut`, `reset`."""
    retry_after: str = "1"
    """Seconds, or `date:SECONDS` for the HTTP-date form."""
    key: str = ""
    """Where set, calls without this bearer key are answered 401, with the header they sent in the message."""
    per_s: float = 0.0
    """Calls that are taken per second, and at once after a pause; further ones are answered 429. 0 = all."""
    refuses: list[str] = field(default_factory=list)
    """Body fields (as `response_format`) that are answered 400 as unknown."""
    rules: list[Rule] = field(default_factory=list)
    """The first rule that fits decides."""


def request_id(text: str) -> str:
    """Short name of a request: a hash of its last message."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def latency_s(config: StandinConfig, text: str) -> float:
    """Seconds a request takes, the same at each call."""
    if config.median_s <= 0:
        return 0.0
    z = random.Random(f"{config.seed}/latency/{request_id(text)}").gauss(0.0, 1.0)
    return config.median_s * math.exp(config.sigma * z)


def fault_of(config: StandinConfig, text: str, nth: int) -> str | None:
    """Fault that the n-th call (from 1) of a request meets; None = it is answered."""
    draw = random.Random(f"{config.seed}/fault/{request_id(text)}/{nth}").random()
    for name, share in config.faults.items():
        if draw < share:
            return name
        draw -= share
    return None


def ideal_s(config: StandinConfig, phases: Sequence[Sequence[str]], concurrency: int) -> float:
    """Time of an infinitely fast client without faults: phases one after the other, `concurrency` calls at a time."""
    total = 0.0
    for texts in phases:
        slots = [0.0] * concurrency
        for text in texts:
            heapq.heapreplace(slots, slots[0] + latency_s(config, text))
        total += max(slots)
    return total


class Standin:
    """State and handlers of the endpoint."""

    def __init__(self, config: StandinConfig):
        self.config = config
        self.calls: collections.Counter[str] = collections.Counter()
        self.answered: collections.Counter[str] = collections.Counter()
        self.in_flight = self.peak = self.total = 0
        self.arrivals: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self._level = 0.0
        self._level_at = float("-inf")

    def app(self) -> web.Application:
        """The web application."""
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/stats", self.stats)
        app.router.add_post("/config", self.configure)
        return app

    async def stats(self, _: web.Request) -> web.Response:
        """What was asked: calls and answers per request, the peak in flight, arrival times, the last bodies."""
        keep = ("calls", "answered", "peak", "in_flight", "total", "arrivals", "bodies")
        return web.json_response({name: getattr(self, name) for name in keep})

    async def configure(self, request: web.Request) -> web.Response:
        """Replaces the configuration; the counts stay."""
        self.config = StandinConfig(**await request.json())
        return web.json_response({})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """One call."""
        body = await request.json()
        text = body["messages"][-1]["content"]
        name = request_id(text)
        self.total += 1
        self.calls[name] += 1
        self.arrivals.append(asyncio.get_running_loop().time())
        self.bodies = [*self.bodies[-19:], body]
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            return await self._reply(request, body, text, self.calls[name])
        finally:
            self.in_flight -= 1

    async def _reply(self, request: web.Request, body: dict[str, Any], text: str, nth: int) -> web.StreamResponse:
        sent = request.headers.get("Authorization", "")
        if self.config.key and sent != f"Bearer {self.config.key}":
            return _error(401, f"Incorrect API key provided: {sent}")
        for unknown in self.config.refuses:
            if unknown in body:
                return _error(400, f"Unrecognized request argument supplied: {unknown}")
        if self.config.per_s and not self._takes():
            return _error(429, "Rate limit reached; see your plan and billing details", code="rate_limit_exceeded")
        rule = next((r for r in self.config.rules if r.get("match", "") in text and r.get("nth", nth) == nth), {})
        fault = rule.get("fault") or (None if rule else fault_of(self.config, text, nth))
        if fault:
            return await self._fail(request, fault)
        await asyncio.sleep(rule.get("latency_s", latency_s(self.config, text)))
        self.answered[request_id(text)] += 1
        return _answer(rule, body, text)

    def _takes(self) -> bool:
        now = asyncio.get_running_loop().time()
        self._level = min(self.config.per_s, self._level + (now - self._level_at) * self.config.per_s)
        self._level_at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True

    async def _fail(self, request: web.Request, fault: str) -> web.StreamResponse:
        if fault == "429":
            return _error(429, "Rate limit reached", {"Retry-After": self._retry_after()})
        if fault == "500":
            return _error(500, "The server had an error")
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "drip":
            return await self._drip(request)
        if fault == "reset":
            assert request.transport
            request.transport.abort()
            return web.Response()
        cut = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "4000"})
        await cut.prepare(request)
        await cut.write(b'{"id": "x", "choices": [{"message": {"content": "half an ans')
        assert request.transport
        request.transport.close()
        return cut

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        """A body that never ends, a byte now and then: no pause is long enough for a timeout between two reads."""
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"id": "')
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.1)

    def _retry_after(self) -> str:
        if self.config.retry_after.startswith("date:"):
            when = datetime.now(UTC) + timedelta(seconds=float(self.config.retry_after.removeprefix("date:")))
            return format_datetime(when, usegmt=True)
        return self.config.retry_after


def _error(status: int, message: str, headers: dict[str, str] | None = None, code: str | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "code": code}}, status=status, headers=headers)


def _answer(rule: Rule, body: dict[str, Any], text: str) -> web.Response:
    status, headers = rule.get("status", 200), rule.get("headers")
    if "raw" in rule:
        return web.Response(text=rule["raw"], status=status, headers=headers, content_type="application/json")
    if "body" in rule:
        return web.json_response(rule["body"], status=status, headers=headers)
    message = {
        "role": "assistant",
        "content": rule.get("text", f"answer to {request_id(text)}"),
        **rule.get("message", {}),
    }
    usage = {"prompt_tokens": len(text) // 4 + 8, "completion_tokens": len(message["content"] or "") // 4 + 1}
    choice = {"index": 0, "message": message, "finish_reason": rule.get("finish_reason", "stop")}
    reply = {"id": "standin", "object": "chat.completion", "model": body["model"], "choices": [choice], "usage": usage}
    return web.json_response(reply, status=status, headers=headers)


@contextmanager
def running(config: StandinConfig) -> Iterator[str]:
    """Starts the endpoint in a process of its own, yields its address (`http://127.0.0.1:PORT`) and ends it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--config", json.dumps(dataclasses.asdict(config))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not line.startswith("listening "):
            raise RuntimeError(f"the stand-in endpoint did not start (it said {line!r})")
        yield f"http://127.0.0.1:{line.split()[1]}"
    finally:
        process.terminate()
        process.wait(10)


async def _serve(config: StandinConfig) -> None:
    runner = web.AppRunner(Standin(config).app(), access_log=None, shutdown_timeout=0.2)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    print("listening", runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="{}")
    asyncio.run(_serve(StandinConfig(**json.loads(parser.parse_args().config))))
