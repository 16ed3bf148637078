"""A typed client of the filter service, sync and async. What the service calls retryable is tried again.

with Client("http://127.0.0.1:8000", key="gubs_...") as client:
answer = client.filter(user="u17", candidates=["v1", "v2"])
kept = [r.id for r in answer.results if r.decision == "keep"]
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypedDict, TypeVar, Unpack

import httpx
from pydantic import TypeAdapter

from gubs.errors import GubsError
from gubs.records import Task
from gubs.serving.filter import Mode
from gubs.serving.schemas import (
    Candidate,
    ErrorBody,
    ExplainRequest,
    ExplainResponse,
    FilterLine,
    FilterRequest,
    FilterResponse,
    Group,
    ModelInfo,
    Problem,
    User,
    UserRef,
)

T = TypeVar("T")
_LONGEST_WAIT_S = 30.0
_NOT_OURS = (408, 429, 500, 502, 503, 504)
"""Statuses that are worth another attempt where no reason is given: a gateway's, or of Serve's proxy (500: the ingress
that had the request is lost, and the proxy runs without our guard).
"""


class ServiceError(GubsError):
    """The service refused a request, or did not answer."""

    exit_code = 5

    def __init__(self, problem: Problem, status: int = 0):
        super().__init__(f"{problem.code}: {problem.message}")
        self.problem, self.status = problem, status


class FilterOptions(TypedDict, total=False):
    """What a filter request may say besides the user and the candidates; see `FilterRequest`."""

    task: Task
    mode: Mode | None
    """Default: the service's."""
    threshold: float | None
    """Drop above this P(skip). Default: the filter's own."""
    timeout_ms: int | None
    explain: bool
    """Whether reasons are wanted."""


