"""What can be watched of a training run: seconds per phase, figures per step, samples of answers; and a deadline.

Figures go to `metrics.jsonl` in the run (read by the terminal's progress display), to TensorBoard and other trackers,
to Ray's metrics (dashboard, Prometheus) and to `ray.train.report`. A watchdog ends a process whose phase takes too
long and names the phase: nothing waits forever, and Ray Train restarts the workers from the last checkpoint.
"""

import contextlib
import faulthandler
import importlib.util
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gubs.artifacts import JsonObject
from gubs.errors import PlatformError

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
STUCK = "stuck.json"
STUCK_EXIT = 75
"""Exit status of a worker that its watchdog ended."""
Tracker = Callable[[int, Mapping[str, float]], None]
"""Gets each step and its figures."""


class Phases:
    """Seconds per phase of the current step; `Watchdog` looks at them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current: tuple[str, float] | None = None

    @contextlib.contextmanager
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
    """Ends this process if a phase takes longer than allowed, after naming it in a file and on stderr."""

    def __init__(
        self, phases: Phases, limit_s: float, folder: Path, rank: int, limits: Mapping[str, float] | None = None
    ):
        """Starts watching, in a thread that ends with the process or with `stop`.

        Args:
            phases: what this process does.
            limit_s: longest time that a phase may take.
            folder: of the training run.
            rank: of this process.
            limits: of phases with a limit of their own.
        """
        self._phases, self._path, self._rank = phases, folder / STUCK, rank
        self._limit, self._limits = limit_s, limits or {}
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._limit / 4)):
            running = self._phases.current
            limit = self._limits.get(running[0], self._limit) if running else 0.0
            if running and time.monotonic() - running[1] > limit:
                text = f"worker {self._rank} was stuck in the phase {running[0]!r} for more than {limit:g} s"
                self._path.write_text(json.dumps({"rank": self._rank, "phase": running[0], "message": text}))
                print(text, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.stderr)
                os._exit(STUCK_EXIT)


class Monitor:
    """Writes what one rank reports; only rank 0 writes figures and calls trackers."""

    def __init__(self, folder: Path, name: str, trackers: Sequence[str], config: Mapping[str, object], rank: int):
        """Opens the sinks.

        Args:
            folder: of the training run.
            name: of the run, for trackers and as a tag of Ray's metrics.
            trackers: see `GRPOSettings.trackers`.
            config: settings, recorded by trackers.
            rank: of this process.

        Raises:
            ImportError: a tracker is not installed (see `check_trackers`).
        """
        self.folder, self.name, self.rank = folder, name, rank
        self._gauges: dict[str, Gauge] = {}
        self._trackers = [_TRACKERS[t](folder, name, config) for t in trackers] if rank == 0 else []

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps after the checkpoint that this attempt resumes from."""
        for path in (self.folder / METRICS, self.folder / SAMPLES):
            if self.rank == 0 and path.exists():
                path.write_text("".join(_line(row) for row in _rows(path) if row["step"] <= step))

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes one step's figures to the file, the trackers and Ray's metrics."""
        if self.rank == 0:
            with (self.folder / METRICS).open("a") as f:
                f.write(_line({"step": step, **{k: _number(v) for k, v in figures.items()}}))
            for tracker in self._trackers:
                tracker(step, figures)
        self._gauge(figures)

    def samples(self, step: int, samples: Sequence[JsonObject]) -> None:
        """Writes answers for people to read, from the one rank that has them."""
        if samples:
            with (self.folder / SAMPLES).open("a") as f:
                f.writelines(_line({"step": step, **s}) for s in samples)

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


def read_metrics(folder: Path) -> list[JsonObject]:
    """All complete lines of `metrics.jsonl`, oldest first."""
    return _rows(folder / METRICS)


def check_trackers(names: Sequence[str]) -> None:
    """Checks that trackers are installed, before anything is spent.

    Raises:
        PlatformError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise PlatformError(f"ufm.grpo.trackers has {name}, which is not installed: pip install {name}")


def _line(row: JsonObject) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows(path: Path) -> list[JsonObject]:
    rows = []
    for line in path.read_text().split("\n") if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # a process killed while writing leaves half a line
            rows.append(json.loads(line))
    return rows


def _number(value: float) -> float | None:
    return None if value != value else round(float(value), 6)


def _tensorboard(folder: Path, name: str, config: Mapping[str, object]) -> Tracker:  # noqa: ARG001
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None

    def track(step: int, figures: Mapping[str, float]) -> None:
        nonlocal writer
        if writer is None:  # a resumed run repeats some steps: their earlier figures are removed
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return track


def _wandb(folder: Path, name: str, config: Mapping[str, object]) -> Tracker:
    import wandb

    id_file = folder / "tracker-id"  # one for all attempts: a resumed training continues its curves
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project="gubs", name=name, id=id_file.read_text(), dir=str(folder), config=dict(config), resume="allow"
    )
    return lambda step, figures: run.log(dict(figures), step=step)


def _mlflow(folder: Path, name: str, config: Mapping[str, object]) -> Tracker:  # noqa: ARG001
    import mlflow

    mlflow.set_experiment("gubs")
    id_file = folder / "mlflow-run"
    started = mlflow.start_run(run_id=id_file.read_text()) if id_file.exists() else mlflow.start_run(run_name=name)
    id_file.write_text(started.info.run_id)
    return lambda step, figures: mlflow.log_metrics({k.replace("/", "."): v for k, v in figures.items()}, step=step)


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
