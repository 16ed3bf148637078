"""Which failures of a train worker are tried again: that of a lost one, not that of its data."""

import os
import sys
import time
import uuid
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.train import ScalingConfig
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback, BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig, RunConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from gubs.errors import ArtifactError, InputError, PlatformError, SettingsError
from gubs.ufm import attempts
from gubs.ufm.attempts import RayTrainer, RetryLostWorkers, cause_of
from gubs.ufm.checkpoint import SharedError


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (SettingsError("a"), False),
        (InputError("a"), False),
        (ArtifactError("a"), False),
        (SharedError("a"), False),
        (PlatformError("no engine answers"), True),
        (RuntimeError("actor died"), True),
    ],
)
def test_only_what_may_go_better_next_time_is_tried_again(error, again):
    policy = RetryLostWorkers(FailureConfig(max_failures=2))
    lost = {0: PlatformError("no answer from the other worker"), 1: error}
    decisions = [policy.make_decision(WorkerGroupError("failed", lost)) for _ in range(3)]
    retry, end = FailureDecision.RETRY, FailureDecision.RAISE
    assert decisions == ([retry, retry, end] if again else [end, end, end])


def _loop(config):
    """Its first attempt dies as with its node, the second meets bad data."""
    begun = Path(config["folder"])
    (begun / uuid.uuid4().hex).touch()
    if len(list(begun.iterdir())) == 1:
        time.sleep(2)  # Ray Train takes a worker that is gone before it was seen to work for a fault of its own
        os._exit(1)
    raise ArtifactError("v7.npy: the frames are missing; run `gubs frames --force`")


@pytest.mark.slow
def test_a_training_outlives_its_worker_and_ends_at_once_on_bad_data(ray_local, tmp_path):
    """As the workers themselves tell it."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    begun = tmp_path / "begun"
    begun.mkdir()
    trainer = RayTrainer(
        _loop,
        train_loop_config={"folder": str(begun)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=str(tmp_path / "ray"), failure_config=FailureConfig(max_failures=3)),
    )
    with pytest.raises(WorkerGroupError) as raised:
        trainer.fit()
    cause = cause_of(raised.value)
    assert isinstance(cause, ArtifactError)
    assert str(cause).startswith("v7.npy")
    assert len(list(begun.iterdir())) == 2


@pytest.mark.parametrize("dashboard", ["", "127.0.0.1:8265"])
@pytest.mark.parametrize("datasets", [{}, {"train": None}], ids=["none", "one"])
def test_actors_with_nothing_to_do_are_left_out(tmp_path, monkeypatch, dashboard, datasets):
    monkeypatch.setattr(attempts, "has_dashboard", lambda: bool(dashboard))
    trainer = RayTrainer(_loop, run_config=RunConfig(storage_path=str(tmp_path)), datasets=datasets)
    kinds = {type(c) for c in trainer._create_default_callbacks()}
    assert (PlacementGroupCleanerCallback in kinds) == bool(dashboard)
    assert (DatasetsCallback in kinds) == bool(datasets)
    assert kinds > {AcceleratorSetupCallback, BackendSetupCallback}, "all others stay"
