"""What every train worker does, whatever it trains: set up, resume from the last checkpoint, step, report, stop.

Ray Train starts one `TrainWorker` per rank, and all of them again when one dies; a worker then finds the newest
finished checkpoint itself. On a CPU a resumed run computes bit for bit what an uninterrupted one does.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gubs.artifacts import Run
from gubs.records import Task
from gubs.ufm.checkpoint import POLICY, Checkpoints, SharedError, of_the_disk, save_policy, together
from gubs.ufm.inputs import Inputs
from gubs.ufm.model import cpu_threads
from gubs.ufm.monitor import STUCK, Monitor, Phases, Watchdog
from gubs.ufm.questions import Questions
from gubs.ufm.settings import CheckpointSettings, UFMSettings
from gubs.ufm.trainer import most

CHECKPOINTS, SETTINGS = "checkpoints", "settings.json"


class DivergedError(SharedError):
    """Loss or gradients were not numbers several steps in a row."""

    exit_code = 8


@dataclass(frozen=True)
class Job:
    """Everything a worker has to know; travels from the driver."""

    run_uri: str
    ufm: UFMSettings
    seed: int
    settings: Mapping[str, Any]
    """All settings of the run, for the record."""
    stage: str
    folder: str
    """Local folder of the training run's files (metrics, samples, checkpoints)."""
    start: str
    """Checkpoint folder to start from."""
    recipe: Mapping[str, str]
    """Fingerprints that a checkpoint has to have."""
    tastes: bool = False
    """Prompts show what the stage `profiles` wrote."""
    tasks: tuple[Task, ...] = ()

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints."""
        return str(Path(self.folder) / CHECKPOINTS)


class TrainWorker:
    """One rank. Subclasses say what a step is."""

    trainer: Any

    def __init__(self, job: Job, steps: int):
        """Sets up device, threads, inputs and sinks.

        Args:
            job: see `Job`.
            steps: optimiser steps of the whole run.
        """
        import torch

        self.job, self.steps, self.ufm = job, steps, job.ufm
        self.rank, self.world, self.local_world = _ranks()
        self.device = _device()
        self.threads = cpu_threads(self.local_world, self.ufm.workers.threads)
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        torch.manual_seed(job.seed)
        self.folder = Path(job.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            (self.folder / STUCK).unlink(missing_ok=True)  # of an attempt before this one
        self.phases = Phases()
        self._watchdog = Watchdog(self.phases, self.ufm.workers.stuck_after_s, self.folder, self.rank)
        self.questions = Questions(Run(job.run_uri), job.ufm.inputs, tastes=job.tastes)
        self.vision = self.ufm.inputs.vision and self.questions.pictures
        self.launch()
        self.inputs = Inputs(job.start, self.ufm.inputs)
        plan = self.checkpointing
        self.checkpoints = Checkpoints(job.checkpoints, job.recipe, plan.keep, self.rank, self.world)
        trackers = self.ufm.grpo.trackers
        self.monitor = Monitor(self.folder, job.stage, trackers, job.settings, self.rank)
        self._bad = 0
        self._ended = 0.0
        self._scores: list[float] = []

    @property
    def checkpointing(self) -> CheckpointSettings:
        """When to write checkpoints."""
        return self.ufm.grpo.checkpoint

    def launch(self) -> None:
        """Called before anything is loaded: starts what comes up in a process of its own meanwhile."""

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns its figures."""
        raise NotImplementedError

    def begin(self, step: int) -> None:
        """Called before the first step of this attempt, after a checkpoint was loaded."""

    def end(self) -> None:
        """Called after the last step."""

    def run(self) -> dict[str, Any]:
        """All steps that are left. Errors that every rank raises at once (`SharedError`) are returned: trying again
        with the same input would not help. What one rank alone meets is raised, and Ray Train ends the others.
        """
        try:
            with self.phases("resume"):
                first = self._resume()
            self.begin(first)
            self.phases.take()  # the start is in no step's seconds
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
        """This worker's node, and its own GPU's id (none on a CPU)."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", []) if self.device.type == "cuda" else []
        return context.get_node_id(), gpus

    def skipped(self, step: int, skipped: bool, batch: Sequence[Mapping[str, Any]]) -> None:
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
        """A step with its seconds by phase, and tokens of all workers by second. The seconds of a checkpoint and of a
        report are those of the ones since the step before; `since_last` are all from that one's end.
        """
        import time

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
            SharedError: it is damaged, or of another training, or not all ranks see the same one.
        """
        marker = together(self.checkpoints.latest, agree)
        done = marker.step if marker else 0
        if most(done, self.device) != -most(-done, self.device):
            raise SharedError(f"the workers do not see the same checkpoints: {self.job.checkpoints} is not shared")
        if marker:
            import torch

            place = self.checkpoints.place(marker.step)
            self.trainer.load(place / "state")
            _set_rng_states(torch.load(place / f"rng-{self.rank}.pt", weights_only=True), self.device)
        self.monitor.forget_after(done - 1)
        return done

    def _maybe_checkpoint(self, step: int, figures: Mapping[str, float]) -> None:
        if "reward_raw/T" in figures:
            self._scores.append(figures["reward_raw/T"])
        if (step + 1) % self.checkpointing.every and step + 1 < self.steps:
            return
        score = sum(self._scores) / len(self._scores) if self._scores else None
        self._scores = []
        with self.phases("checkpoint"):
            self.checkpoints.write(step + 1, self._save, agree=agree, score=score)

    def _save(self, folder: Path) -> None:
        import torch

        self.trainer.save(folder / "state")
        torch.save(_rng_states(self.device), folder / f"rng-{self.rank}.pt")
        if self.rank == 0:
            (folder / SETTINGS).write_text(json.dumps(dict(self.job.settings), indent=1))
            save_policy(self.trainer.model, self.inputs, folder / POLICY)

    def _save_final(self) -> None:
        def write() -> None:
            if self.rank:
                return
            try:
                save_policy(self.trainer.model, self.inputs, self.folder / POLICY)
            except Exception as e:
                if not of_the_disk(e, self.folder):
                    raise
                raise SharedError(f"cannot write the policy {self.folder / POLICY}: {e}; checkpoints are whole") from e

        with self.phases("policy"):
            together(write, agree)


