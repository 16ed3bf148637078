"""Fixtures of the UFM's tests: the real tiny checkpoint, and a small simulated run with all that training reads."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from artifact_helpers import put
from drive_grpo import resume_settings
from ufm_helpers import changed_copy, small_settings, write_groups

from gubs.artifacts import Run
from gubs.config import Settings
from gubs.prompts.answers import as_answer
from gubs.records import TASK_OPTIONS, Split, Task
from gubs.stages import make, make_stage
from gubs.teachers.sft import SCHEMA
from gubs.ufm.questions import Questions

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SFT_EXAMPLES = 16 * 50


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny Qwen2.5-VL checkpoint (made on first use)."""
    from gubs.ufm.model import init

    return init("tiny")


@pytest.fixture(scope="session")
def ufm_settings() -> Settings:
    """Of the small run."""
    return small_settings()


@pytest.fixture(scope="session")
def ufm_run(tmp_path_factory: pytest.TempPathFactory, ufm_settings: Settings, ray_local: None) -> Run:
    """A simulated run with videos, frames, examples, labels and groups (not to be written to)."""
    run = Run(tmp_path_factory.mktemp("ufm") / "run")
    make(["frames", "sft", "labels"], run, ufm_settings)
    write_groups(run, ufm_settings)
    return run


@pytest.fixture(scope="session")
def ready(ufm_run, tmp_path_factory) -> Run:
    """The small run with a policy that has learned the form of an answer and nothing else: some of its answers are
    right, so rewards differ and gradients are not zero."""
    settings = resume_settings()
    run = changed_copy(ufm_run, tmp_path_factory.mktemp("resume") / "run", settings)
    items = [i for t in Task for i in Questions(run, settings.ufm.inputs).items(t, Split.TRAIN)]
    rows = []
    for n in range(SFT_EXAMPLES):
        item = items[n * 7919 % len(items)]
        option = TASK_OPTIONS[item.task][n % len(TASK_OPTIONS[item.task])]
        answer = as_answer("It fits.", option)
        about = {"task": item.task, "user_id": item.user_id, "video_id": item.video_id}
        which = {"example_id": str(n), "interaction_id": item.interaction_id, "split": "train", "gold": option}
        rows.append({**about, **which, "response": answer})
    put(run, "sft", {"examples": pa.Table.from_pylist(rows, schema=SCHEMA)}, settings=settings)
    steps = make_stage("sft_model", run, settings).table("steps").to_pylist()
    assert len(steps) == SFT_EXAMPLES // settings.ufm.sft.batch
    assert steps[-1]["loss"] < 0.4 < steps[0]["loss"], "SFT did not learn"
    return run
