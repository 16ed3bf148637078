"""What can be watched of a training run: phases and their seconds, figures a step, samples of answers, a deadline.

Figures go to `metrics.jsonl` in the run (read by the terminal's progress display), to TensorBoard and other trackers,
to Ray's metrics (dashboard, Prometheus) and to `ray.train.report`. A watchdog ends a process whose phase takes too
long, and says which: nothing waits for ever, and Ray Train starts the workers again from the last checkpoint.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gubs.errors import PlatformError

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
STUCK = "stuck.json"
STUCK_EXIT = 75
"""Exit status of a worker that its watchdog ended."""


class Phases:
    """Seconds by phase of the step that is running; what `Watchdog` looks at."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current: tuple[str, float] | None = None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a phase; phases of the same name add up."""
        began = time.monotonic()
        self.current = (name, began)
        try:
            yield
        finally:
            self.current = None
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


class Watchdog:
    """Ends this process where a phase takes longer than allowed, after naming it in a file and on stderr."""

    def __init__(self, phases: Phases, limit_s: float, folder: Path, rank: int):
        """Starts to watch, in a thread that ends with the process or with `stop`."""
        self._phases, self._limit, self._path, self._rank = phases, limit_s, folder / STUCK, rank
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def stop(self) -> None:
        """Watches no more."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._limit / 4)):
            running = self._phases.current
            if running and time.monotonic() - running[1] > self._limit:
                text = f"worker {self._rank} was stuck in the phase {running[0]!r} for more than {self._limit:g} s"
                self._path.write_text(json.dumps({"rank": self._rank, "phase": running[0], "message": text}))
                print(text, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.stderr)
                os._exit(STUCK_EXIT)


class Monitor:
    """Writes what one rank has to tell; figures and trackers are rank 0's alone."""

    def __init__(self, folder: Path, name: str, trackers: Sequence[str], config: Mapping[str, Any], rank: int):
        """Opens the sinks.

        Args:
            folder: of the training run.
            name: of the run, for trackers and as a tag of Ray's metrics.
            trackers: see `GRPOSettings.trackers`.
            config: settings, noted by trackers.
            rank: of this process.

        Raises:
            PlatformError: a tracker is not installed.
        """
        self.folder, self.name, self.rank = folder, name, rank
        self._gauges: dict[str, Any] = {}
        self._trackers = [_TRACKERS[t](folder, name, config) for t in trackers] if rank == 0 else []

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps that an attempt did after the checkpoint it now goes on from."""
        for name in (METRICS, SAMPLES) if self.rank == 0 else ():
            path = self.folder / name
            if path.exists():
                lines = [x for x in path.read_text().splitlines() if _step_of(x) is not None and _step_of(x) <= step]
                path.write_text("".join(f"{x}\n" for x in lines))

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """One step's figures: to the files, the trackers, and Ray's metrics."""
        if self.rank == 0:
            with (self.folder / METRICS).open("a") as f:
                f.write(json.dumps({"step": step, **{k: _number(v) for k, v in figures.items()}}) + "\n")
            for tracker in self._trackers:
                tracker(step, figures)
        self._gauge(figures)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Answers for people to read, from the one rank that has them."""
        if samples:
            with (self.folder / SAMPLES).open("a") as f:
                f.writelines(json.dumps({"step": step, **s}, ensure_ascii=False) + "\n" for s in samples)

    def _gauge(self, figures: Mapping[str, float]) -> None:
        import ray
        from ray.util.metrics import Gauge

        if not ray.is_initialized():
            return
        for key, value in figures.items():
            if key not in self._gauges:
                name = "gubs_" + "".join(c if c.isalnum() else "_" for c in key).lower()
                self._gauges[key] = Gauge(name, description=f"gubs: {key}", tag_keys=("run", "rank"))
            self._gauges[key].set(float(value), tags={"run": self.name, "rank": str(self.rank)})


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of `metrics.jsonl`, oldest first."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def check_trackers(names: Sequence[str]) -> None:
    """Looks whether trackers are installed, before anything is spent.

    Raises:
        PlatformError: one is not.
    """
    import importlib.util

    for name in names:
        if importlib.util.find_spec(name) is None:
            raise PlatformError(f"ufm.grpo.trackers has {name}, which is not installed: pip install {name}")


def _step_of(line: str) -> Any:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return None  # the line of a process that was killed while writing


def _number(value: float) -> float | None:
    return None if value != value else round(float(value), 6)


def _tensorboard(folder: Path, name: str, config: Mapping[str, Any]) -> Any:  # noqa: ARG001
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None

    def track(step: int, figures: Mapping[str, float]) -> None:
        nonlocal writer
        if writer is None:  # a resumed run does some steps again: what was shown of them goes
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return track


def _wandb(folder: Path, name: str, config: Mapping[str, Any]) -> Any:
    import wandb

    identity = _identity(folder)
    run = wandb.init(project="gubs", name=name, id=identity, dir=str(folder), config=dict(config), resume="allow")
    return lambda step, figures: run.log(dict(figures), step=step)


def _mlflow(folder: Path, name: str, config: Mapping[str, Any]) -> Any:  # noqa: ARG001
    import mlflow

    mlflow.set_experiment("gubs")
    known = folder / "mlflow-run"
    started = mlflow.start_run(run_id=known.read_text()) if known.exists() else mlflow.start_run(run_name=name)
    known.write_text(started.info.run_id)
    return lambda step, figures: mlflow.log_metrics({k.replace("/", "."): v for k, v in figures.items()}, step=step)


def _identity(folder: Path) -> str:
    """One name for all attempts of a training: a resumed one goes on in the same curves."""
    known = folder / "tracker-id"
    if not known.exists():
        known.write_text(uuid.uuid4().hex[:12])
    return known.read_text()


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