def _rng_states(device: Any) -> dict[str, Any]:
    """Of torch's generators, by kind of device."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_rng_states(states: Mapping[str, Any], device: Any) -> None:
    import torch

    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _ranks() -> tuple[int, int, int]:
    """Rank, ranks, ranks on this machine."""
    import ray.train

    try:
        context = ray.train.get_context()
        return context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
    except RuntimeError:  # not inside Ray Train: a test that runs one rank in its own process
        return 0, 1, 1


def _device() -> Any:
    import torch

    if not torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return torch.device("cpu")
    import ray.train.torch

    return ray.train.torch.get_device()


def _gpu_memory(device: Any) -> dict[str, float]:
    """GiB of the step that ended: this process's peak, what it keeps in reserve, and what all processes have now."""
    if device.type != "cuda":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(device)
    found = {
        "gpu_gib/peak": torch.cuda.max_memory_allocated(device),
        "gpu_gib/reserved": torch.cuda.memory_reserved(device),
        "gpu_gib/all": total - free,
    }
    torch.cuda.reset_peak_memory_stats(device)
    return {name: size / 2**30 for name, size in found.items()}


def agree(problem: str) -> str:
    """See `checkpoint.Agree`."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return problem
    problems: list[Any] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), "")


def _report_to_ray(step: int, figures: Mapping[str, float]) -> None:
    import ray.train

    try:
        ray.train.report({"step": step, **figures})
    except RuntimeError:
        return  # not inside Ray Train
