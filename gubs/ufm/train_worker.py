"""What every train worker does, whatever it trains: set up, resume from the last checkpoint, step, report, stop.

Ray Train starts one `TrainWorker` per rank, and restarts all of them when one dies; each worker then finds the newest
finished checkpoint itself. On a CPU a resumed run computes bit for bit what an uninterrupted one does.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gubs.artifacts import JsonObject, Run
from gubs.quick_imports import quick_imports
from gubs.records import Task
from gubs.ufm.checkpoint import POLICY, Checkpoints, SharedError, Write, disk_errors, save_policy, together
from gubs.ufm.inputs import Inputs
from gubs.ufm.model import cpu_threads
from gubs.ufm.monitor import STUCK, Monitor, Phases, Watchdog
from gubs.ufm.questions import Questions, groups_of
from gubs.ufm.settings import CheckpointSettings, UFMSettings
from gubs.ufm.trainer import Trainer, check_allocator, copied_to_host, reduce_max

if TYPE_CHECKING:
    import torch

CHECKPOINTS, SETTINGS = "checkpoints", "settings.json"
_ON_DISK = ("resume", "checkpoint", "policy")
"""Phases that last as long as the disk needs."""


class DivergedError(SharedError):
    """Loss or gradients were not numbers several steps in a row."""

    exit_code = 8


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know; the driver sends it."""

    run_uri: str
    ufm: UFMSettings
    seed: int
    """Of the run: decides who is held out."""
    settings: Mapping[str, object]
    """All settings of the run, for the record."""
    stage: str
    folder: str
    """Local folder of the training run's files (metrics, samples, checkpoints)."""
    start: str
    """Checkpoint folder to start from."""
    recipe: Mapping[str, str]
    """Fingerprints that a checkpoint must have."""
    tastes: bool = False
    """Prompts show what the stage `profiles` wrote."""
    tasks: tuple[Task, ...] = ()

    @property
    def training_seed(self) -> int:
        """Decides all that is drawn in this training."""
        return self.ufm.training_seed(self.seed)

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints."""
        return str(Path(self.folder) / CHECKPOINTS)


class TrainWorker:
    """One rank. Subclasses say what a step is."""

    trainer: Trainer

    def __init__(self, job: Job, steps: int, checkpoint: CheckpointSettings):
        """Sets up device, threads, inputs and sinks.

        Args:
            job: see `Job`.
            steps: optimiser steps of the whole run.
            checkpoint: when to write checkpoints, and how many to keep.
        """
        import torch

        self.job, self.steps, self.ufm = job, steps, job.ufm
        self._checkpoint = checkpoint
        self.rank, self.world_size, local_world_size = _ranks()
        self.device = _device()
        self.threads = cpu_threads(local_world_size, self.ufm.workers.threads)
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        torch.manual_seed(job.training_seed)
        self.folder = Path(job.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            (self.folder / STUCK).unlink(missing_ok=True)  # of an earlier attempt
        self.phases = Phases()
        limits = dict.fromkeys(_ON_DISK, checkpoint.timeout_s)
        self._watchdog = Watchdog(self.phases, self.ufm.workers.stuck_after_s, self.folder, self.rank, limits)
        groups = groups_of(job.ufm.grpo)
        self.questions = Questions(Run(job.run_uri), job.ufm.inputs, tastes=job.tastes, groups=groups)
        self.vision = self.ufm.inputs.vision and self.questions.pictures
        self.launch()
        with quick_imports():
            import deepspeed  # noqa: F401
            from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration  # noqa: F401
        self.inputs = Inputs(job.start, self.ufm.inputs)
        self.checkpoints = Checkpoints(job.checkpoints, job.recipe, checkpoint.keep, self.rank, self.world_size)
        self.monitor = Monitor(self.folder, job.stage, self.ufm.grpo.trackers, job.settings, self.rank)
        self._bad = 0
        self._ended = 0.0
        self._scores: list[float] = []

    def launch(self) -> None:
        """Called before anything is loaded, to start another process that comes up meanwhile."""

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its figures."""
        raise NotImplementedError

    def begin(self, step: int) -> None:
        """Called before the first step of this attempt, after a checkpoint was loaded."""

    def end(self) -> None:
        """Called after the last step."""

    def run(self) -> JsonObject:
        """All remaining steps. Errors that every rank raises at once (`SharedError`) are returned, since trying again
        with the same input would not help. An error on one rank alone is raised, and Ray Train ends the other ranks.
        """
        try:
            with self.phases("resume"):
                first = self._resume()
            self.begin(first)
            self.phases.take()  # no step's seconds include the start
            for step in range(first, self.steps):
                figures = self._timed(step)
                with self.phases("report"):
                    self.monitor.report(step, figures)
                    _report_to_ray(step, figures)
                self._maybe_checkpoint(step, figures)
            self._save_final()
        except SharedError as e:
            return {"error": e}
        else:
            return {"steps": self.steps, "after_last_step": self.phases.take()}
        finally:
            self._watchdog.stop()
            self.end()

    def place(self) -> tuple[str, Sequence[str]]:
        """This worker's node and the id of its GPU (none on a CPU)."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", []) if self.device.type == "cuda" else []
        return context.get_node_id(), gpus

    def skipped(self, step: int, skipped: bool, batch: Sequence[JsonObject]) -> None:
        """Counts steps that were skipped because something was not a number.

        Raises:
            DivergedError: too many in a row; the batch is saved.
        """
        self._bad = self._bad + 1 if skipped else 0
        limit = self.trainer.settings.max_bad_steps
        if self._bad >= limit:
            path = self.folder / f"bad-step-{step}-rank-{self.rank}.json"
            path.write_text(json.dumps(list(batch), ensure_ascii=False))
            raise DivergedError(
                f"loss or gradient was not a number in {limit} steps in a row, the last one step {step}; its batch is "
                f"in {path}. Lower the learning rate, or raise max_bad_steps of its optimizer"
            )

    def _timed(self, step: int) -> dict[str, float]:
        """A step's figures, with seconds per phase and tokens of all workers per second. The seconds of checkpoint and
        report are those after the previous step; `since_last` counts from that step's end.
        """
        began = time.monotonic()
        figures = self.step(step)
        seconds = {f"seconds/{k.replace(' ', '_')}": v for k, v in self.phases.take().items()}
        ended = time.monotonic()
        whole = {"seconds/step": ended - began, "seconds/since_last": ended - (self._ended or began)}
        self._ended = ended
        speeds = {
            f"tokens_per_second/{name}": figures[f"tokens/{name}"] / max(1e-9, seconds[f"seconds/{name}"])
            for name in ("rollout", "train")
            if f"tokens/{name}" in figures
        }
        return {**figures, **seconds, **whole, **speeds, **_gpu_memory(self.device)}

    def _resume(self) -> int:
        """Loads the newest checkpoint, if there is one; returns the next step.

        Raises:
            SharedError: it is damaged or of another training, or the ranks see different ones.
        """
        import torch

        marker = together(self.checkpoints.latest, agree)
        done = marker.step if marker else 0
        if reduce_max(done, self.device) != -reduce_max(-done, self.device):
            raise SharedError(f"the workers do not see the same checkpoints: {self.job.checkpoints} is not shared")
        if marker:
            place = self.checkpoints.place(marker.step)
            self.trainer.load(place / "state", place / POLICY)
            states = torch.load(place / f"rng-{self.rank}.pt", weights_only=True)
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and self.device.type == "cuda":
                torch.cuda.set_rng_state(states["cuda"], self.device)
        self.monitor.forget_after(done - 1)
        return done

    def _maybe_checkpoint(self, step: int, figures: Mapping[str, float]) -> None:
        if "reward_raw/T" in figures:
            self._scores.append(figures["reward_raw/T"])
        due = not (step + 1) % self._checkpoint.every or step + 1 == self.steps
        if not due and not self.checkpoints.writing:
            return
        with self.phases("checkpoint"):
            if self.checkpoints.writing and not reduce_max(int(not self.checkpoints.written), self.device):
                self.checkpoints.finish(agree)
            if not due:
                return
            score = sum(self._scores) / len(self._scores) if self._scores else None
            self._scores = []
            write = self.checkpoints.begin if self._checkpoint.background else self.checkpoints.write
            write(step + 1, self._save, agree=agree, score=score)

    def _save(self, folder: Path) -> Write:
        """Writes what is small; returns what writes the rest."""
        import torch

        background = self._checkpoint.background
        write_state = self.trainer.save(folder / "state", copy=background)
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        torch.save(states, folder / f"rng-{self.rank}.pt")
        if self.rank:
            return write_state
        (folder / SETTINGS).write_text(json.dumps(dict(self.job.settings), indent=1))
        model = self.trainer.model
        weights = copied_to_host(model.state_dict()) if background else None

        def write_all() -> None:
            write_state()
            save_policy(model, self.inputs, folder / POLICY, weights)

        return write_all

    def _save_final(self) -> None:
        policy = self.folder / POLICY
        with self.phases("checkpoint"):
            self.checkpoints.finish(agree)

        @disk_errors(f"the policy {policy}", self.folder)
        def write() -> None:
            if self.rank == 0:
                save_policy(self.trainer.model, self.inputs, policy)

        with self.phases("policy"):
            together(write, agree)


def _ranks() -> tuple[int, int, int]:
    """Rank, number of ranks, number of ranks on this machine."""
    import ray.train

    try:
        context = ray.train.get_context()
        return context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
    except RuntimeError:  # not inside Ray Train: a test that runs one rank in its own process
        return 0, 1, 1


def _device() -> "torch.device":
    import torch

    if not torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return torch.device("cpu")
    import ray.train.torch

    check_allocator(os.environ)
    return ray.train.torch.get_device()


def _gpu_memory(device: "torch.device") -> dict[str, float]:
    """GiB in the step that ended: this process's peak, what it holds in reserve, and what all processes use now."""
    if device.type != "cuda":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(device)
    sizes = {
        "gpu_gib/peak": torch.cuda.max_memory_allocated(device),
        "gpu_gib/reserved": torch.cuda.memory_reserved(device),
        "gpu_gib/all": total - free,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return {name: size / 2**30 for name, size in sizes.items()}


def agree(problem: str) -> str:
    """See `checkpoint.Agree`."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return problem
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def _report_to_ray(step: int, figures: Mapping[str, float]) -> None:
    import ray.train

    try:
        ray.train.report({"step": step, **figures})
    except RuntimeError:
        return  # not inside Ray Train
