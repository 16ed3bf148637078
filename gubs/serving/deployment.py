"""The filter on Ray Serve: engine replicas per version, and one ingress in front of all versions.

Each version of a filter is an application of its own without a route; the ingress finds it by name. What share of the
requests a version gets stands in the ingress's `user_config`, so that a roll-over changes a number and restarts
nothing. The only module that imports Serve.
"""

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.context import _set_request_context
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from starlette.exceptions import HTTPException

from gubs.artifacts import JsonObject
from gubs.serving.bundle import Bundle
from gubs.serving.engine import EngineDiedError, FilterEngine
from gubs.serving.filter import Decision, Mode
from gubs.serving.keys import ApiKey, KeyFile
from gubs.serving.metrics import Metrics
from gubs.serving.ready import Readiness
from gubs.serving.responses import NDJSON, Bugs, Lines, RefusedError, as_ready, log_bug, wants_lines
from gubs.serving.schemas import (
    Candidate,
    ErrorBody,
    ExplainRequest,
    ExplainResponse,
    FilterLine,
    FilterRequest,
    FilterResponse,
    FilterSummary,
    Group,
    ModelInfo,
    ModelName,
    Result,
    Usage,
    User,
    UserRef,
)
from gubs.serving.service import Decided, FilterService, RequestError, merged, pick, total
from gubs.serving.settings import ServingSettings
from gubs.serving.shadow import ShadowLog
from gubs.ufm.inputs import Prompt

T = TypeVar("T", FilterRequest, ExplainRequest)
R = TypeVar("R")
ENGINE, INGRESS = "engine", "ingress"
"""Names of the deployments; the ingress's application has the same name."""
ROUTER = {
    "request_router_class": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter",
    "initial_backoff_s": 0.005,
    "max_backoff_s": 0.05,
}
"""Sends a user to the same replica: its prefix cache has the user's profile and history. A full replica is asked again
after milliseconds; with the router's own pauses, it would idle for half a second.
"""
_CANARY_S = 30.0
"""Within so many seconds an engine has to answer some question, perhaps behind all others that it has."""
_QUIET_S = 10.0
"""An engine that answered a question within so many seconds is healthy without being asked."""
_STATUS = {
    "unknown_user": 404,
    "unknown_group": 404,
    "unknown_task": 400,
    "mode_unavailable": 409,
    "pictures": 422,
    "overloaded": 429,
    "unavailable": 503,
    "timeout": 504,
    "internal": 500,
}
_ASSETS = {"html": "text/html; charset=utf-8", "js": "text/javascript", "css": "text/css"}
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 504)
}


def _answering(method: Callable[..., Awaitable[R]]) -> Callable[..., Awaitable[R | RequestError]]:
    """A method of a replica whose errors are returned: Ray would add a trace to a raised one, and Serve would log its
    message, which may be about a user. If the engine is dead, the replica ends at once: Serve replaces it, and the
    ingress asks another.
    """

    @functools.wraps(method)
    async def answered(*arguments: Any) -> R | RequestError:
        try:
            return await method(*arguments)
        except RequestError as e:
            return e
        except EngineDiedError:
            os._exit(1)
        except Exception as e:  # noqa: BLE001 - whatever it is
            log_bug(e)
            return RequestError("internal", "the service failed")

    return answered


