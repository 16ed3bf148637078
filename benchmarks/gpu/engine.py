"""An engine beside a trainer's model on one GPU: do both compute the same, before and after syncs, awake and asleep?

    python benchmarks/gpu/engine.py --json engine.jsonl

The tiny model with loud random weights, whose answers depend on every token and picture; text, image and video in one
batch. Written down are the health figures that end a training when they are out of bounds, and seconds of sync and
sleep. `tests/ufm/test_ufm_parity.py` checks more of it, and needs pytest.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import GpuMemory, Results

_TEXT = 'Playing.\nUser: {"age": 30}\n- {"title": "Rare health sleep"}\n' * 3
_SHAPES = {"image": (1, 56, 56, 0.0), "video": (4, 56, 56, 10.0), "long wide video": (6, 56, 112, 33.0)}
"""Frames, height, width, seconds."""


def main() -> None:
    """Measures one precision after the other."""
    import ray
    import torch

    from gubs.ray_runtime import init_patiently

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    gpu, results = torch.cuda.is_available(), Results(args.json)
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    init_patiently(address="local", num_gpus=int(gpu), **options)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in args.dtypes:
            with results.measure(f"{dtype}: the whole"):
                compare(dtype, loud(Path(folder) / dtype, dtype), gpu, results)
    ray.shutdown()


def loud(folder: Path, dtype: str) -> Path:
    """A checkpoint of the tiny model with random weights three times as large as usual."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    from gubs.ufm.checkpoint import save_policy
    from gubs.ufm.inputs import Inputs
    from gubs.ufm.model import init
    from gubs.ufm.settings import InputSettings

    tiny = init("tiny")
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(tiny)).float()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    save_policy(model.to(getattr(torch, dtype)), Inputs(tiny, InputSettings()), folder)
    shutil.copy(tiny / "generation_config.json", folder)
    return folder


def compare(dtype: str, folder: Path, gpu: bool, results: Results) -> None:
    """All measurements of one precision."""
    import ray

    from gubs.ufm.inputs import Inputs
    from gubs.ufm.model import load
    from gubs.ufm.rollout import Request, Shape, start_rollout
    from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
    from gubs.ufm.sync import WeightSync

    inputs = Inputs(folder, InputSettings(max_prompt_tokens=512, max_new_tokens=24))
    settings = ModelSettings(dtype=dtype, gradient_checkpointing=False)
    rollout = RolloutSettings(gpu_memory=0.15, max_num_seqs=16, kv_cache_gb=0.1)
    model: Any = load(folder, settings)
    model.to("cuda" if gpu else "cpu")
    threads = max(1, (os.cpu_count() or 2) // 2)
    shape = Shape(str(folder), settings, inputs.settings, rollout, threads)
    handle, memory = start_rollout(shape, gpu_ids=("0",) if gpu else ()), GpuMemory()
    with results.measure(f"{dtype}: engine starts") as figures:
        ray.get(handle.ready.remote(), timeout=600)
        figures["peak_gib"] = memory.peak()
    encoded = [inputs.encode(p) for p in prompts()]

    def ask(seed: int) -> list[Any]:
        asked = [Request(inputs.for_engine(e), seed + n) for n, e in enumerate(encoded)]
        answers: list[Any] = ray.get(handle.generate.remote(asked), timeout=300)
        return answers

    gaps: Callable[[Any], dict[str, Any]] = lambda responses: apart(model, inputs, encoded, responses, dtype)  # noqa: E731
    with results.measure(f"{dtype}: log-probabilities, engine against trainer") as figures:
        responses = ask(0)
        figures |= gaps(responses)
    sync = WeightSync(model, handle, 300.0, version=responses[0].version)
    for number, state in enumerate(("awake", "asleep", "asleep again")):
        with results.measure(f"{dtype}: new weights into an engine {state}") as figures:
            began = time.perf_counter()
            if number:
                ray.get(handle.sleep.remote(), timeout=300)
            figures["sleep_s"] = time.perf_counter() - began
            memory.peak()
            figures["asleep_gib"] = memory.peak()
            move(model, number)
            began = time.perf_counter()
            sync.push(model)
            figures["sync_s"] = time.perf_counter() - began
            figures |= gaps(ask(10 * number))
    ray.kill(handle)


def prompts() -> list[Any]:
    """A text, an image, two videos; random pictures."""
    from gubs.ufm.inputs import VISION_MARK, Prompt
    from gubs.video.clips import Clip

    made = [Prompt(f"{_TEXT}\nSkip? A B C D")]
    for name, (frames, height, width, seconds) in _SHAPES.items():
        pictures = np.random.default_rng(len(made)).integers(0, 256, (frames, height, width, 3), np.uint8)
        made.append(Prompt(f"{_TEXT}\n{VISION_MARK}\nSkip? A B C D", Clip(name, pictures, seconds)))
    return made


def apart(model: Any, inputs: Any, encoded: Sequence[Any], responses: Sequence[Any], dtype: str) -> dict[str, Any]:
    """Mean of exp|gap| and KL over the answers' tokens, the largest gap, and what the health check says."""
    import torch

    from gubs.ufm.health import alarm
    from gubs.ufm.loss import k3
    from gubs.ufm.trainer import logprobs

    batch = inputs.collate([(e, r.ids) for e, r in zip(encoded, responses, strict=True)])
    with torch.no_grad():
        ours = logprobs(model, batch.to(model.device), vision=True).float().cpu()
    theirs = torch.tensor([p for r in responses for p in r.logprobs])
    gap = (ours - theirs).abs()
    figures = {"health/mismatch": float(gap.exp().mean()), "health/drift": float(k3(theirs, ours).mean())}
    return {**figures, "largest_gap": float(gap.max()), "out_of_bounds": alarm(figures, dtype) or "nothing"}


def move(model: Any, seed: int) -> None:
    """Changes all weights a little."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(weight))


if __name__ == "__main__":
    main()
