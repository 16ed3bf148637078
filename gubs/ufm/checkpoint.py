"""Checkpoints of a training run: written beside, renamed when whole, marker last; found again, checked, pruned.

`<folder>/step-000050/` holds `policy/` (safetensors, tokenizer, processor: what transformers and vLLM load), the
DeepSpeed state of every rank, `rng-<rank>.pt`, and `checkpoint.json`: the step, what it was trained on and with, and
the size of every file. A folder without that marker is unfinished, whatever it holds. Remote runs (s3://...) are
written to a local folder and uploaded, the marker last.
"""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from gubs.errors import ArtifactError, GubsError

MARKER = "checkpoint.json"
POLICY = "policy"
T = TypeVar("T")
Agree = Callable[[str], str]
"""Waits for all ranks, each of which says what went wrong on it ("" = nothing); gives the first problem of any."""
_FULL = 1 << 20
"""Bytes left on a disk that is taken for full."""


class SharedError(ArtifactError):
    """An error that every rank raises at the same time: none waits for another, and trying again would not help."""


@dataclass(frozen=True)
class Marker:
    """What a finished checkpoint is."""

    step: int
    """Optimiser steps done."""
    world: int
    """Ranks; DeepSpeed's state is dealt to them."""
    recipe: dict[str, str]
    """Fingerprints of model, data and settings; another recipe is refused."""
    score: float | None = None
    """What the best checkpoint is chosen by; larger is better."""
    files: dict[str, int] = field(default_factory=dict)
    """Size of every file in bytes."""


