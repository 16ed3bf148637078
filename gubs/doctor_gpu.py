"""What `gubs doctor` looks at on a machine with NVIDIA GPUs: everything that a training would otherwise fail on later.

Each check does a little of the real thing: a product, a reduction over all GPUs, one of vLLM's kernels, a pinned copy.
"""

import ctypes
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_GIB = 1 << 30
_MIN_SHM_GIB = 8
_MIN_CAPABILITY = (8, 0)
_PINNED = _GIB
_SLOW_COPY = 5e9
"""Bytes per second; PCIe 3 with 16 lanes reaches 12e9."""
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    ok: bool
    text: str
    """The state of the machine."""
    remedy: str = ""
    """What to do if it is not ok."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def guarded(name: str, check: Callable[[], Finding], remedy: str = "make setup") -> Finding:
    """Turns the failure of a package to load or to work into a finding."""
    try:
        return check()
    except (ImportError, OSError, RuntimeError, AssertionError) as e:
        first = next(iter(str(e).splitlines()), "")
        return Finding(name, False, f"{type(e).__name__}: {first[:200]}", remedy)


def examine() -> Iterator[Finding]:
    """The findings of a machine whose GPUs torch can use."""
    yield guarded("driver", driver)
    yield guarded("CUDA", cuda, "see `nvidia-smi` and `dmesg`: the GPU may need a reset, or another process holds it")
    yield guarded("NCCL", nccl, "NCCL_DEBUG=INFO gubs doctor tells more; in Docker: --ipc=host")
    yield guarded(
        "vLLM's kernels", vllm_kernels, "pip install 'gubs[gpu]': vLLM's build for CUDA, not the one for CPUs"
    )
    yield guarded("pinned memory", pinned_memory, "raise the limit of locked memory (ulimit -l unlimited)")
    yield guarded("shared memory", shared_memory)
    yield guarded("peer access", peer_access)
    yield allocator()


def driver() -> Finding:
    """The driver, and whether it is new enough for torch's CUDA."""
    import torch

    supported, built = _driver_cuda(), tuple(int(n) for n in (torch.version.cuda or "0.0").split(".")[:2])
    text = f"{_driver_version()}, for CUDA up to {supported[0]}.{supported[1]}; torch is built for {torch.version.cuda}"
    remedy = f"install a driver for CUDA {built[0]} (13 needs 580 or newer), or a torch for CUDA {supported[0]}"
    return Finding("driver", supported[0] >= built[0], text, remedy)


def cuda() -> Finding:
    """A product in bfloat16 on every GPU."""
    import torch

    names, wrong = [], []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        names.append(f"{properties.name} {properties.total_memory / _GIB:.0f} GiB")
        ones = torch.ones(256, 256, dtype=torch.bfloat16, device=f"cuda:{number}")
        right = bool((ones @ ones == 256).all())
        if not right or (properties.major, properties.minor) < _MIN_CAPABILITY:
            wrong.append(f"GPU {number}" + ("" if right else " computes wrongly"))
    remedy = f"{', '.join(wrong)}: bfloat16 needs compute capability 8.0 (A100 or newer)"
    return Finding("CUDA", not wrong, ", ".join(names), remedy)


def nccl() -> Finding:
    """A sum over all GPUs."""
    import torch

    count = torch.cuda.device_count()
    given = [torch.full((1024,), float(n + 1), device=f"cuda:{n}") for n in range(count)]
    torch.cuda.nccl.all_reduce(given)
    right = all(bool((values == count * (count + 1) / 2).all()) for values in given)
    version = ".".join(str(n) for n in torch.cuda.nccl.version())
    return Finding("NCCL", right, f"{version}, a sum over {count} GPU(s)", "the sum is wrong: see NCCL_DEBUG=INFO")


def vllm_kernels() -> Finding:
    """One of vLLM's compiled kernels, against torch."""
    import torch
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return Finding("vLLM's kernels", False, "vLLM is a build for CPUs", "pip install 'gubs[gpu]'")
    given = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
    weight, out = torch.ones(1024, device="cuda", dtype=torch.bfloat16), torch.empty_like(given)
    _custom_ops.rms_norm(out, given, weight, 1e-6)
    wanted = given.float() * torch.rsqrt(given.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    error = float((out.float() - wanted).norm() / wanted.norm())
    return Finding("vLLM's kernels", error < 1e-2, f"load and compute (error {error:.1e})", "install vLLM again")


def pinned_memory() -> Finding:
    """A GiB of pinned memory, and how fast it is copied to the GPU."""
    import torch

    began = time.perf_counter()
    host = torch.empty(_PINNED, dtype=torch.uint8, pin_memory=True)
    pinned = time.perf_counter() - began
    there = torch.empty_like(host, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    rate = host.nbytes / max(1e-9, time.perf_counter() - began)
    text = f"{_PINNED / _GIB:g} GiB in {pinned:.1f} s, copied at {rate / 1e9:.0f} GB/s"
    return Finding("pinned memory", rate > _SLOW_COPY, text, "slow: see the lanes with `nvidia-smi -q -d PCIE`")


def shared_memory() -> Finding:
    """Room for NCCL, Ray's objects and the loaders of several workers."""
    free = shutil.disk_usage("/dev/shm").free / _GIB
    text, remedy = f"{free:.0f} GiB free in /dev/shm", f"{_MIN_SHM_GIB} GiB are needed; in Docker: --shm-size=32g"
    return Finding("shared memory", free >= _MIN_SHM_GIB, text, remedy)


def peer_access() -> Finding:
    """Which GPUs read each other's memory. Without, NCCL goes through the host: it works, but slowly."""
    import torch

    pairs = list(itertools.permutations(range(torch.cuda.device_count()), 2))
    direct = sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    if not pairs:
        return Finding("peer access", True, "one GPU")
    slow = "" if direct == len(pairs) else ": gradients of the others go through the host's memory, slowly"
    return Finding("peer access", True, f"{direct} of {len(pairs)} pairs{slow}")


def allocator() -> Finding:
    """Whether weights can be handed to the rollout engine."""
    from gubs.errors import PlatformError
    from gubs.ufm.trainer import check_allocator

    try:
        check_allocator(os.environ)
    except PlatformError as e:
        return Finding("allocator", False, "expandable segments", str(e))
    return Finding("allocator", True, "memory can be shared between processes")


def _driver_cuda() -> tuple[int, int]:
    """Latest version of CUDA that the driver supports."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _driver_version() -> str:
    text = _DRIVER_FILE.read_text() if _DRIVER_FILE.exists() else ""
    version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return version.group() if version else "unknown version"
