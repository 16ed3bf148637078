"""How far engine and trainer are apart on a checkpoint in a precision, by the health figures that end a run.

Sampled answers to texts, images and videos; the engine's log-probabilities against the trainer's: as training has
them, in float32 (what rounding alone makes), and with positions that count tokens, which is what a bug looks like.

    python benchmarks/precision.py [--size small | --model FOLDER] [--dtype bfloat16] [--json out.json]
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gubs.ufm import model as models
from gubs.ufm.inputs import VISION_MARK, Inputs, Prompt
from gubs.ufm.loss import k3
from gubs.ufm.rollout import Engine, Request, Shape
from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
from gubs.ufm.trainer import logprobs
from gubs.video.clips import Clip

SHAPES = {"text": None, "image": (1, 56, 56), "video": (4, 56, 56), "wide video": (6, 56, 112)}
"""Frames, height, width of what a prompt shows."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; none = one of `--size`, made first, not taught")
    parser.add_argument("--size", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.model or models.init(args.size)
    inputs = Inputs(folder, InputSettings(max_prompt_tokens=512, max_new_tokens=args.tokens))
    model = ModelSettings(dtype=args.dtype, gradient_checkpointing=False)
    engine = Engine(Shape(str(folder), model, inputs.settings, RolloutSettings(kv_cache_gb=0.5)))
    encoded = [inputs.encode(_prompt(kind, k)) for k in range(args.prompts) for kind in SHAPES]
    responses = engine.generate([Request(inputs.for_engine(e), k) for k, e in enumerate(encoded)])
    engine.sleep()
    batch = inputs.collate([(e, r.ids) for e, r in zip(encoded, responses, strict=True)])
    theirs = torch.tensor([p for r in responses for p in r.logprobs])
    ours, wide = _ours(folder, args.dtype, batch), _ours(folder, "float32", batch)
    batch.positions = torch.arange(batch.ids.shape[1]).expand(3, len(batch.ids), -1).clone()
    results = {
        f"engine, trainer, {args.dtype}": _figures(theirs, ours),
        f"trainer, {args.dtype} and float32": _figures(ours, wide),
        "engine, trainer with wrong positions": _figures(theirs, _ours(folder, args.dtype, batch)),
    }
    print(f"{folder.name}: {len(theirs)} tokens, mean log-probability {float(wide.mean()):.2f}")
    for name, figures in results.items():
        print(f"{name:40}" + "".join(f"{k:>10} {v:8.4f}" for k, v in figures.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def _figures(one: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    gap = (one - other).abs()
    return {"mismatch": float(gap.exp().mean()), "drift": float(k3(one, other).mean()), "largest": float(gap.max())}


def _ours(folder: Path, dtype: Any, batch: Any) -> torch.Tensor:
    """The trainer's log-probabilities of the answers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = models.load(folder, ModelSettings(dtype=dtype, gradient_checkpointing=False))
    with torch.no_grad():
        values: torch.Tensor = logprobs(model.to(device), batch.to(device), vision=True).float().cpu()
    return values


def _prompt(kind: str, number: int) -> Prompt:
    shape = SHAPES[kind]
    if shape is None:
        return Prompt(f"Viewer {number} likes cats and long walks.\nSkip? A B C D")
    frames = np.random.default_rng([number, *shape]).integers(0, 256, (*shape, 3), np.uint8)
    clip = Clip(hashlib.sha256(frames.tobytes()).hexdigest()[:16], frames, 33.0 if shape[0] > 1 else 0.0)
    return Prompt(f"Viewer {number} sees this.\n{VISION_MARK}\nSkip? A B C D", clip)


if __name__ == "__main__":
    main()
