"""GA-GRPO steps of a model on all GPUs of a machine, by the real stage: Ray Train, DeepSpeed on NCCL, sleeping engines.

    python benchmarks/gpu/training.py --run RUN --model FOLDER --gpus 4 --json out.jsonl

Ratios over steps: seconds by phase, tokens per second and GPU, MFU of training, share of the sync, peaks. The training
ends with a checkpoint and the policy, as every one does; `gubs plan` says how much disk they take.
"""

import argparse
from pathlib import Path

from results import Results, peak_flops, speeds
from runs import settings


def main() -> None:
    """Trains and measures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="see runs.py")
    parser.add_argument("--model", type=Path, required=True, help="a released Qwen2.5-VL, or see random_model.py")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=0, help="records per step; 0 = one for each GPU")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of every answer")
    parser.add_argument("--steps", type=int, default=6, help="steps measured; two more come first")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args()
    results = Results(args.json)
    with results.measure("training", gpus=args.gpus, model=args.model.name) as figures:
        figures |= measure(args)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Medians without the first two steps: in them Adam's moments are made and kernels are compiled."""
    from gubs.artifacts import Run
    from gubs.stages import GRPO, make, named
    from gubs.ufm.memory import Architecture, config_of

    loaded = settings(
        f"ufm.model.path={args.model}",
        f"ufm.workers.count={args.gpus}",
        f"ufm.grpo.prompts={args.prompts or args.gpus}",
        f"ufm.grpo.steps={args.steps + 2}",
        f"ufm.inputs.max_new_tokens={args.tokens}",
        f"ufm.rollout.min_new_tokens={args.tokens}",
        "ufm.grpo.checkpoint.every=100000",
        "ufm.grpo.checkpoint.keep=1",
        *args.settings,
    )
    run = Run(args.run)
    make([named(GRPO, "grpo-speed", loaded)], run, loaded, force=True)
    steps = run.artifact("grpo-speed").table("steps").slice(2).to_pylist()
    parameters = Architecture.of(config_of(loaded.ufm)).text_parameters
    return speeds(steps, parameters, args.gpus, peak_flops())


if __name__ == "__main__":
    main()
