"""The worker with a look inside: an engine with a clock on its sleep, and peaks of memory by phase.

A module of its own, so that Ray's processes find its classes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from results import GIB, GpuMemory

from gubs.ufm.rollout import Engine


class Probe(Engine):
    """The engine, with a clock on its sleep."""

    def timed_sleep(self, level: int) -> float:
        """Seconds that it takes to fall asleep at a level."""
        self.wake()
        began = time.perf_counter()
        self._llm.sleep(level=level)
        self._asleep, self._discarded = ("weights", "kv_cache"), level > 1
        return time.perf_counter() - began

    def timed_wake(self) -> float:
        """Seconds that it takes to wake up."""
        began = time.perf_counter()
        self.wake()
        return time.perf_counter() - began


def watched(worker: Any, memory: GpuMemory | None) -> dict[str, float]:
    """Peaks by phase from now on, GiB: of all processes, and of the trainer alone."""
    import torch

    peaks: dict[str, float] = {}
    phases = worker.phases

    class Watched(type(phases)):  # type: ignore[misc]
        @contextmanager
        def __call__(self, name: str) -> Iterator[None]:
            if memory:
                memory.peak()
                torch.cuda.reset_peak_memory_stats()
            with super().__call__(name):
                yield
                if memory:
                    torch.cuda.synchronize()
            if memory:
                own = round(torch.cuda.max_memory_allocated() / GIB, 2)
                peaks[name] = max(peaks.get(name, 0.0), memory.peak())
                peaks[f"{name}, trainer"] = max(peaks.get(f"{name}, trainer", 0.0), own)

    phases.__class__ = Watched
    return peaks