class Checkpoints:
    """The checkpoints of one run. All ranks use it; what only one may do, rank 0 does."""

    def __init__(self, folder: str, recipe: Mapping[str, str], keep: int, rank: int = 0, world: int = 1):
        """Opens the folder.

        Args:
            folder: path or URI.
            recipe: see `Marker`.
            keep: newest ones to keep, beside the best.
            rank: of this process.
            world: number of processes.
        """
        self.folder, self.recipe, self.keep, self.rank, self.world = folder, dict(recipe), keep, rank, world
        self.fs, self.root = fsspec.core.url_to_fs(folder)
        self._local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def latest(self) -> Marker | None:
        """The newest finished checkpoint, checked; None if there is none.

        Raises:
            ArtifactError: it is damaged, or of another model, other data or other settings.
        """
        steps = self.steps()
        if not steps:
            return None
        marker = self.read(steps[-1])
        where = f"{self.folder}/{_name(marker.step)}"
        for name, mark in self.recipe.items():
            if marker.recipe.get(name) != mark:
                raise ArtifactError(
                    f"{where} was trained with another {name} ({marker.recipe.get(name)}, now {mark}): "
                    "give the earlier settings, use another --run, or --force to start anew"
                )
        if marker.world != self.world:
            raise ArtifactError(
                f"{where} was written by {marker.world} workers and cannot go on with {self.world}: "
                f"set ufm.workers.count={marker.world}"
            )
        return marker

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        if not self.fs.exists(self.root):
            return []
        names = (p.rstrip("/").rsplit("/", 1)[-1] for p in self.fs.ls(self.root, detail=False))
        found = [n for n in names if n.startswith("step-") and "." not in n]
        return sorted(int(n.removeprefix("step-")) for n in found if self.fs.exists(f"{self.root}/{n}/{MARKER}"))

    def read(self, step: int) -> Marker:
        """The marker of a finished checkpoint.

        Raises:
            ArtifactError: a file is missing or not of the recorded size.
        """
        place = f"{self.root}/{_name(step)}"
        marker = self._marker(step)
        for name, size in marker.files.items():
            path = f"{place}/{name}"
            if not self.fs.exists(path) or self.fs.size(path) != size:
                raise ArtifactError(
                    f"checkpoint {self.folder}/{_name(step)} is damaged: {name} is missing or not of the recorded "
                    "size; remove that folder to go on from an earlier one"
                )
        return marker

    def local(self, step: int) -> Path:
        """A finished checkpoint as a local folder; a remote one is fetched first."""
        place = f"{self.root}/{_name(step)}"
        if self._local:
            return Path(place)
        target = Path(tempfile.mkdtemp(prefix="gubs-checkpoint-"))
        self.fs.get(f"{place}/", f"{target}/", recursive=True)
        return target

    def write(
        self,
        step: int,
        save: Callable[[Path], None],
        *,
        agree: Agree = str,
        score: float | None = None,
    ) -> None:
        """Writes a checkpoint; all ranks call it at the same step, and where one fails all of them do.

        Args:
            step: optimiser steps done.
            save: puts this rank's files into the folder it is given, which the ranks of a machine share.
            agree: see `Agree`.
            score: see `Marker`.

        Raises:
            SharedError: the disk is full, or not to be written to; earlier checkpoints are as they were.
        """
        place = f"{self.root}/{_name(step)}"
        elsewhere = Path(tempfile.gettempdir()) / f"gubs-{_name(step)}-{os.getppid()}"
        staged = Path(f"{place}.tmp") if self._local else elsewhere

        def prepare() -> None:
            if self.rank == 0:
                self._remove_unfinished()
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir(parents=True)

        def fill() -> None:
            save(staged)
            _flush(staged)

        def publish() -> None:
            if self.rank == 0:
                self._publish(staged, place, Marker(step, self.world, self.recipe, score, _sizes(staged)))

        try:
            for part in (prepare, fill, publish):
                together(functools.partial(self._write, part, step, staged), agree)
        except Exception:
            shutil.rmtree(staged, ignore_errors=True)  # what was written in vain would keep a full disk full
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            raise

    def _write(self, part: Callable[[], None], step: int, staged: Path) -> None:
        try:
            part()
        except Exception as e:
            if not of_the_disk(e, staged):
                raise
            text = f"cannot write the checkpoint {self.folder}/{_name(step)}: {e}; earlier checkpoints are whole"
            raise ArtifactError(text) from e

    def _publish(self, staged: Path, place: str, marker: Marker) -> None:
        text = json.dumps(asdict(marker), indent=1).encode()
        if self._local:
            if Path(place).exists():
                shutil.rmtree(place)  # without a marker, or of an attempt that went on from an earlier step
            staged.rename(place)
            _write_through(Path(place) / MARKER, text)
        else:
            self.fs.put(f"{staged}/", f"{place}/", recursive=True)
            self.fs.pipe_file(f"{place}/{MARKER}", text)
            shutil.rmtree(staged)
        self._prune()

    def _remove_unfinished(self) -> None:
        """What a kill or a full disk left: folders without a marker, whatever is in them, would fill the disk."""
        if self.rank or not self.fs.exists(self.root):
            return
        for path in self.fs.ls(self.root, detail=False):
            if path.rstrip("/").rsplit("/", 1)[-1].startswith("step-") and not self.fs.exists(f"{path}/{MARKER}"):
                self.fs.rm(path, recursive=True)

    def best(self) -> int | None:
        """Step of the best finished checkpoint; the earlier one of two that are as good."""
        scores = {step: self._marker(step).score for step in self.steps()}
        scored = [step for step in scores if scores[step] is not None]
        return max(scored, key=lambda step: (scores[step], -step)) if scored else None

    def _marker(self, step: int) -> Marker:
        return Marker(**json.loads(self.fs.cat_file(f"{self.root}/{_name(step)}/{MARKER}")))

    def _prune(self) -> None:
        steps, best = self.steps(), self.best()
        for step in steps[: -self.keep]:
            if step != best:
                place = f"{self.root}/{_name(step)}"
                self.fs.rm_file(f"{place}/{MARKER}")  # first: half a checkpoint must not look like a whole one
                self.fs.rm(place, recursive=True)


def together(action: Callable[[], T], agree: Agree) -> T:
    """Does something on every rank; where it fails on one, all of them raise, and none waits for another.

    Args:
        action: what this rank does.
        agree: see `Agree`.

    Raises:
        SharedError: it failed, for a reason a user can mend, here or on another rank.
        Exception: what the action raised here, where that is a bug.
    """
    try:
        result, error = action(), None
    except Exception as e:  # noqa: BLE001 - the others have to hear of it first
        error = e
    try:
        problem = agree(str(error) or repr(error) if error else "")
        if error and not isinstance(error, GubsError):
            raise error
        if problem:
            raise SharedError(problem) from error
    finally:
        del error  # its frames would refer to itself, and keep files of a full disk open
    return result


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _flush(folder: Path) -> None:
    """The files' contents reach the disk before their names do."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as f:
                os.fsync(f.fileno())


def of_the_disk(error: Exception, folder: Path) -> bool:
    """Whether a disk that is full or broken is behind an error: torch and safetensors raise errors of their own."""
    if isinstance(error, OSError) or "os error" in str(error):
        return True
    return folder.exists() and shutil.disk_usage(folder).free < _FULL


def _write_through(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_policy(model: Any, inputs: Any, folder: Path) -> None:
    """The policy as a checkpoint that transformers and vLLM load."""
    model.save_pretrained(folder)
    inputs.processor.save_pretrained(folder)
