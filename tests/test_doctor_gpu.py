"""What `gubs doctor` says on a machine with GPUs, with a stand-in for CUDA: tensors stay on the CPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

from gubs import doctor, doctor_gpu

A100 = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=80 << 30, major=8, minor=0)
T4 = SimpleNamespace(name="Tesla T4", total_memory=16 << 30, major=7, minor=5)


@pytest.fixture
def machine(monkeypatch):
    """Two A100s with everything in order; tests break parts of it."""
    gpus = [A100, A100]

    def on_cpu(make):
        def made(*args, **named):
            return make(*args, **{k: v for k, v in named.items() if k not in ("device", "pin_memory")})

        return made

    def add_up(tensors):
        total = sum(tensors)
        for tensor in tensors:
            tensor.copy_(total)

    def rms_norm(out, given, weight, eps):
        wide = given.float()
        out.copy_(wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight)

    for name in ("ones", "full", "randn", "empty", "empty_like"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(all_reduce=add_up, version=lambda: (2, 29, 7)))
    monkeypatch.setattr(doctor_gpu, "_driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(doctor_gpu, "_driver_version", lambda: "580.95.05")
    monkeypatch.setattr(doctor_gpu, "_PINNED", 1 << 20)
    monkeypatch.setattr(doctor_gpu, "_SLOW_COPY", 1.0)
    monkeypatch.setattr(doctor_gpu.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 30))
    monkeypatch.setattr(doctor_gpu.os, "environ", {})
    ops = SimpleNamespace(rms_norm=rms_norm)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(_custom_ops=ops))
    platform = SimpleNamespace(is_cuda=lambda: True)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    return SimpleNamespace(gpus=gpus, ops=ops, platform=platform)


def found(name):
    (finding,) = (f for f in doctor_gpu.examine() if f.name == name)
    return finding


def test_a_machine_in_order(machine):
    findings = {f.name: f for f in doctor_gpu.examine()}
    assert [n for n, f in findings.items() if not f.ok] == []
    assert findings["driver"].text == "580.95.05, for CUDA up to 13.0; torch is built for 13.0"
    assert findings["CUDA"].text == "NVIDIA A100-SXM4-80GB 80 GiB, NVIDIA A100-SXM4-80GB 80 GiB"
    assert findings["NCCL"].text == "2.29.7, a sum over 2 GPU(s)"
    assert findings["peer access"].text == "2 of 2 pairs"
    assert findings["shared memory"].text == "64 GiB free in /dev/shm"


def test_a_driver_for_an_older_cuda_is_told(machine, monkeypatch):
    monkeypatch.setattr(doctor_gpu, "_driver_cuda", lambda: (12, 8))
    assert not found("driver").ok
    assert "13 needs 580" in found("driver").remedy


def test_a_gpu_without_bfloat16_is_told(machine):
    machine.gpus[1] = T4
    assert not found("CUDA").ok
    assert found("CUDA").remedy.startswith("GPU 1: bfloat16 needs")


def test_a_wrong_sum_and_a_broken_nccl_are_told(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda.nccl, "all_reduce", lambda tensors: None)
    assert not found("NCCL").ok

    def broken(tensors):
        raise RuntimeError("NCCL Error 2: unhandled system error\nmore")

    monkeypatch.setattr(torch.cuda.nccl, "all_reduce", broken)
    assert found("NCCL").text == "RuntimeError: NCCL Error 2: unhandled system error"
    assert "--ipc=host" in found("NCCL").remedy


def test_vllm_for_cpus_and_a_kernel_that_computes_wrongly_are_told(machine):
    machine.platform.is_cuda = lambda: False
    assert "CPUs" in found("vLLM's kernels").text
    machine.platform.is_cuda = lambda: True
    machine.ops.rms_norm = lambda out, *_: out.zero_()
    assert not found("vLLM's kernels").ok


def test_little_shared_memory_and_slow_copies_are_told(machine, monkeypatch):
    monkeypatch.setattr(doctor_gpu.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    monkeypatch.setattr(doctor_gpu, "_SLOW_COPY", 1e15)
    assert not found("shared memory").ok
    assert "--shm-size" in found("shared memory").remedy
    assert not found("pinned memory").ok


def test_without_peer_access_it_works_slowly(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a == 0)
    assert found("peer access").ok
    assert found("peer access").text.startswith("1 of 2 pairs: gradients of the others go through")
    machine.gpus.pop()
    assert found("peer access").text == "one GPU"


def test_expandable_segments_are_told(machine):
    doctor_gpu.os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    assert not found("allocator").ok
    assert "remove expandable_segments" in found("allocator").remedy


def test_only_where_gpus_work_are_they_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_gpu, "examine", lambda: iter([doctor_gpu.Finding("driver", True, "x")]))
    for works in (True, False):
        monkeypatch.setattr(doctor, "_cuda_works", lambda works=works: works)
        monkeypatch.setattr(doctor, "guarded", lambda name, check, *_: doctor_gpu.Finding(name, True, ""))
        assert ("driver" in [f.name for f in doctor.examine(tmp_path)]) is works
