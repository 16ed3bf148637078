"""SFT and GA-GRPO of the tiny model by the real stages, once on the GPUs and once on the CPU: losses side by side.

    python benchmarks/gpu/end_to_end.py --run RUN --json end.jsonl

Ray Train, DeepSpeed (NCCL on GPUs), sleeping engines, syncs and checkpoints, in float32, so that the losses of SFT can
be compared step by step; GA-GRPO samples other answers on another device: its health figures are what counts.
"""

import argparse
from pathlib import Path
from typing import Any

from results import Results
from runs import WORLD

SETTINGS = [
    *(setting for setting in WORLD if not setting.startswith(("render.", "ufm.grpo.start"))),
    "ufm.model.lessons=0",
    "teachers.sft_views=40",
    "ufm.sft.min_steps=120",
    "ufm.sft.optimizer.learning_rate=0.003",
    "ufm.sft.optimizer.schedule=constant",
    "ufm.sft.optimizer.warmup_steps=0",
    "ufm.grpo.prompts=8",
    "ufm.rollout.kv_cache_gb=0.25",
    "ufm.rollout.gpu_memory=0.2",
]
_SHOWN = ("loss", "grad_norm", "health/mismatch", "health/drift", "health/kl", "seconds/step", "seconds/sync")


def main() -> None:
    """Makes the run's data, trains on each device, writes the figures."""
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; made if it is not there")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="steps of GA-GRPO")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    results = Results(args.json)
    devices = ["cpu", *(["gpu"] if torch.cuda.is_available() else [])]
    losses: dict[str, list[float]] = {}
    for device in devices:
        for stage in ("sft_model", "grpo"):
            with results.measure(f"{stage} on the {device}") as figures:
                steps = train(args, stage, device)
                losses[f"{stage} {device}"] = [s["loss"] for s in steps]
                figures |= {"steps": len(steps), "first": shown(steps[0]), "last": shown(steps[-1])}
    if "gpu" in devices:
        with results.measure("SFT's losses, GPU against CPU") as figures:
            pairs = zip(losses["sft_model gpu"], losses["sft_model cpu"], strict=True)
            figures["largest_difference"] = max(abs(a - b) for a, b in pairs)


def train(args: argparse.Namespace, stage: str, device: str) -> list[dict[str, Any]]:
    """The figures of a training's steps. Both devices have a run of their own, of the same data."""
    from gubs.artifacts import Run
    from gubs.config import load_settings
    from gubs.stages import make

    workers = [f"ufm.workers.gpu={'yes' if device == 'gpu' else 'no'}", f"ufm.workers.count={args.gpus}"]
    settings = load_settings("tiny", [*SETTINGS, *workers, f"ufm.grpo.steps={args.steps}"])
    run = Run(args.run / device)
    make([stage], run, settings)
    steps: list[dict[str, Any]] = run.artifact(stage).table("steps").to_pylist()
    return steps


def shown(step: dict[str, Any]) -> dict[str, float]:
    """The figures of a step that are written down."""
    return {name: step[name] for name in _SHOWN if step.get(name) is not None}


if __name__ == "__main__":
    main()
