"""SFT under Ray Train: it resumes from a checkpoint, and two workers share its examples."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from drive_grpo import resume_settings
from ufm_helpers import changed_copy

from gubs.artifacts import fingerprint
from gubs.stages import make_stage
from gubs.ufm.stage import _resume_recipe

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.slow
def test_sft_resumes_from_a_checkpoint_with_the_batches_that_are_left(ready, tmp_path):
    """The stream of examples is passed over up to where the checkpoint was written: the last ten steps, done again,
    give the same weights bit for bit."""
    settings = resume_settings()
    run = changed_copy(ready, tmp_path / "run", settings)
    trained = run.artifact("sft_model")
    recipe = _resume_recipe(SimpleNamespace(recipe=trained.manifest.recipe))
    partial = Path(run.path("sft_model.partial"))
    Path(run.path("sft_model")).rename(tmp_path / "done")
    shutil.copytree(tmp_path / "done" / "checkpoints" / "step-000040", partial / "checkpoints" / "step-000040")
    (partial / "recipe.json").write_text(fingerprint("sft_model", recipe))
    artifact = make_stage("sft_model", run, settings)
    assert artifact.table("steps")["step"].to_pylist() == list(range(40, 50)), "it did not start over"
    assert artifact.content == trained.content
    name = "policy/model.safetensors"
    again, once = Path(run.path("sft_model", name)).read_bytes(), (tmp_path / "done" / name).read_bytes()
    assert again == once != (tmp_path / "done" / "checkpoints" / "step-000040" / name).read_bytes()


@pytest.mark.slow
def test_two_workers_share_the_examples_of_sft(ready, tmp_path):
    """Other batches, but as many and of the same kind: the loss falls as with one. No CPU is left to Ray Data then."""
    settings = resume_settings("ufm.workers.count=2")
    examples = ready.artifact("sft").table("examples").slice(0, 12 * settings.ufm.sft.batch)
    run = changed_copy(ready, tmp_path / "run", settings, sft={"examples": examples})
    shutil.rmtree(run.path("sft_model"))
    two = make_stage("sft_model", run, settings).table("steps").to_pylist()
    one = ready.artifact("sft_model").table("steps").to_pylist()
    assert [row["step"] for row in two] == list(range(12))
    assert two[-1]["loss"] < 0.1 * two[0]["loss"]
    early = 5  # later on a loss is what the batch makes it: one worker's differ by a third from seed to seed
    assert [row["loss"] for row in two[:early]] == pytest.approx([row["loss"] for row in one[:early]], rel=0.1)
    assert {row["dropped_too_long"] for row in two} == {0.0}