class _Api:
    """Requests and answers, without the sending."""

    def __init__(self, url: str, key: str = "", timeout_s: float = 30.0, retries: int = 3):
        """Sends nothing yet.

        Args:
            url: of the service.
            key: API key; empty for a service that asks for none.
            timeout_s: longest time an attempt may take.
            retries: further attempts after a retryable error.
        """
        self._options: dict[str, Any] = {
            "base_url": url,
            "timeout": timeout_s,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
        }
        self._retries = retries

    def _filter(self, user: UserRef | str, candidates: Sequence[Candidate | str], options: FilterOptions) -> str:
        listed = [_candidate(c) for c in candidates]
        return FilterRequest(user=_user(user), candidates=listed, **options).model_dump_json(exclude_defaults=True)

    def _explain(self, user: UserRef | str, candidate: Candidate | str, task: Task) -> str:
        request = ExplainRequest(user=_user(user), candidate=_candidate(candidate), task=task)
        return request.model_dump_json(exclude_defaults=True)

    def _pause(self, attempt: int, outcome: httpx.Response | httpx.HTTPError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            ServiceError: there is none.
        """
        if isinstance(outcome, httpx.Response):
            problem, status = _problem(outcome), outcome.status_code
            wait = _seconds(outcome.headers.get("retry-after", ""))
        else:
            problem, status, wait = _unreachable(str(outcome)), 0, 0.0
        if not problem.retryable or attempt >= self._retries:
            raise ServiceError(problem, status)
        return min(_LONGEST_WAIT_S, max(wait, 0.2 * 2**attempt * random.uniform(0.5, 1.5)))


class _Lines:
    """The lines of a streamed answer, put together from its blocks."""

    def __init__(self) -> None:
        self.begun = False
        """A line has come: asking again would repeat it."""
        self._rest, self._done = b"", False

    def read(self, block: bytes) -> Iterator[FilterLine]:
        """The lines that end in the next block.

        Raises:
            ServiceError: the service says that no more come.
        """
        *whole, self._rest = (self._rest + block).split(b"\n")  # texts may hold what else counts as a line's end
        for text in whole:
            line = FilterLine.model_validate_json(text)
            if line.error:
                raise ServiceError(line.error)
            self.begun, self._done = True, line.done is not None
            yield line

    def end(self) -> None:
        """Looks whether the answer is whole.

        Raises:
            ServiceError: it broke off.
        """
        if not self._done:
            raise ServiceError(_unreachable("the answer broke off"))


class Client(_Api):
    """The synchronous client; a context manager."""

    def __enter__(self) -> Self:
        self._http = httpx.Client(**self._options)
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def filter(
        self, user: UserRef | str, candidates: Sequence[Candidate | str], **options: Unpack[FilterOptions]
    ) -> FilterResponse:
        """Which candidates to keep. Errors: `ServiceError`."""
        return self._send("POST", "/v1/filter", FilterResponse, self._filter(user, candidates, options))

    def filter_lines(
        self, user: UserRef | str, candidates: Sequence[Candidate | str], **options: Unpack[FilterOptions]
    ) -> Iterator[FilterLine]:
        """As `filter`, but each decision as soon as it is there, so not in the order of the candidates (`index`). The
        last line has `done`, with what else a response says.

        Raises:
            ServiceError: as ever; also after some lines, of which none is then asked for again.
        """
        body, attempt = self._filter(user, candidates, options), 0
        while True:
            lines = _Lines()
            try:
                with self._http.stream("POST", "/v1/filter", content=body, headers=_NDJSON) as response:
                    if response.is_success:
                        for block in response.iter_bytes():
                            yield from lines.read(block)
                        lines.end()
                        return
                    response.read()
                    outcome: httpx.Response | httpx.HTTPError = response
            except httpx.HTTPError as e:
                if lines.begun:
                    raise ServiceError(_unreachable(str(e))) from None
                outcome = e
            time.sleep(self._pause(attempt, outcome))
            attempt += 1

    def explain(
        self, user: UserRef | str, candidate: Candidate | str, *, task: Task = Task.SEQUENTIAL
    ) -> ExplainResponse:
        """The answers with the user's own, a similar user's, a group's and no profile."""
        return self._send("POST", "/v1/explain", ExplainResponse, self._explain(user, candidate, task))

    def groups(self) -> list[Group]:
        """The groups of users."""
        return self._send("GET", "/v1/groups", list[Group])

    def user(self, user_id: str) -> User:
        """A user that the filter knows."""
        return self._send("GET", f"/v1/users/{_quoted(user_id)}", User)

    def models(self) -> list[ModelInfo]:
        """The deployed versions."""
        return self._send("GET", "/v1/models", list[ModelInfo])

    def _send(self, method: str, path: str, kind: type[T], body: str | None = None) -> T:
        attempt = 0
        while True:
            try:
                outcome: httpx.Response | httpx.HTTPError = self._http.request(
                    method, path, content=body, headers=_JSON
                )
            except httpx.HTTPError as e:
                outcome = e
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return TypeAdapter(kind).validate_json(outcome.content)
            time.sleep(self._pause(attempt, outcome))
            attempt += 1


class AsyncClient(_Api):
    """The asynchronous client; an asynchronous context manager."""

    async def __aenter__(self) -> Self:
        self._http = httpx.AsyncClient(**self._options)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def filter(
        self, user: UserRef | str, candidates: Sequence[Candidate | str], **options: Unpack[FilterOptions]
    ) -> FilterResponse:
        """Which candidates to keep. Errors: `ServiceError`."""
        return await self._send("POST", "/v1/filter", FilterResponse, self._filter(user, candidates, options))

    async def filter_lines(
        self, user: UserRef | str, candidates: Sequence[Candidate | str], **options: Unpack[FilterOptions]
    ) -> AsyncIterator[FilterLine]:
        """See `Client.filter_lines`."""
        body, attempt = self._filter(user, candidates, options), 0
        while True:
            lines = _Lines()
            try:
                async with self._http.stream("POST", "/v1/filter", content=body, headers=_NDJSON) as response:
                    if response.is_success:
                        async for block in response.aiter_bytes():
                            for line in lines.read(block):
                                yield line
                        lines.end()
                        return
                    await response.aread()
                    outcome: httpx.Response | httpx.HTTPError = response
            except httpx.HTTPError as e:
                if lines.begun:
                    raise ServiceError(_unreachable(str(e))) from None
                outcome = e
            await asyncio.sleep(self._pause(attempt, outcome))
            attempt += 1

    async def explain(
        self, user: UserRef | str, candidate: Candidate | str, *, task: Task = Task.SEQUENTIAL
    ) -> ExplainResponse:
        """The answers with the user's own, a similar user's, a group's and no profile."""
        return await self._send("POST", "/v1/explain", ExplainResponse, self._explain(user, candidate, task))

    async def groups(self) -> list[Group]:
        """The groups of users."""
        return await self._send("GET", "/v1/groups", list[Group])

    async def user(self, user_id: str) -> User:
        """A user that the filter knows."""
        return await self._send("GET", f"/v1/users/{_quoted(user_id)}", User)

    async def models(self) -> list[ModelInfo]:
        """The deployed versions."""
        return await self._send("GET", "/v1/models", list[ModelInfo])

    async def _send(self, method: str, path: str, kind: type[T], body: str | None = None) -> T:
        attempt = 0
        while True:
            try:
                outcome: httpx.Response | httpx.HTTPError = await self._http.request(
                    method, path, content=body, headers=_JSON
                )
            except httpx.HTTPError as e:
                outcome = e
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return TypeAdapter(kind).validate_json(outcome.content)
            await asyncio.sleep(self._pause(attempt, outcome))
            attempt += 1


def _seconds(retry_after: str) -> float:
    """Seconds to wait, of a Retry-After header in seconds or (a gateway's, perhaps) as a date."""
    with suppress(ValueError):
        return float(retry_after)
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


_JSON = {"Content-Type": "application/json"}
_NDJSON = _JSON | {"Accept": "application/x-ndjson"}


def _user(user: UserRef | str) -> UserRef:
    return UserRef(id=user) if isinstance(user, str) else user


def _candidate(video: Candidate | str) -> Candidate:
    return Candidate(id=video) if isinstance(video, str) else video


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def _unreachable(message: str) -> Problem:
    return Problem(code="unreachable", message=message, retryable=True)


def _problem(response: httpx.Response) -> Problem:
    try:
        return ErrorBody.model_validate_json(response.content).error
    except ValueError:
        retryable = response.status_code in _NOT_OURS
        return Problem(code=f"http_{response.status_code}", message="the service gave no reason", retryable=retryable)