@serve.deployment(name=ENGINE)
class EngineReplica:
    """One engine with one filter."""

    async def __init__(self, uri: str, settings: JsonObject):  # type: ignore[misc]  # Serve awaits it
        """Loads the filter, and answers one question before it counts as ready."""
        self._bundle = await asyncio.to_thread(Bundle, uri)
        await asyncio.to_thread(self._bundle.load)
        serving = ServingSettings(**settings)
        self._engine = FilterEngine(self._bundle, serving)
        self._service = FilterService(self._bundle, self._engine, serving)
        await self._ask_canary()

    @_answering
    async def decide(self, request: FilterRequest, mode: Mode, salt: str = "") -> Decided:
        """See `FilterService.decide`."""
        return await self._service.decide(request, mode, salt)

    @_answering
    async def explain(self, request: ExplainRequest, salt: str = "") -> dict[str, object]:
        """See `FilterService.explain`."""
        return await self._service.explain(request, salt)

    @_answering
    async def user(self, user_id: str) -> User:
        """See `FilterService.user`."""
        return self._service.user(user_id)

    def groups(self) -> list[Group]:
        """See `FilterService.groups`."""
        return self._service.groups()

    def about(self) -> dict[str, object]:
        """See `FilterService.about`."""
        return self._service.about() | {"running": self._engine.running}

    def examples(self, count: int) -> dict[str, list[str]]:
        """See `FilterService.examples`."""
        return self._service.examples(count)

    async def ready(self) -> None:
        """Returns once it is known that the engine answers; see `check_health`."""
        await self.check_health()

    async def check_health(self) -> None:
        """Looks whether the engine answers: a busy one does so by itself, only a quiet one is asked.

        Raises:
            TimeoutError: for `_CANARY_S` it answered nothing at all.
        """
        try:
            await self._engine.check()
            if self._engine.quiet_s >= _QUIET_S:
                await self._ask_canary()
        except EngineDiedError:
            os._exit(1)
        except TimeoutError:
            if self._engine.quiet_s >= _CANARY_S:  # else it answered others, before whom the question has to wait
                raise

    async def _ask_canary(self) -> None:
        """Asks the engine for one token."""
        async with asyncio.timeout(_CANARY_S):
            await self._engine.ask(self._bundle.config.tasks[0], Mode.SCORE, [Prompt("ok")])

    def __del__(self) -> None:
        """Ends the engine's process and the decoders."""
        with contextlib.suppress(AttributeError):
            self._engine.close()
            self._service.close()


def _named(problems: Sequence[Mapping[str, Any]]) -> str:
    """The first problems of a request: which field, and what is wrong, never its value."""
    return "; ".join(f"{'.'.join(map(str, p['loc']))[:100]}: {p['msg'][:100]}" for p in problems[:3])


def _schema(model: type[BaseModel]) -> Any:
    """A model's JSON schema without references, which would point to nowhere in the OpenAPI description."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(n) for n in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inlined(parts[node["$ref"].rpartition("/")[2]])
        return {name: inlined(inner) for name, inner in node.items()}

    return inlined(schema)


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a request's body, which the route reads itself, up to a limit."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _schema(model)}}}}


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": f"All decisions; with `Accept: {NDJSON}` one per line, as soon as each is there",
        "content": {NDJSON: {"schema": _schema(FilterLine)}},
    }
}


app = FastAPI(title="gubs filter", version="1", docs_url=None, redoc_url=None)
app.add_middleware(Bugs)


@app.exception_handler(RefusedError)
async def _refused(_: Request, error: RefusedError) -> Response:
    return error.response()


@app.exception_handler(RequestValidationError)
async def _not_valid(_: Request, error: RequestValidationError) -> Response:
    """A parameter of the URL. FastAPI's own answer would repeat its value."""
    return RefusedError(422, "invalid_request", _named(error.errors())).response()


@app.exception_handler(HTTPException)
async def _not_served(_: Request, error: HTTPException) -> Response:
    """No such page, or not with this method."""
    code, text = ("not_found", "there is no such page") if error.status_code == 404 else ("refused", "not served here")
    return RefusedError(error.status_code, code, text).response()


# Serve pickles the app's routes when it decorates the ingress: what they call must be defined before it.


