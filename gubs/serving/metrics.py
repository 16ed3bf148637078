"""The ingress's figures: once for Ray's own Prometheus endpoint, once for `/metrics` of this replica."""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import prometheus_client as prometheus
from ray.util import metrics as ray_metrics

from gubs.artifacts import JsonObject
from gubs.serving.schemas import ModelName, Result

_RECENT_S, _STEP_S, _MOST_RECENT = 300, 5, 20_000
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class _Twin:
    """A metric in both registries."""

    def __init__(self, kind: str, name: str, text: str, tags: Sequence[str], registry: prometheus.CollectorRegistry):
        more: dict[str, Any] = {"buckets": _SECONDS} if kind == "Histogram" else {}
        self._local = getattr(prometheus, kind)(name, text, tags, registry=registry, **more)
        bounds: dict[str, Any] = {"boundaries": list(_SECONDS)} if kind == "Histogram" else {}
        self._ray = getattr(ray_metrics, kind)(name, text, tag_keys=tuple(tags), **bounds)
        self._tags = tuple(tags)

    def inc(self, *values: str, by: float = 1.0) -> None:
        (self._local.labels(*values) if values else self._local).inc(by)
        self._ray.inc(by, tags=dict(zip(self._tags, values, strict=True)))

    def observe(self, value: float, *values: str) -> None:
        (self._local.labels(*values) if values else self._local).observe(value)
        self._ray.observe(value, tags=dict(zip(self._tags, values, strict=True)))

    def set(self, value: float, *values: str) -> None:
        (self._local.labels(*values) if values else self._local).set(value)
        self._ray.set(value, tags=dict(zip(self._tags, values, strict=True)))


class Recent:
    """The requests of the last five minutes, for the console."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._requests = clock, deque[tuple[float, float, bool]](maxlen=_MOST_RECENT)

    def add(self, seconds: float, *, ok: bool) -> None:
        """Notes a request that ended now."""
        self._requests.append((self._clock(), seconds, ok))

    def figures(self) -> JsonObject:
        """Requests per second (of the last ten seconds, and in steps of five), latencies in ms, errors."""
        now = self._clock()
        recent = [r for r in self._requests if now - r[0] < _RECENT_S]
        steps = [0] * (_RECENT_S // _STEP_S)
        for at, _, _ in recent:
            steps[-1 - int((now - at) // _STEP_S)] += 1
        seconds = sorted(s for _, s, ok in recent if ok) or [0.0]
        return {
            "per_second": sum(now - at < 2 * _STEP_S for at, _, _ in recent) / (2 * _STEP_S),
            "p50_ms": 1e3 * seconds[len(seconds) // 2],
            "p95_ms": 1e3 * seconds[int(0.95 * (len(seconds) - 1))],
            "errors": sum(not ok for _, _, ok in recent),
            "history": [n / _STEP_S for n in steps],
        }


class Metrics:
    """What the ingress counts."""

    def __init__(self) -> None:
        self.recent = Recent()
        registry = self._registry = prometheus.CollectorRegistry()
        self._requests = _Twin("Counter", "gubs_filter_requests", "Requests", ("code", "mode"), registry)
        self._candidates = _Twin("Counter", "gubs_filter_candidates", "Candidates", ("decision", "option"), registry)
        self._errors = _Twin("Counter", "gubs_filter_errors", "Errors", ("code",), registry)
        self._seconds = _Twin(
            "Histogram", "gubs_filter_seconds", "Seconds of requests and of their parts", ("mode", "phase"), registry
        )
        self._queued = _Twin("Gauge", "gubs_filter_queue_candidates", "Candidates in work", (), registry)
        self._mass = _Twin(
            "Histogram", "gubs_filter_label_mass", "Least probability of all options in a request", (), registry
        )
        self._info = _Twin("Gauge", "gubs_filter_model_info", "1: decides now", ("app", "name", "version"), registry)
        self._models: dict[str, ModelName] = {}
        self._waiting = 0

    def request(self, code: str, mode: str, seconds: float) -> None:
        """Counts a request that ended."""
        self._requests.inc(code, str(mode))
        self._seconds.observe(seconds, str(mode), "total")
        self.recent.add(seconds, ok=code == "200")

    def phases(self, mode: str, seconds: Mapping[str, float]) -> None:
        """Counts where the time of a part of a request went."""
        for phase, value in seconds.items():
            self._seconds.observe(value, str(mode), phase)

    def model(self, app: str, model: ModelName) -> None:
        """Notes which filter decided in an application."""
        before = self._models.get(app)
        if before != model:
            self.forget([app])
            self._models[app] = model
            self._info.set(1, app, model.name, model.version)

    def forget(self, apps: Collection[str]) -> None:
        """Applications that decide nothing any more."""
        for app in set(apps) & self._models.keys():
            model = self._models.pop(app)
            self._info.set(0, app, model.name, model.version)

    def error(self, code: str) -> None:
        """Counts an error of a request or a candidate."""
        self._errors.inc(code)

    def results(self, results: Sequence[Result]) -> None:
        """Counts the decisions of a request."""
        # an increment takes longer than the rest of a response: one per kind of result
        for decision, count in Counter((str(r.decision), str(r.option or "none")) for r in results).items():
            self._candidates.inc(*decision, by=count)
        for result in results:
            if result.error:
                self.error(result.error.code)
        if mass := [r.label_mass for r in results if r.label_mass is not None]:
            self._mass.observe(min(mass))

    def status(self) -> JsonObject:
        """This replica's recent figures as JSON."""
        return {**self.recent.figures(), "waiting": self._waiting}

    @contextmanager
    def waiting(self, candidates: int) -> Iterator[None]:
        """Counts candidates as in work inside the context."""
        self._waiting += candidates
        self._queued.set(self._waiting)
        try:
            yield
        finally:
            self._waiting -= candidates
            self._queued.set(self._waiting)

    def text(self) -> bytes:
        """This replica's figures in Prometheus' text format."""
        return prometheus.generate_latest(self._registry)
