"""Checkpoints of a training run: written beside, renamed when whole, marker last; found again, checked, pruned.

`<folder>/step-000050/` holds `policy/` (safetensors, tokenizer, processor: what transformers and vLLM load), the
DeepSpeed state of every rank, `rng-<rank>.pt`, and `checkpoint.json`: the step, what it was trained on and with, and
the size of every file. A folder without that marker is unfinished, whatever it holds. The folder
is a path that all workers see (a shared disk where they are on several machines).
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

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
            folder: where they are.
            recipe: see `Marker`.
            keep: newest ones to keep, beside the best.
            rank: of this process.
            world: number of processes.
        """
        self.folder, self.recipe, self.keep, self.rank, self.world = Path(folder), dict(recipe), keep, rank, world

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
        finished = (marker.parent.name for marker in self.folder.glob(f"step-*/{MARKER}"))
        return sorted(int(name.removeprefix("step-")) for name in finished if "." not in name)

    def read(self, step: int) -> Marker:
        """The marker of a finished checkpoint.

        Raises:
            ArtifactError: a file is missing or not of the recorded size.
        """
        marker = self._marker(step)
        for name, size in marker.files.items():
            path = self.place(step) / name
            if not path.exists() or path.stat().st_size != size:
                raise ArtifactError(
                    f"checkpoint {self.folder}/{_name(step)} is damaged: {name} is missing or not of the recorded "
                    "size; remove that folder to go on from an earlier one"
                )
        return marker

    def place(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.folder / _name(step)

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
            save: puts this rank's files into the folder it is given, which all ranks share.
            agree: see `Agree`.
            score: see `Marker`.

        Raises:
            SharedError: the disk is full, or not to be written to; earlier checkpoints are as they were.
        """
        place = self.place(step)
        staged = place.with_suffix(".tmp")

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

    def _publish(self, staged: Path, place: Path, marker: Marker) -> None:
        if place.exists():
            shutil.rmtree(place)  # without a marker, or of an attempt that went on from an earlier step
        staged.rename(place)
        _write_through(place / MARKER, json.dumps(asdict(marker), indent=1).encode())
        self._prune()

    def _remove_unfinished(self) -> None:
        """What a kill or a full disk left: folders without a marker, whatever is in them, would fill the disk."""
        if self.rank:
            return
        for path in self.folder.glob("step-*"):
            if not (path / MARKER).exists():
                shutil.rmtree(path)

    def best(self) -> int | None:
        """Step of the best finished checkpoint; the earlier one of two that are as good."""
        scores = {step: self._marker(step).score for step in self.steps()}
        scored = [step for step in scores if scores[step] is not None]
        return max(scored, key=lambda step: (scores[step], -step)) if scored else None

    def _marker(self, step: int) -> Marker:
        return Marker(**json.loads((self.place(step) / MARKER).read_text()))

    def _prune(self) -> None:
        steps, best = self.steps(), self.best()
        for step in steps[: -self.keep]:
            if step != best:
                (self.place(step) / MARKER).unlink()  # first: half a checkpoint must not look like a whole one
                shutil.rmtree(self.place(step))


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