def _asset(name: str) -> Response:
    """A file of the console, which may load nothing from elsewhere."""
    kind = _ASSETS.get(name.rpartition(".")[2])
    file = resources.files("gubs.serving.console") / name
    if kind is None or "/" in name or not file.is_file():
        raise RefusedError(404, "not_found", "there is no such page")
    headers = {"Content-Security-Policy": _CSP, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return Response(file.read_bytes(), media_type=kind, headers=headers)


async def _cancelling(response: DeploymentResponse[R]) -> R:
    """The result of a call; if the wait for it is cancelled, so is the call."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@dataclass(frozen=True)
class _Part:
    """Decisions about some of a request's candidates."""

    app: str
    """Application of the version that decided; empty: none acts, so everything is kept."""
    model: ModelName
    threshold: float
    results: list[Result]
    usage: Usage
    seconds: Mapping[str, float]
    """By phase: `queue` (until a replica has it, and the way there), and those of `Decided`."""


def _all_kept(asked: FilterRequest) -> _Part:
    results = [Result(index=i, id=c.id, decision=Decision.KEEP) for i, c in enumerate(asked.candidates)]
    return _Part("", ModelName(name="none", version="none"), 1.0, results, Usage(), {})


def _summary(asked: FilterRequest, mode: Mode, parts: Sequence[_Part], began: float) -> JsonObject:
    """The fields of a `FilterSummary`. Parts are decided side by side: the longest counts."""
    phases = {phase: max(p.seconds[phase] for p in parts) for phase in parts[0].seconds}
    return {
        "request_id": asked.request_id,
        "model": parts[0].model,
        "mode": mode,
        "threshold": parts[0].threshold,
        "usage": total([p.usage for p in parts]),
        "timing_ms": _timing(began, phases),
    }


def _timing(began: float, phases: Mapping[str, float] | None = None) -> dict[str, float]:
    seconds = {"total": time.perf_counter() - began, **(phases or {})}
    return {phase: round(value * 1e3, 1) for phase, value in seconds.items()}


@dataclass
class _Count:
    """A request that is being counted."""

    mode: str = "none"
    """Its mode, once it is read."""


def _user_key(asked: FilterRequest | ExplainRequest) -> str:
    """The same for every request about a user."""
    return asked.user.id or asked.user.model_dump_json()


def _salt(key: ApiKey | None) -> str:
    return key.salt if key else ""


def _point(key: str) -> float:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _names_this_machine(host: str) -> bool:
    """Whether a Host header does. A page from elsewhere, whose name leads here, has its own name in the header."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@serve.deployment(name=INGRESS)
@serve.ingress(app)
class Ingress:
    """Checks requests, spreads them over versions and replicas, and merges the answers."""

    def __init__(self, settings: JsonObject, versions: dict[str, float] | None = None):
        """Reads the keys.

        Args:
            settings: `ServingSettings` as JSON.
            versions: application of each version -> share of the requests, until `reconfigure` is called.
        """
        self._settings = ServingSettings(**settings)
        self._keys = None if self._settings.insecure else self._key_file()
        self._metrics = Metrics()
        self._log = ShadowLog(self._settings.log_dir, self._settings.log_every_s) if self._settings.log_dir else None
        self._handles: dict[str, DeploymentHandle] = {}
        self._ready = Readiness(self._ask_whether_ready)
        self._background: set[asyncio.Task[None]] = set()
        self.reconfigure({"versions": versions or {}})

    def reconfigure(self, config: JsonObject) -> None:
        """New weights: {"versions": {application: weight}, "shadow": [applications]}."""
        self._weights: Mapping[str, float] = dict(config.get("versions") or {})
        self._shadow: list[str] = list(config.get("shadow") or [])
        gone = self._handles.keys() - {*self._weights, *self._shadow}
        self._handles = {name: handle for name, handle in self._handles.items() if name not in gone}
        self._metrics.forget(gone)
        self._ready.forget()

    def __del__(self) -> None:
        """Writes what is left of the log. Serve calls it before it ends a replica in order, when no request is left.
        Versions in shadow that are still deciding then are not waited for.
        """
        if log := getattr(self, "_log", None):  # there is none if the settings are wrong
            log.flush()

    @app.post(
        "/v1/filter", response_model=FilterResponse, responses=_ANSWERS | _ERRORS, openapi_extra=_body(FilterRequest)
    )
    async def filter(self, request: Request) -> Response:
        """Decides which candidates the user would skip. With `Accept: application/x-ndjson` each decision comes as soon
        as it is there, a line each; the last line has the rest, or the error because of which no more come.
        """
        began = time.perf_counter()
        if wants_lines(request):
            return await Lines(self._filtered_lines(request, began)).begun()
        with self._counted() as count:
            asked, mode, salt = await self._asked(request, count)
            parts = [part async for part in self._decided(asked, mode, salt)]
            results = sorted((r for part in parts for r in part.results), key=lambda r: r.index)
            self._note(asked, mode, parts[0], results)
            answer = FilterResponse(results=results, **_summary(asked, mode, parts, began))
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.post("/v1/explain", response_model=ExplainResponse, responses=_ERRORS, openapi_extra=_body(ExplainRequest))
    async def explain(self, request: Request) -> ExplainResponse:
        """Answers with the user's own, a similar user's, a group's and no profile, side by side."""
        began = time.perf_counter()
        with self._counted() as count:
            key = self._authorised(request)
            asked = await self._read(request, ExplainRequest)
            self._check_size(asked.user, [asked.candidate])
            count.mode = "explain"
            self._admit(key, 4)
            version = self._pick(_user_key(asked))
            async with self._deadline(asked.timeout_ms):
                fields = await self._call(version, "explain", asked, _salt(key), session=_user_key(asked))
        return ExplainResponse(request_id=asked.request_id, timing_ms=_timing(began), **fields)

    @app.get("/v1/groups", response_model=list[Group], responses=_ERRORS)
    async def groups(self, request: Request) -> list[Group]:
        """The groups of users."""
        self._looking(request)
        async with self._deadline(None):
            return await self._call(self._pick("groups"), "groups")

    @app.get("/v1/users/{user_id:path}", response_model=User, responses=_ERRORS)
    async def user(self, request: Request, user_id: str) -> User:
        """A user that the filter knows."""
        self._looking(request)
        async with self._deadline(None):
            return await self._call(self._pick(user_id), "user", user_id, session=user_id)

    @app.get("/v1/models", response_model=list[ModelInfo], responses=_ERRORS)
    async def models(self, request: Request) -> list[ModelInfo]:
        """The deployed versions, with their shares of the requests."""
        self._looking(request)
        return [await self._info(version) for version in dict.fromkeys([*self._weights, *self._shadow])]

    @app.get("/v1/examples", responses=_ERRORS)
    async def examples(self, request: Request, count: int = 50) -> dict[str, list[str]]:
        """Some ids of users and videos that the filter knows."""
        self._looking(request)
        async with self._deadline(None):
            return await self._call(self._pick("examples"), "examples", max(1, min(count, 500)))

    @app.get("/v1/status", responses=_ERRORS)
    async def status(self, request: Request) -> JsonObject:
        """Recent figures of this ingress replica, and the engine replicas of each version."""
        self._looking(request)
        async with self._deadline(None):
            applications = (await asyncio.to_thread(serve.status)).applications
        replicas = {
            name: sum(n for state, n in application.deployments[ENGINE].replica_states.items() if state == "RUNNING")
            for name, application in applications.items()
            if ENGINE in application.deployments
        }
        return {**self._metrics.status(), "replicas": replicas}

    @app.get("/", include_in_schema=False)
    async def console(self) -> Response:
        """The console."""
        return _asset("index.html")

    @app.get("/console/{name}", include_in_schema=False)
    async def asset(self, name: str) -> Response:
        """A file of the console."""
        return _asset(name)

    @app.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """The ingress is up."""
        return {"status": "ok"}

    @app.get("/readyz", responses=_ERRORS)
    async def readyz(self) -> dict[str, str]:
        """A version gets requests, and its engine answers, or is only busy."""
        self._pick("ready")
        await self._ready.check()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics(self) -> Response:
        """This replica's figures for Prometheus; Ray's own endpoint has those of all."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _filtered_lines(self, request: Request, began: float) -> AsyncGenerator[FilterLine]:
        """The answer to a request in lines."""
        with self._counted() as count:
            asked, mode, salt = await self._asked(request, count)
            parts = []
            async with contextlib.aclosing(self._decided(asked, mode, salt)) as decided:
                async for part in decided:
                    parts.append(part)
                    self._note(asked, mode, part, part.results)
                    for result in part.results:
                        yield FilterLine(result=result)
            yield FilterLine(done=FilterSummary(**_summary(asked, mode, parts, began)))

    async def _asked(self, request: Request, count: _Count) -> tuple[FilterRequest, Mode, str]:
        """What is asked, how, and whose cache the engines may use.

        Raises:
            RefusedError: the request is not admitted.
        """
        key = self._authorised(request)
        asked = await self._read(request, FilterRequest)
        self._check_size(asked.user, asked.candidates)
        count.mode = mode = asked.mode or Mode(self._settings.mode)
        self._admit(key, len(asked.candidates))
        return asked, mode, _salt(key)

    async def _decided(self, asked: FilterRequest, mode: Mode, salt: str) -> AsyncGenerator[_Part]:
        """The decisions about a request's candidates, chunk by chunk as they are ready.

        Raises:
            RefusedError: a chunk cannot be answered, or not in time.
        """
        session, size = _user_key(asked), self._settings.chunk
        version = self._pick(session) if any(self._weights.values()) else ""
        for other in self._shadow:
            if other != version:
                self._later(self._shadowed(other, asked, mode, salt))
        if not version:
            yield _all_kept(asked)
            return

        async def chunk(start: int) -> _Part:
            some = asked.model_copy(update={"candidates": asked.candidates[start : start + size]})
            return await self._part(version, some, mode, salt, start)

        with self._metrics.waiting(len(asked.candidates)):
            async with self._deadline(asked.timeout_ms):
                calls = as_ready(chunk(start) for start in range(0, len(asked.candidates), size))
                async with contextlib.aclosing(calls) as chunks:
                    async for part in chunks:
                        self._metrics.model(version, part.model)
                        self._metrics.phases(mode, part.seconds)
                        yield part

    async def _part(self, version: str, some: FilterRequest, mode: Mode, salt: str, start: int) -> _Part:
        """A version's decisions about some of a request's candidates, which begin at `start`."""
        began = time.perf_counter()
        it: Decided = await self._call(version, "decide", some, mode, salt, session=_user_key(some))
        self._ready.answered()
        queue = max(0.0, time.perf_counter() - began - sum(it.seconds.values()))
        numbered = [r.model_copy(update={"index": start + r.index}) for r in it.results] if start else it.results
        return _Part(version, it.model, it.threshold, numbered, it.usage, {"queue": queue, **it.seconds})

    def _note(self, asked: FilterRequest, mode: Mode, part: _Part, results: Sequence[Result]) -> None:
        """Counts and logs decisions that are about to be answered."""
        if not part.app:
            return
        self._metrics.results(results)
        if self._log:
            self._log.add(part.app, part.model.version, asked, mode, part.threshold, results, acted=True)

    async def _shadowed(self, version: str, asked: FilterRequest, mode: Mode, salt: str) -> None:
        """Asks a version whose decisions only go to the log."""
        size = self._settings.chunk
        chunks: list[Decided] = []
        async with self._deadline(None):
            for i in range(0, len(asked.candidates), size):
                part = asked.model_copy(update={"candidates": asked.candidates[i : i + size]})
                chunks.append(await self._call(version, "decide", part, mode, salt, session=_user_key(asked)))
        if self._log:
            first = chunks[0]
            self._log.add(version, first.model.version, asked, mode, first.threshold, merged(chunks), acted=False)

    async def _ask_whether_ready(self) -> None:
        async with self._deadline(5000):
            await self._call(self._pick("ready"), "ready")

    async def _call(self, version: str, method: str, *arguments: Any, session: str = "") -> Any:
        """One call of a version; asked of another replica once more if the first one dies.

        Raises:
            RefusedError: it cannot be answered.
        """
        for attempt in (1, 2):
            _set_request_context(_internal_request_id=uuid.uuid4().hex)  # the router loses calls that share an id
            handle = self._handle(version)
            if session:
                handle = handle.options(session_id=hashlib.sha256(session.encode()).hexdigest()[:16])
            try:
                answer = await _cancelling(getattr(handle, method).remote(*arguments))
            except BackPressureError:
                raise RefusedError(
                    429, "overloaded", "too many requests are waiting", retryable=True, retry_after=1
                ) from None
            except (RayError, RayServeException) as e:  # the replica is lost, or its node, or what it sent
                if isinstance(e, RayTaskError) and not isinstance(e.cause, (RayError, RayServeException)):
                    raise  # it lives, and has a bug
                if attempt == 2 or isinstance(e, RequestCancelledError):
                    raise RefusedError(503, "unavailable", "no engine answers", retryable=True, retry_after=5) from None
            else:
                if isinstance(answer, RequestError):
                    raise RefusedError(_STATUS.get(answer.code, 400), answer.code, str(answer))
                return answer
        raise AssertionError

    def _handle(self, version: str) -> DeploymentHandle:
        if version not in self._handles:
            try:
                self._handles[version] = serve.get_app_handle(version)
            except RayServeException:
                raise RefusedError(
                    503, "unavailable", "this version is not deployed", retryable=True, retry_after=5
                ) from None
        return self._handles[version]

    @contextlib.asynccontextmanager
    async def _deadline(self, timeout_ms: int | None) -> AsyncIterator[None]:
        """Cancels what is inside when a request's time is over.

        Raises:
            RefusedError: it was.
        """
        seconds = min(self._settings.timeout_s, (timeout_ms or 10**9) / 1e3)
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise RefusedError(504, "timeout", f"no answer within {seconds:g} s", retryable=True) from None

    @contextlib.contextmanager
    def _counted(self) -> Iterator[_Count]:
        """Counts a request by its outcome; 499: the client left before the answer."""
        began, count, code = time.perf_counter(), _Count(), "500"
        try:
            yield count
            code = "200"
        except RefusedError as e:
            code = str(e.status)
            self._metrics.error(e.problem.code)
            raise
        except asyncio.CancelledError:
            code = "499"
            raise
        except Exception:
            self._metrics.error("internal")
            raise
        finally:
            self._metrics.request(code, count.mode, time.perf_counter() - began)

    def _authorised(self, request: Request) -> ApiKey | None:
        """The key of a request; None in insecure mode, which answers on its own machine only. Every route calls it
        itself, whatever host it was asked by.
        """
        if self._keys is None:
            near = request.client and ipaddress.ip_address(request.client.host).is_loopback
            if not (near and _names_this_machine(request.headers.get("host", ""))):
                raise RefusedError(403, "forbidden", "this service has no keys, so it answers its own machine only")
            return None
        key = self._keys.find(request.headers.get("authorization"))
        if key is None:
            raise RefusedError(401, "unauthorized", "send a valid key: Authorization: Bearer KEY")
        return key

    def _key_file(self) -> KeyFile:
        return KeyFile(self._settings.keys_file, replicas=self._settings.ingress_replicas)

    def _looking(self, request: Request) -> None:
        """Admits a request without candidates. It counts as one: each asks a replica, or the controller."""
        self._admit(self._authorised(request), 1)

    def _admit(self, key: ApiKey | None, candidates: int) -> None:
        if key and self._keys and (wait := self._keys.wait(key, candidates)):
            raise RefusedError(429, "rate_limited", "this key's rate is used up", retryable=True, retry_after=wait)

    async def _read(self, request: Request, model: type[T]) -> T:
        """The request's body, read up to the limit and checked; it has an id from now on. Errors name the field, never
        the value.
        """
        limit = int(self._settings.limits.body_mb * 2**20)
        body = bytearray()
        async for block in request.stream():
            body += block
            if len(body) > limit:
                raise RefusedError(413, "too_large", f"the body is larger than {limit:,} bytes")
        try:
            asked = model.model_validate_json(bytes(body))
        except ValidationError as e:
            problems = e.errors(include_input=False, include_url=False, include_context=False)
            text = _named([dict(p) for p in problems])
            raise RefusedError(422, "invalid_request", text or "the body is no valid request") from None
        return asked.model_copy(update={"request_id": asked.request_id or uuid.uuid4().hex})

    def _check_size(self, user: UserRef, candidates: Sequence[Candidate]) -> None:
        """Refuses what is larger than the service's own limits; those of the API are in `schemas`."""
        limits = self._settings.limits
        sizes = {
            "candidates": (len(candidates), limits.candidates),
            "user.history": (len(user.history), limits.history),
            "candidates.frames": (max(len(c.frames) for c in candidates), limits.frames),
        }
        for name, (size, limit) in sizes.items():
            if size > limit:
                raise RefusedError(422, "invalid_request", f"{name}: {size}, and this service takes at most {limit}")

    def _pick(self, key: str) -> str:
        try:
            return pick(self._weights, _point(key))
        except ValueError:
            raise RefusedError(503, "unavailable", "no version is active", retryable=True, retry_after=5) from None

    async def _info(self, version: str) -> ModelInfo:
        async with self._deadline(None):
            about = await self._call(version, "about")
        return ModelInfo(app=version, weight=self._weights.get(version, 0.0), shadow=version in self._shadow, **about)

    def _later(self, work: Coroutine[None, None, None]) -> None:
        """Runs in the background; at most as much as a request's worth per ingress."""
        if len(self._background) >= self._settings.max_queued:
            self._metrics.error("shadow_dropped")
            work.close()
            return

        async def quietly() -> None:
            try:
                await work
            except RefusedError as e:
                self._metrics.error(f"shadow_{e.problem.code}")

        task = asyncio.get_running_loop().create_task(quietly())
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def autoscaling(settings: ServingSettings) -> JsonObject:
    """How the number of engine replicas follows the load."""
    return {
        "min_replicas": settings.min_replicas,
        "max_replicas": max(settings.min_replicas, settings.max_replicas),
        "target_ongoing_requests": settings.ongoing,
        "upscale_delay_s": 5,
        "downscale_delay_s": 120,
    }


def build_engine(args: JsonObject) -> serve.Application:
    """A version's application, for `serve run` and config files: `uri` of the filter, `settings`, `gpus`."""
    settings = ServingSettings(**args.get("settings", {}))
    # Unless OMP_NUM_THREADS is set, Ray gives a replica as many OpenMP threads as CPUs, and its engine inherits that.
    resources = {"num_cpus": settings.engine_cpus} | ({"num_gpus": 1} if args.get("gpus") else {})
    options: dict[str, Any] = {
        "autoscaling_config": autoscaling(settings),
        "max_ongoing_requests": settings.max_ongoing,
        "max_queued_requests": settings.max_queued,
        "health_check_period_s": 10,
        "health_check_timeout_s": 45,
        "graceful_shutdown_timeout_s": settings.timeout_s,
        "ray_actor_options": resources,
        "request_router_config": ROUTER,
    }
    deployment: Any = EngineReplica
    return deployment.options(**options).bind(args["uri"], settings.model_dump(mode="json"))


def build_ingress(args: JsonObject) -> serve.Application:
    """The ingress's application: `settings`, and `versions` until `user_config` says otherwise."""
    settings = ServingSettings(**args.get("settings", {}))
    options: dict[str, Any] = {
        "num_replicas": settings.ingress_replicas,
        "max_ongoing_requests": 10_000,
        "graceful_shutdown_timeout_s": settings.timeout_s + 10,
        "ray_actor_options": {"num_cpus": 0},
    }
    deployment: Any = Ingress
    return deployment.options(**options).bind(settings.model_dump(mode="json"), args.get("versions"))
