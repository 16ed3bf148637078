"""What the tests of the LLM client share: the stand-in endpoint, settings that point to it, a worker without Ray."""

import asyncio
import json
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import standin_llm
from standin_llm import StandinConfig

from gubs.llm.calls import LLMRequest, identity, key_of, question
from gubs.llm.endpoint import Work
from gubs.llm.journal import Journal
from gubs.llm.settings import EndpointSettings, LLMSettings, RetrySettings
from gubs.llm.worker import Assignment, Done, Report, Stopped, Worker


class Server:
    """A running stand-in endpoint."""

    def __init__(self, url: str):
        self.url = url

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/stats") as response:
            return json.load(response)

    def configure(self, **config: Any) -> None:
        body = json.dumps(config).encode()
        request = urllib.request.Request(f"{self.url}/config", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request).close()

    def calls(self, text: str) -> int:
        return self.stats()["calls"].get(standin_llm.request_id(text), 0)


@pytest.fixture
def server() -> Iterator[Server]:
    with standin_llm.running(StandinConfig()) as url:
        yield Server(url)


@pytest.fixture
def settings_for(server: Server) -> Callable[..., LLMSettings]:
    """Settings with one endpoint, the stand-in, and short pauses; keyword arguments go to the endpoint."""

    def make(
        *, retries: dict[str, Any] | None = None, rest: dict[str, Any] | None = None, **endpoint: Any
    ) -> LLMSettings:
        target = EndpointSettings(**{"base_url": f"{server.url}/v1", "model": "m", "timeout_s": 20.0, **endpoint})
        pauses = RetrySettings(**{"base_s": 0.05, "max_s": 0.5, **(retries or {})})
        return LLMSettings(**{"endpoints": {"default": target}, "retries": pauses, "actors": 1, **(rest or {})})

    return make


def simple(text: str, role: str = "matcher", **rest: Any) -> LLMRequest:
    return question(role, f"label/{standin_llm.request_id(text)}", text, **rest)


class Outcome:
    """What a worker made of its work, in the order of the requests."""

    def __init__(self, requests: list[LLMRequest], keys: list[str], done: list[Done], report: Report):
        by_key = {d.entry.key: d.entry for d in done}
        self.entries = [by_key.get(k) for k in keys]
        self.stop: Stopped | None = report.stop
        self.report = report


def run_worker(
    settings: LLMSettings,
    folder: Path,
    requests: list[LLMRequest],
    *,
    keys: dict[str, Any] | None = None,
    limit_s: float = 60,
) -> Outcome:
    """Runs requests through one worker in this process: the real client over real HTTP, without Ray."""

    async def main() -> Outcome:
        journal = Journal(folder)
        worker = Worker()
        await worker.open(Assignment(settings, settings.endpoints, str(folder), journal.id, 0, 1, keys or {}))
        works = []
        for request in requests:
            ident = identity(request, settings.role(request.role), "m")
            works.append(Work(key_of(ident), "default", request, ident))
        await worker.submit(works)
        done, report = [], Report([])
        async with asyncio.timeout(limit_s):
            while len(done) < len({w.key for w in works}) and not report.stop:
                report = await worker.collect(1.0)
                done += report.done
        await worker.close()
        return Outcome(requests, [w.key for w in works], done, report)

    return asyncio.run(main())
