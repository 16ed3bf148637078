"""Fixtures of the UFM's tests: the real tiny checkpoint, and a small simulated run with all that training reads."""

import os
from pathlib import Path

import pytest
from ufm_helpers import small_settings, write_groups

from gubs.artifacts import Run
from gubs.config import Settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
    from gubs import pipeline

    run = Run(tmp_path_factory.mktemp("ufm") / "run")
    pipeline.synth(run, ufm_settings)
    pipeline.build(run, ufm_settings)
    pipeline.frames(run, ufm_settings)
    pipeline.teach(run, ufm_settings)
    write_groups(run, ufm_settings)
    return run
