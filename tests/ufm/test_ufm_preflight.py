"""What a training refuses before anything is made, and what `--force` throws away."""

from pathlib import Path

import pytest
from ufm_helpers import small_settings

from gubs import pipeline
from gubs.artifacts import Run, writing
from gubs.config import load_settings
from gubs.errors import ArtifactError, PlatformError, SettingsError
from gubs.ufm import stage
from gubs.ufm.memory import Machine

JOBS = [pipeline.main_job, pipeline.demo, pipeline.sft_job]


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["ufm.model.size=7b"], SettingsError, "ufm.model.size=7b is not made here"),
        (["ufm.model.path=/nowhere"], SettingsError, "it has no config.json"),
        (["ufm.workers.gpu=yes"], PlatformError, "the cluster has 0 GPUs"),
        (["ufm.grpo.trackers=[wandb]"], PlatformError, "pip install wandb"),
    ],
)
def test_a_job_that_cannot_end_well_makes_nothing(tmp_path, ray_local, job, overrides, error, says):
    """Not the data set, and no call that somebody pays for."""
    with pytest.raises(error, match=says):
        job(Run(tmp_path / "run"), load_settings("tiny", overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("job", JOBS)
def test_what_does_not_fit_the_gpus_makes_nothing(tmp_path, ray_local, monkeypatch, job):
    monkeypatch.setattr(stage, "_gpus", lambda: 1)
    monkeypatch.setattr(stage.memory, "gpu_machine", lambda: Machine(gpu=1e6, gpus=1, host=1e12))
    with pytest.raises(PlatformError, match="DOES NOT FIT"):
        job(Run(tmp_path / "run"), load_settings("tiny"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("there", "workers", "wanted", "found"),
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
def test_workers_get_gpus_all_or_none(monkeypatch, there, workers, wanted, found):
    """Half of them on GPUs would wait for the others; silently on CPUs, a paid GPU would idle."""
    monkeypatch.setattr(stage, "_gpus", lambda: there)
    settings = small_settings(f"ufm.workers.count={workers}", f"ufm.workers.gpu={wanted}")
    if found is None:
        with pytest.raises(PlatformError, match=rf"count={workers}, but the cluster has {there} GPUs.*gpu=no"):
            stage.use_gpu(settings)
    else:
        assert stage.use_gpu(settings) is found


@pytest.mark.parametrize("override", ["ufm.model.lessons=5", "ufm.model.size=small", "ufm.model.path=/models/x"])
def test_a_policy_of_another_model_is_not_trained_on(tmp_path, override):
    """Settings that name a model of 7 B must not train the tiny one that SFT was given before."""
    run = Run(tmp_path / "run")
    with writing(run, "sft_model", fingerprint="x", settings=small_settings(), inputs={}):
        pass
    with pytest.raises(ArtifactError, match=rf"fine-tuned from ufm.model.size=tiny .*the settings name .*{override}"):
        stage._start(run, small_settings(override))
    assert stage._start(run, small_settings())[0] == Path(run.path("sft_model", "policy"))


def partial(run: Run, mark: str, force: bool) -> list[str]:
    """What of an unfinished training is there once it is begun again, and killed once more."""
    with (
        pytest.raises(KeyboardInterrupt),
        stage._training(run, "grpo", mark, small_settings(), {}, force) as (_, folder),
    ):
        found = sorted(p.name for p in (folder / "checkpoints").glob("*"))
        (folder / "checkpoints" / "step-000002").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt
    return found


def test_a_forced_training_that_was_killed_goes_on_by_the_same_command(tmp_path):
    """It would else begin at step 0 after every kill, and a job that Ray starts again would never end."""
    run = Run(tmp_path / "run")
    assert partial(run, "one", force=True) == []
    assert partial(run, "one", force=True) == ["step-000002"]
    assert partial(run, "one", force=False) == ["step-000002"]
    with pytest.raises(ArtifactError, match="--force to throw it away"):
        partial(run, "two", force=False)
    assert partial(run, "two", force=True) == []
