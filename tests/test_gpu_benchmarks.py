"""The GPU benchmarks, as far as they go without one: ratios, the table, and that a failure does not end the rest."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py"))


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_every_script_can_be_imported():
    """They follow the package's names: one that was renamed would be found on a GPU only."""
    assert len(SCRIPTS) == 11
    for name in SCRIPTS:
        assert importlib.import_module(name).__doc__


def test_ratios_of_a_training():
    """Two GPUs, 7 B parameters, 10 k tokens computed in 2 s: 6 x 7e9 x 1e4 / 2 / 1e15 / 2 of the peak."""
    step = {
        "seconds/step": 4.0,
        "seconds/train": 2.0,
        "seconds/rollout": 1.0,
        "seconds/reference": 0.5,
        "seconds/sync": 0.2,
        "tokens/train": 10_000.0,
        "tokens/sequences": 24_000.0,
        "tokens/rollout": 3000.0,
        "gpu_gib/peak": 41.0,
    }
    slow = {**step, "seconds/step": 400.0, "gpu_gib/peak": 44.0}
    found = importlib.import_module("results").speeds([step, slow, step], 7 * 10**9, 2, 1e15)
    assert found["mfu_train"] == pytest.approx(0.105)
    assert found["tokens_per_second_per_gpu"] == 3000.0
    assert found["rollout_tokens_per_second_per_gpu"] == 1500.0
    assert found["sync_share"] == pytest.approx(0.05)
    assert found["peak_gib_trainer"] == 44.0, "peaks are the largest, not the median"


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("Unknown", 1e12)]
)
def test_peaks_by_the_gpus_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert importlib.import_module("results").peak_flops() == peak


def test_what_fails_is_written_down_and_the_rest_goes_on(tmp_path, capsys):
    results = importlib.import_module("results").Results(tmp_path / "out.jsonl")
    with results.measure("first", gpus=2):
        raise RuntimeError("out of memory")
    with results.measure("second") as found:
        found["requests_per_second"] = 21.5
    machine, first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert machine["gpus"]
    assert (first["ok"], first["error"], first["gpus"]) == (False, "RuntimeError: out of memory", 2)
    assert (second["ok"], second["requests_per_second"]) == (True, 21.5)


def test_the_table_names_hardware_and_failures(tmp_path):
    rows = [
        {"name": "machine", "at": 0.0, "gpus": ["NVIDIA A100-SXM4-80GB"] * 4, "date": "2026-11-26"},
        {"name": "training", "at": 9.0, "ok": True, "step_s": 12.345, "requests": 5120, "peaks_gib": {"train": 61.5}},
        {"name": "sleep at level 2", "at": 9.5, "ok": False, "error": "RuntimeError: x", "seconds": 1.0},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(importlib.import_module("table").table([tmp_path / "a.jsonl"])) == [
        "| what | on | figures |",
        "|---|---|---|",
        "| training | 4 x NVIDIA A100-SXM4-80GB, 2026-11-26 | step s 12.3, requests 5,120, peaks gib: train 61.5 |",
        "| sleep at level 2 | 4 x NVIDIA A100-SXM4-80GB, 2026-11-26 | FAILED: RuntimeError: x |",
    ]


def test_the_optimizer_of_one_rank_gets_its_share(monkeypatch):
    """The others' gradients are dropped as soon as they are made, as ZeRO-2 drops what other ranks keep."""
    from gubs.ufm import trainer

    monkeypatch.setattr(trainer, "_adamw", lambda parameters, settings, gpu: list(parameters))
    importlib.import_module("one_rank")._deal(4)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(16)))
    kept = trainer._adamw(list(model.parameters()), SimpleNamespace(), False)
    assert len(kept) == 4
    model(torch.ones(1, 8)).sum().backward()
    assert [p.grad is not None for p in model.parameters()] == [any(p is k for k in kept) for p in model.parameters()]
