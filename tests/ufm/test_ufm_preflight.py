"""What a training refuses before anything is made, and what `--force` throws away."""

import shutil

import pytest
from ufm_helpers import changed_copy, small_settings

from gubs.artifacts import Recipe, Run, StageJob, writing
from gubs.config import load_settings
from gubs.errors import ArtifactError, PlatformError, SettingsError
from gubs.jobs import main_job, making
from gubs.stages import Graph, StaleError, Status, make
from gubs.ufm import stage
from gubs.ufm.memory import Machine

JOBS = [main_job, making("grpo"), making("sft_model")]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["ufm.model.size=7b"], SettingsError, "ufm.model.size=7b is not made here"),
        (["ufm.model.path=/nowhere"], SettingsError, "has no config.json"),
        (["ufm.workers.gpu=yes"], PlatformError, "the cluster has 0 GPUs"),
        (["ufm.grpo.trackers=[wandb]"], PlatformError, "pip install wandb"),
    ],
)
def test_a_job_that_cannot_end_well_makes_nothing(tmp_path, ray_local, job, overrides, error, says):
    """Not the data set, and no call that somebody pays for."""
    with pytest.raises(error, match=says):
        job(Run(tmp_path / "run"), load_settings("tiny", overrides), False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("job", JOBS)
def test_what_does_not_fit_the_gpus_makes_nothing(tmp_path, ray_local, monkeypatch, job):
    monkeypatch.setattr(stage, "_gpus", lambda: 1)
    monkeypatch.setattr(stage.memory, "gpu_machine", lambda: Machine(gpu=1e6, gpus=1, host=1e12))
    with pytest.raises(PlatformError, match="DOES NOT FIT"):
        job(Run(tmp_path / "run"), load_settings("tiny"), False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("there", "workers", "wanted", "uses_gpu"),
    [
        (0, 2, "auto", False),
        (2, 2, "auto", True),
        (4, 1, "auto", True),
        (1, 2, "auto", None),
        (0, 1, "yes", None),
        (1, 1, "yes", True),
        (4, 4, "no", False),
    ],
)
def test_workers_get_gpus_all_or_none(monkeypatch, there, workers, wanted, uses_gpu):
    """Half of them on GPUs would wait for the others; silently on CPUs, a paid GPU would idle."""
    monkeypatch.setattr(stage, "_gpus", lambda: there)
    settings = small_settings(f"ufm.workers.count={workers}", f"ufm.workers.gpu={wanted}")
    if uses_gpu is None:
        with pytest.raises(PlatformError, match=rf"count={workers}, but the cluster has {there} GPUs.*gpu=no"):
            stage.use_gpu(settings.ufm.workers)
    else:
        assert stage.use_gpu(settings.ufm.workers) is uses_gpu


@pytest.fixture
def fine_tuned(ufm_run, tmp_path) -> Run:
    """A run with a policy that was fine-tuned from the tiny model."""
    settings = small_settings()
    run = changed_copy(ufm_run, tmp_path / "run", settings)
    graph = Graph(["sft_model"], run, settings)
    recipe = graph.recipe(graph.stages["sft_model"])
    with writing(run, "sft_model", recipe=recipe, settings=settings.model_dump(mode="json")):
        pass
    return run


@pytest.mark.parametrize("override", ["ufm.model.lessons=5", "ufm.model.size=small", "ufm.model.path="])
def test_a_policy_of_another_model_is_not_trained_on(fine_tuned, tiny, tmp_path, override):
    """Settings that name a model of 7 B must not train the tiny one that SFT was given before."""
    assert Graph(["sft_model"], fine_tuned, small_settings()).state("sft_model").status is Status.CURRENT
    if override.endswith("="):
        copied = shutil.copytree(tiny, tmp_path / "q")
        (copied / "model.safetensors").write_bytes(b"other weights")
        override += str(copied)
    with pytest.raises(StaleError, match=r"sft_model is stale: another model. `gubs sft --force` remakes it"):
        make(["grpo"], fine_tuned, small_settings(override, "ufm.grpo.groups=false"))
    assert not fine_tuned.has("grpo")


def partial(run: Run, mark: str, force: bool) -> list[str]:
    """What of an unfinished training is there once it is begun again, and killed once more."""
    settings = small_settings().model_dump(mode="json")
    job = StageJob(run, "grpo", "grpo", Recipe(settings={"mark": mark}), settings, force)
    with pytest.raises(KeyboardInterrupt), stage._training(job) as (_, folder):
        kept = sorted(p.name for p in (folder / "checkpoints").glob("*"))
        (folder / "checkpoints" / "step-000002").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt
    return kept


def test_a_forced_training_that_was_killed_is_resumed_by_the_same_command(tmp_path):
    """It would else begin at step 0 after every kill, and a job that Ray starts again would never end."""
    run = Run(tmp_path / "run")
    assert partial(run, "one", force=True) == []
    assert partial(run, "one", force=True) == ["step-000002"]
    assert partial(run, "one", force=False) == ["step-000002"]
    with pytest.raises(ArtifactError, match="--force to discard it"):
        partial(run, "two", force=False)
    assert partial(run, "two", force=True) == []
