"""Checkpoints of a training run: written in full, then renamed, marked last; found again, checked, pruned.

`<folder>/step-000050/` holds `policy/` (safetensors, tokenizer, processor: what transformers and vLLM load, and the
only copy of the weights), the optimiser's state of every rank, `rng-<rank>.pt`, and `checkpoint.json`: the step, what
it was trained on and with, and the size of every file. A folder without that marker is unfinished, whatever it holds.
All workers see the folder: it is on a shared disk if they are on several machines.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from gubs.errors import ArtifactError, GubsError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from gubs.ufm.inputs import Inputs

MARKER = "checkpoint.json"
POLICY = "policy"
T = TypeVar("T")
Write = Callable[[], None]
"""Writes files that were collected before."""
Save = Callable[[Path], Write | None]
Agree = Callable[[str], str]
"""Waits until every rank has said what went wrong on it ("" = nothing); returns the first problem of any rank."""
_FULL = 1 << 20
"""A disk with fewer free bytes counts as full."""


class SharedError(ArtifactError):
    """An error that every rank raises at the same time: none waits for another, and trying again would not help."""


@dataclass(frozen=True)
class Marker:
    """What a finished checkpoint is."""

    step: int
    """Optimiser steps done."""
    world: int
    """Number of ranks that DeepSpeed's state is split over."""
    recipe: dict[str, str]
    """Fingerprints of model, data and settings; another recipe is refused."""
    score: float | None = None
    """What the best checkpoint is chosen by; larger is better."""
    files: dict[str, int] = field(default_factory=dict)
    """Size of every file in bytes."""


