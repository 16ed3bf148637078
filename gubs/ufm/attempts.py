"""Ray Train as gubs uses it: what is tried again, and what is not started."""

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2.torch.torch_trainer import TorchTrainer

from gubs.errors import ArtifactError, GubsError, InputError, SettingsError
from gubs.ray_runtime import has_dashboard

_FINAL = (SettingsError, InputError, ArtifactError)
"""Errors of settings and data. Workers that start anew, on whatever node, would meet them again."""


def cause_of(error: BaseException) -> GubsError | None:
    """The error of ours that ended a worker, out of what Ray wraps it in; None if it was not one of ours. Of several
    workers' errors one of settings or data, if there is one: others may follow from it.
    """
    failures = getattr(error, "worker_failures", None) or {}
    wrapped = [(e, getattr(e, "cause", None), e.__cause__) for e in (*failures.values(), error)]
    ours = [inner for errors in wrapped for inner in errors if isinstance(inner, GubsError)]
    return min(ours, key=lambda e: not isinstance(e, _FINAL), default=None)


class RetryLostWorkers(DefaultFailurePolicy):
    """Starts the workers again as often as the settings allow, but not after an error of settings or data."""

    def _is_retryable_error(self, training_failed_error: Any) -> bool:
        if isinstance(cause_of(training_failed_error), _FINAL):
            return False
        return super()._is_retryable_error(training_failed_error)


class RayTrainer(TorchTrainer):
    """`TorchTrainer` with `RetryLostWorkers`."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        config: Any = self.run_config.failure_config  # declared as that of Ray's older trainers
        policy = RetryLostWorkers(config)
        return super()._initialize_and_run_controller(**(parts | {"failure_policy": policy}))

    def _create_default_callbacks(self) -> list[Any]:
        """Without two of Ray's actors where they have nothing to do: the one that hands out shards of data sets, and,
        without a dashboard, the one that frees the place of a dead controller (it asks the dashboard who is dead).
        Their starts take 2 and 4 s of a core.
        """
        needed = {DatasetsCallback: bool(self.datasets), PlacementGroupCleanerCallback: has_dashboard()}
        return [c for c in super()._create_default_callbacks() if needed.get(type(c), True)]
