"""A replica whose engine is a rule: everything else is the real thing, and it starts in a second."""

import os
from typing import Any

from ray import serve
from serving_helpers import RuleEngine

from gubs.serving.bundle import Bundle
from gubs.serving.deployment import ENGINE, ROUTER, EngineReplica, autoscaling
from gubs.serving.service import FilterService
from gubs.serving.settings import ServingSettings

_Replica: Any = EngineReplica.func_or_class  # type: ignore[attr-defined]


class FakeReplica(_Replica):
    """Answers after a fixed time, eight questions at a time."""

    async def __init__(self, uri: str, settings: dict[str, Any], seconds: float = 0.0, word: str = "cars"):
        self._bundle = Bundle(uri)
        self._engine = RuleEngine(seconds, word=word)
        self._service = FilterService(self._bundle, self._engine, ServingSettings(**settings))

    async def check_health(self) -> None:
        """Healthy, however long an answer takes."""

    async def work(self) -> tuple[int, int, int]:
        """Process, questions in work, questions answered."""
        return os.getpid(), self._engine.running, self._engine.finished

    async def peak(self) -> int:
        """The most questions in work at a time since it was last asked."""
        peak, self._engine.peak = self._engine.peak, 0
        return peak


QUICK = {"upscale_delay_s": 0.5, "downscale_delay_s": 2, "metrics_interval_s": 0.5, "look_back_period_s": 1}


def application(
    uri: str,
    settings: ServingSettings,
    seconds: float = 0.0,
    word: str = "cars",
    replicas: int = 1,
    resources: dict[str, float] | None = None,
) -> Any:
    """Like `build_engine`, with the fake; its number follows the load if the settings allow several."""
    deployment: Any = serve.deployment(FakeReplica)
    elastic = settings.max_replicas > settings.min_replicas
    return deployment.options(
        name=ENGINE,
        **({"autoscaling_config": autoscaling(settings) | QUICK} if elastic else {"num_replicas": replicas}),
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 0, "resources": resources or {}},
        request_router_config=ROUTER,
    ).bind(uri, settings.model_dump(mode="json"), seconds, word)