class Checkpoints:
    """The checkpoints of one run. All ranks use it; what only one may do, rank 0 does."""

    def __init__(self, folder: str, recipe: Mapping[str, str], keep: int, rank: int = 0, world_size: int = 1):
        """Opens the folder.

        Args:
            folder: where they are.
            recipe: see `Marker`.
            keep: how many of the newest to keep, besides the best.
            rank: of this process.
            world_size: number of processes.
        """
        self.folder, self.recipe, self.keep = Path(folder), dict(recipe), keep
        self.rank, self.world_size = rank, world_size
        self._unfinished: _Unfinished | None = None

    def latest(self) -> Marker | None:
        """The newest finished checkpoint, checked; None if there is none.

        Raises:
            ArtifactError: a file is missing or of another size than recorded; or it is of another model, other data,
                other settings or another number of workers.
        """
        steps = self.steps()
        if not steps:
            return None
        marker, place = self._marker(steps[-1]), self.place(steps[-1])
        for name, size in marker.files.items():
            if not (place / name).exists() or (place / name).stat().st_size != size:
                raise ArtifactError(
                    f"checkpoint {place} is damaged: {name} is missing or not of the recorded size; remove that folder "
                    "to resume from an earlier one"
                )
        for name, mark in self.recipe.items():
            if marker.recipe.get(name) != mark:
                raise ArtifactError(
                    f"{place} was trained with another {name} ({marker.recipe.get(name)}, now {mark}): "
                    "give the earlier settings, use another --run, or --force to start over"
                )
        if marker.world != self.world_size:
            raise ArtifactError(
                f"{place} was written by {marker.world} workers and cannot be resumed with {self.world_size}: "
                f"set ufm.workers.count={marker.world}"
            )
        return marker

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        finished = (marker.parent.name for marker in self.folder.glob(f"step-*/{MARKER}"))
        return sorted(int(name.removeprefix("step-")) for name in finished if "." not in name)

    def place(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.folder / f"step-{step:06d}"

    def write(self, step: int, save: Save, *, agree: Agree = str, score: float | None = None) -> None:
        """Writes a checkpoint. All ranks call it at the same step; if one fails, all do.

        Args:
            step: optimiser steps done.
            save: puts this rank's files into the folder it gets, which all ranks share, or returns what will do so.
            agree: see `Agree`.
            score: see `Marker`.

        Raises:
            SharedError: the disk is full or cannot be written to; earlier checkpoints are as they were.
        """
        self._begin(step, save, agree, score, _at_once)
        self.finish(agree)

    def begin(self, step: int, save: Save, *, agree: Agree = str, score: float | None = None) -> None:
        """Begins what `write` does: what `save` returns is done by a thread, and counts for nothing until `finish`. An
        earlier one is finished first.
        """
        self.finish(agree)
        self._begin(step, save, agree, score, _in_background)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint was begun and not finished."""
        return self._unfinished is not None

    @property
    def written(self) -> bool:
        """Whether this rank's files of the checkpoint that was begun are on the disk, or cannot be written."""
        return self._unfinished is not None and self._unfinished.files.done()

    def finish(self, agree: Agree = str) -> None:
        """Waits for the checkpoint that was begun, if there is one, and publishes it. Errors: see `write`."""
        if self._unfinished is None:
            return
        (step, score, files), self._unfinished = self._unfinished, None
        place, staged = self.place(step), self._staged(step)

        def publish() -> None:
            if self.rank == 0:
                self._publish(staged, place, Marker(step, self.world_size, self.recipe, score, _sizes(staged)))

        for part in (files.result, publish):
            self._do(part, step, agree)

    def _begin(
        self, step: int, save: Save, agree: Agree, score: float | None, run: "Callable[[Write], Future[None]]"
    ) -> None:
        staged = self._staged(step)

        def prepare() -> None:
            if self.rank == 0:
                self._remove_unfinished()
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir(parents=True)

        def fill(rest: Write | None) -> None:
            if rest:
                rest()
            _flush(staged)

        self._do(prepare, step, agree)
        rest = self._do(partial(save, staged), step, agree)
        self._unfinished = _Unfinished(step, score, run(partial(fill, rest)))

    def _do(self, part: Callable[[], T], step: int, agree: Agree) -> T:
        """Does a part of writing a checkpoint; if that fails, nothing of it is left."""
        staged = self._staged(step)
        try:
            return together(disk_errors(f"the checkpoint {self.place(step)}", staged)(part), agree)
        except Exception:
            shutil.rmtree(staged, ignore_errors=True)  # files of a failed attempt would keep a full disk full
            with contextlib.suppress(OSError):
                self._remove_unfinished()
            raise

    def _staged(self, step: int) -> Path:
        return self.place(step).with_suffix(".tmp")

    def _publish(self, staged: Path, place: Path, marker: Marker) -> None:
        if place.exists():
            shutil.rmtree(place)  # without a marker, or of an attempt that resumed from an earlier step
        staged.rename(place)
        _write_through(place / MARKER, json.dumps(asdict(marker), indent=1).encode())
        self._prune()

    def _remove_unfinished(self) -> None:
        """Folders without a marker, left by a kill or a full disk, would fill the disk."""
        if self.rank:
            return
        for path in self.folder.glob("step-*"):
            if not (path / MARKER).exists():
                shutil.rmtree(path)

    def best(self) -> int | None:
        """Step of the best finished checkpoint; the earlier of two equally good ones."""
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


class _Unfinished(NamedTuple):
    """A checkpoint that is being written."""

    step: int
    score: float | None
    files: "Future[None]"
    """Done when this rank's files are written."""


def _at_once(write: Write) -> "Future[None]":
    done: Future[None] = Future()
    _settle(done, write)
    return done


def _in_background(write: Write) -> "Future[None]":
    """In a thread that does not outlive the process: half a checkpoint has no marker, and is removed."""
    done: Future[None] = Future()
    threading.Thread(target=_settle, args=(done, write), daemon=True, name="checkpoint").start()
    return done


def _settle(done: "Future[None]", write: Write) -> None:
    try:
        write()
    except Exception as e:  # noqa: BLE001 - raised by `Checkpoints.finish`
        done.set_exception(e)
    else:
        done.set_result(None)


def together(action: Callable[[], T], agree: Agree) -> T:
    """Does something on every rank; if it fails on one, all of them raise, and none waits for another.

    Args:
        action: what this rank does.
        agree: see `Agree`.

    Raises:
        SharedError: it failed here or on another rank, for a reason that a user can fix.
        Exception: what the action raised here, if that is a bug.
    """
    try:
        result, error = action(), None
    except Exception as e:  # noqa: BLE001 - the other ranks must learn of it first
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


@contextlib.contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turns errors of a full or broken disk into one that says what was not written.

    Args:
        what: named in the error.
        folder: on the disk that is written to.

    Raises:
        ArtifactError: a disk is behind the error. Others are raised as they are.
    """
    try:
        yield
    except Exception as e:
        from_disk = isinstance(e, OSError) or "os error" in str(e)  # torch and safetensors have their own errors
        if not from_disk and not (folder.exists() and shutil.disk_usage(folder).free < _FULL):
            raise
        raise ArtifactError(f"cannot write {what}: {e}; earlier checkpoints are intact") from e


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _flush(folder: Path) -> None:
    """The files' contents reach the disk before their names do."""
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)


def _write_through(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_policy(
    model: "PreTrainedModel", inputs: "Inputs", folder: Path, weights: "Mapping[str, Tensor] | None" = None
) -> None:
    """The policy as a checkpoint that transformers and vLLM load.

    Args:
        model: the policy.
        inputs: its processor and tokenizer.
        folder: where it goes.
        weights: a copy of its weights, to be saved in their place.
    """
    model.save_pretrained(folder, state_dict=dict(weights) if weights else None)
    inputs.processor.save_pretrained(folder)


def load_policy(model: "PreTrainedModel", folder: Path) -> None:
    """Loads the weights that `save_policy` saved into a model of the same kind and type, bit for bit."""
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
