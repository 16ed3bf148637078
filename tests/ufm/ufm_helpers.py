"""What the UFM's tests share: a small simulated run with hand-written groups, clips, and answers of a given text."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for processes that tests start: pytest does it for itself

from artifact_helpers import put
from small_world import WORLD

from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.records import SCHEMAS
from gubs.ufm.inputs import VISION_MARK, Inputs, Prompt
from gubs.ufm.settings import InputSettings
from gubs.video.clips import Clip

SMALL = [
    *WORLD,
    "splits.ugm_users=12",
    "teachers.author=script",
    "teachers.train_labels=truth",
    "teachers.test_labels=truth",
    "teachers.script_flaws=true",
    "render.max_seconds=4",
    "ufm.model.lessons=0",
    "ufm.grpo.prompts=4",
    "ufm.grpo.tasks=[sequential,click]",
    "ufm.held_out=0.001",  # nobody: the few users are all needed
    "ufm.sft.min_steps=0",
    "ufm.sft.optimizer.schedule=constant",
    "ufm.sft.optimizer.warmup_steps=0",
]
"""Overrides of preset tiny: a data set that is made in seconds and still has every option."""

GROUPS = 3


def small_settings(*overrides: str) -> Settings:
    return load_settings("tiny", [*SMALL, *overrides])


def write_groups(run: Run, settings: Settings, groups: int = GROUPS) -> None:
    """The artifact `ugm` by hand: every user is in the group of its number, every third one in the next group too."""
    users = sorted(run.artifact("ifvr").table("users", ["user_id"])["user_id"].to_pylist())
    names = [f"g{i:02d}" for i in range(groups)]
    rows = [
        {
            "group_id": g,
            "name": f"Viewers {i}",
            "features": "likes pets",
            "typical_user": users[i],
            "threshold": 0.1,
            "initial_profile": f"Group {i} likes pets and food.\nShort videos suit them.",
            "final_profile": f"Group {i} likes pets and travel.\nLong videos drive them away." if i else None,
            "members": [],
            "version": "1",
        }
        for i, g in enumerate(names)
    ]
    places = [(u, names[i % groups]) for i, u in enumerate(users)]
    places += [(u, names[(i + 1) % groups]) for i, u in enumerate(users) if i % 3 == 0]
    members = [{"user_id": u, "group_id": g, "similarity": 0.5, "how": "matched"} for u, g in places]
    tables = {
        "groups": pa.Table.from_pylist(rows, schema=SCHEMAS["groups"]),
        "memberships": pa.Table.from_pylist(members),
    }
    put(run, "ugm", tables, settings=settings, inputs=["ifvr"])


def make_clip(seed: int = 0, frames: int = 4, height: int = 56, width: int = 56, seconds: float = 10.0) -> Clip:
    """Random pictures; one frame makes an image."""
    pictures = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)
    key = hashlib.sha256(pictures.tobytes()).hexdigest()[:16]
    return Clip(key, pictures, seconds if frames > 1 else 0.0)


def image_prompt(text: str = "Offered.\nUser: x", seed: int = 1) -> Prompt:
    return Prompt(f"{text}\n{VISION_MARK}\nClick? A B", make_clip(seed, frames=1))


def video_prompt(text: str = "Playing.\nUser: x", seed: int = 2, **clip: Any) -> Prompt:
    return Prompt(f"{text}\n{VISION_MARK}\nSkip? A B C D", make_clip(seed, **clip))


def text_prompt(text: str = "Playing.\nUser: x") -> Prompt:
    return Prompt(f"{text}\nSkip? A B C D")


def tiny_inputs(folder: Path, **settings: Any) -> Inputs:
    return Inputs(folder, InputSettings(**{"max_prompt_tokens": 512, "max_new_tokens": 24, **settings}))


def changed_copy(run: Run, folder: Path, settings: Settings, **stages: dict[str, pa.Table]) -> Run:
    """A copy of a run in which some tables of some artifacts are others."""
    shutil.copytree(run.root, folder)
    copy = Run(folder)
    for stage, tables in stages.items():
        old = copy.artifact(stage)
        whole = {n: tables[n] if n in tables else old.table(n) for n in old.manifest.tables}
        put(copy, stage, whole, settings=settings, inputs=old.manifest.recipe.inputs, info=old.manifest.info)
    return copy


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of a size ("3m"), there for as long as the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a traceback may hold a file open
