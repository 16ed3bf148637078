"""What the engine of a filter is started with: a share of the GPU of its own, and memory for the clips of requests."""

from types import SimpleNamespace

from gubs.serving.engine import engine_shape
from gubs.serving.settings import LimitSettings, ServingSettings
from gubs.ufm.rollout import engine_arguments
from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
from gubs.video.decoded import DecodeOptions


def bundle(frames: DecodeOptions | None) -> SimpleNamespace:
    config = SimpleNamespace(
        model=ModelSettings(),
        inputs=InputSettings(),
        rollout=RolloutSettings(gpu_memory=0.35),
        frames=frames,
        pictures=frames is not None,
    )
    return SimpleNamespace(config=config, local_policy=lambda: "policy")


def test_a_replica_does_not_keep_memory_free_for_a_trainer():
    """With the share of the training's rollouts most of the GPU would lie idle, and the engine never sleeps."""
    arguments = engine_arguments(engine_shape(bundle(None), ServingSettings()), cpu=False)
    assert (arguments["gpu_memory_utilization"], arguments["enable_sleep_mode"]) == (0.9, False)
    arguments = engine_arguments(engine_shape(bundle(None), ServingSettings(gpu_memory=0.5)), cpu=False)
    assert arguments["gpu_memory_utilization"] == 0.5


def test_requests_may_bring_more_frames_than_are_stored():
    settings = ServingSettings(limits=LimitSettings(frames=16))
    for stored, most in ((8, 16), (32, 32)):
        shape = engine_shape(bundle(DecodeOptions(count=stored)), settings)
        assert engine_arguments(shape, cpu=False)["limit_mm_per_prompt"]["video"]["num_frames"] == most
    assert engine_shape(bundle(None), settings).largest is None
