"""Helpers for the LLM client's tests: the stand-in endpoint, settings that point to it, a client actor without Ray."""

import asyncio
import json
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import standin_llm
from standin_llm import StandinConfig

from gubs.artifacts import JsonObject
from gubs.llm.calls import Entry, LLMRequest, identity, key_of, question
from gubs.llm.client_actor import ClientActor, Report
from gubs.llm.endpoint import Assignment, Work
from gubs.llm.journal import Journal
from gubs.llm.settings import EndpointSettings, LLMSettings, RetrySettings


class Server:
    """A running stand-in endpoint."""

    def __init__(self, url: str):
        self.url = url

    def stats(self) -> JsonObject:
        with urllib.request.urlopen(f"{self.url}/stats") as response:
            return json.load(response)

    def configure(self, **config: object) -> None:
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

    def make(*, retries: JsonObject | None = None, rest: JsonObject | None = None, **endpoint: object) -> LLMSettings:
        target = EndpointSettings(**{"base_url": f"{server.url}/v1", "model": "m", "timeout_s": 20.0, **endpoint})
        pauses = RetrySettings(**{"base_s": 0.05, "max_s": 0.5, **(retries or {})})
        return LLMSettings(**{"endpoints": {"default": target}, "retries": pauses, "actors": 1, **(rest or {})})

    return make


def simple(text: str, role: str = "matcher", **rest: object) -> LLMRequest:
    return question(role, f"label/{standin_llm.request_id(text)}", text, **rest)


@dataclass
class Outcome:
    """The result of a client actor's work."""

    entries: list[Entry | None]
    """How each call ended, in the order of the requests."""
    report: Report
    """The last one."""
    attempts: list[Entry]
    """All that was journaled."""
    notes: list[str]


async def opened_actor(
    settings: LLMSettings, folder: Path, keys: dict[str, SecretStr] | None = None, name: str = "default"
) -> ClientActor:
    """A client actor in this process, with the settings' endpoint `default` under that name."""
    actor, endpoints = ClientActor(), {name: settings.endpoints["default"]}
    await actor.open(Assignment(settings, endpoints, str(folder), Journal(folder).id, 0, 1, keys or {}))
    return actor


def works_of(settings: LLMSettings, requests: list[LLMRequest], name: str = "default") -> list[Work]:
    """The calls that requests begin with."""
    idents = [identity(r, settings.role(r.role), "m") for r in requests]
    return [Work(key_of(i), name, r, i) for i, r in zip(idents, requests, strict=True)]


def run_actor(
    settings: LLMSettings,
    folder: Path,
    requests: list[LLMRequest],
    *,
    keys: dict[str, SecretStr] | None = None,
    name: str = "default",
) -> Outcome:
    """Runs requests through one client actor in this process: real HTTP, without Ray."""

    async def main() -> Outcome:
        actor = await opened_actor(settings, folder, keys, name)
        works = works_of(settings, requests, name)
        await actor.submit(works)
        attempts, notes, report = [], [], Report([])
        async with asyncio.timeout(60):
            while len({e.key for e in attempts if not e.retried}) < len({w.key for w in works}) and not report.stop:
                report = await actor.collect(1.0)
                attempts += [entry for entry, _ in report.done]
                notes += report.notes
        await actor.close()
        ended = {entry.key: entry for entry in attempts if not entry.retried}
        return Outcome([ended.get(w.key) for w in works], report, attempts, notes)

    return asyncio.run(main())
