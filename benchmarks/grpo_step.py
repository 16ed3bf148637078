"""What a GRPO step costs: against TRL's trainer, by phase, against vLLM alone, and by batch, length and workers.

Both trainers get the same model, the same text prompts in the same order, the same number of completions, and answers
of exactly the same length; both use all cores. TRL runs its usual way on a CPU, with transformers' generation. `small`
is in bfloat16 where the CPU has it (see `cpu_dtype`), else in float32, for all of them. TRL is needed for this
benchmark only: `pip install --target DIR --no-deps trl accelerate datasets dill multiprocess xxhash`.

    python benchmarks/grpo_step.py --trl DIR --work /tmp/grpo-step --json out.json
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gubs.llm.embedded import cpu_dtype

SIZES = {
    "tiny": ["ufm.model.size=tiny", "ufm.model.lessons=0"],
    "small": ["ufm.model.size=small", f"ufm.model.dtype={cpu_dtype()}"],
}
COMMON = [
    "ufm.grpo.groups=false",
    "ufm.grpo.start=base",
    "ufm.grpo.tasks=[sequential]",
    "ufm.inputs.vision=false",
    "ufm.grpo.checkpoint.every=100000",  # neither trainer writes any: its size and interval are a matter of taste
    "ufm.grpo.micro_tokens=4096",
    "teachers.profile_users=1",
]
PHASES = ("rollout", "reward", "reference", "train", "sync", "checkpoint", "waiting_for_data")
SAMPLES = 6
"""Completions per prompt."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--trl", type=Path, help="folder that TRL was installed to; none = without TRL")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=6, help="steps measured; two more come first")
    parser.add_argument("--rounds", type=int, default=3, help="times that ours and the others are measured in turns")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--no-table", action="store_true", help="leave out batch, length and workers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trl-worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--offline-worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl_worker:
        run_trl(json.loads(args.trl_worker.read_text()))
        return
    if args.offline_worker:
        run_offline(json.loads(args.offline_worker.read_text()))
        return
    results: dict[str, Any] = {"small's dtype": cpu_dtype(), "threads": os.cpu_count()}
    results |= {size: compare(args, size) for size in args.sizes}
    if not args.no_table:
        results["pictures"] = pictures(args)
        results["scaling"] = scaling(args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def compare(args: argparse.Namespace, size: str) -> dict[str, Any]:
    """Our step, TRL's step and vLLM alone, for one model, in turns: a shared machine's speed changes by the minute."""
    settings = _overrides(size, args.prompts, args.tokens, args.steps + 2)
    spec = _spec(args, settings, size)
    rounds: list[dict[str, Any]] = []
    alone = [_worker("--offline-worker", spec, {})["tokens_per_second"]]
    for _ in range(args.rounds):
        ours = measure(args, settings, f"{size}-{args.prompts}x{args.tokens}")
        alone.append(_worker("--offline-worker", spec, {})["tokens_per_second"])
        figures: dict[str, Any] = {"ours": ours, "vllm_offline_tokens_per_second": alone[-2:]}
        figures["rollout_to_offline"] = ours["rollout_tokens_per_second"] / statistics.fmean(alone[-2:])
        if args.trl:
            figures["trl"] = _worker("--trl-worker", spec, {"PYTHONPATH": str(args.trl)})
            figures["faster"] = figures["trl"]["per_completion"] / ours["per_completion"]
        rounds.append(figures)
        _print_round(size, figures)
    names = ("rollout_to_offline", "faster") if args.trl else ("rollout_to_offline",)
    medians = {name: statistics.median(r[name] for r in rounds) for name in names}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in medians.items())
    print(f"{size}: median of {len(rounds)} round(s): {shown}", flush=True)
    return {"rounds": rounds, "median": medians}


def _print_round(size: str, result: dict[str, Any]) -> None:
    ours, trl = result["ours"], result.get("trl")
    shares = ", ".join(f"{p} {100 * ours['share'][p]:.1f} %" for p in PHASES if ours["share"][p] > 0.001)
    before, after = result["vllm_offline_tokens_per_second"]
    print(f"{size}: {_cost(ours)}; {shares}")
    print(
        f"{size}: rollout {ours['rollout_tokens_per_second']:.0f} tokens/s, {result['rollout_to_offline']:.2f} of vLLM "
        f"alone ({before:.0f} before, {after:.0f} after)"
    )
    print(f"{size}: {100 * ours['prefix_reuse']:.0f} % of prompt tokens from the prefix cache", flush=True)
    if trl:
        print(f"{size}: TRL {trl['version']} {_cost(trl)}: ours is {result['faster']:.2f} x as fast", flush=True)


def _cost(figures: dict[str, Any]) -> str:
    each = f"{figures['per_completion'] * 1e3:.1f} ms per completion of {figures['tokens']:.1f} tokens"
    return f"{figures['step']:.2f} s per step, {each}"


def pictures(args: argparse.Namespace) -> dict[str, Any]:
    """A group-aware step with frames: how often the engine finds prompt and pictures in its caches."""
    settings = [
        *_overrides("tiny", args.prompts, args.tokens, args.steps + 2),
        "ufm.grpo.groups=true",
        "ufm.inputs.vision=true",
    ]
    row = measure(args, settings, "tiny-pictures")
    reuse = f"{100 * row['prefix_reuse']:.0f} % of prompt tokens, {100 * row['picture_reuse']:.0f} % of clips reused"
    print(f"tiny, group-aware, with frames: {_cost(row)}; {reuse}", flush=True)
    return row


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cost by batch, by response length, and by workers, at size tiny."""
    rows = []
    sizes = [(4, 64, 1), (8, 64, 1), (16, 64, 1), (8, 32, 1), (8, 128, 1), (8, 64, 2)]
    for prompts, tokens, workers in sizes:
        settings = [
            *_overrides("tiny", prompts, tokens, args.steps + 2),
            f"ufm.workers.count={workers}",
            "ufm.rollout.kv_cache_gb=0.25",
        ]
        row = measure(args, settings, f"tiny-{prompts}x{tokens}-{workers}")
        rows.append({"prompts": prompts, "tokens": tokens, "workers": workers, **row})
        print(
            f"tiny: {prompts:>2} prompts x {SAMPLES}, {tokens:>3} tokens, {workers} worker(s): {row['step']:.2f} s per "
            f"step, {row['per_completion'] * 1e3:.1f} ms per completion, sync {100 * row['share']['sync']:.1f} %",
            flush=True,
        )
    return rows


def measure(args: argparse.Namespace, settings: list[str], name: str) -> dict[str, Any]:
    """A real training of some steps under Ray Train; medians without the first two."""
    import numpy as np

    from gubs.artifacts import Run
    from gubs.config import load_settings
    from gubs.stages import GRPO, make, named

    run, loaded = Run(args.work / "run"), load_settings("tiny", settings)
    make([named(GRPO, f"grpo-{name}", loaded)], run, loaded, force=True)
    steps = run.artifact(f"grpo-{name}").table("steps").slice(2)
    column = {n: steps[n].to_numpy() for n in steps.column_names}
    step = float(np.median(column["seconds/since_last"]))  # as TRL's: from one step's end to the next one's
    completions = loaded.ufm.grpo.prompts * SAMPLES
    tokens = float(np.mean(column["response_tokens"]))
    seconds = {p: float(np.median(column.get(f"seconds/{p}", np.zeros(1)))) for p in PHASES}
    return {
        "step": step,
        "per_completion": step / completions,
        "tokens": tokens,
        "seconds": seconds,
        "share": {p: s / step for p, s in seconds.items()},
        "rollout_tokens_per_second": completions * tokens / seconds["rollout"],
        "prefix_reuse": float(np.mean(column["engine/prefix_reuse"])),
        "picture_reuse": float(np.mean(column["engine/picture_reuse"])),
    }


def run_offline(spec: dict[str, Any]) -> None:
    """Only vLLM, in this process: its offline API with its own defaults, the same requests in one call per step."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
    from vllm import LLM, SamplingParams

    longest = max(len(p["ids"]) for step in spec["steps"] for p in step) + spec["tokens"]
    llm = LLM(
        spec["model"],
        dtype=spec["dtype"],
        max_model_len=longest,
        enforce_eager=True,  # as ours: compiling takes minutes on a CPU
        limit_mm_per_prompt={"image": 0, "video": 0},
        disable_log_stats=True,
    )
    heat = {"temperature": 1.0, "min_tokens": spec["tokens"], "max_tokens": spec["tokens"], "logprobs": 0}
    rates = []
    for number, prompts in enumerate(spec["steps"]):
        asked: Any = [{"prompt_token_ids": p["ids"]} for p in prompts for _ in range(SAMPLES)]
        heats = [SamplingParams(**heat, seed=1000 * number + i) for i in range(len(asked))]
        began = time.perf_counter()
        answers = llm.generate(asked, heats, use_tqdm=False)
        rates.append(sum(len(a.outputs[0].token_ids) for a in answers) / (time.perf_counter() - began))
    print(json.dumps({"tokens_per_second": statistics.median(rates[2:])}))


def run_trl(spec: dict[str, Any]) -> None:
    """TRL's GRPOTrainer, in this process."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    from gubs.config import load_settings

    grpo = load_settings("tiny", spec["settings"]).ufm.grpo
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    rows = [p for step in spec["steps"] for p in step]
    for row in rows:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], "TRL would see another prompt"
    data = Dataset.from_list([{"prompt": r["text"], "gold": r["gold"]} for r in rows])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(spec["model"], dtype=getattr(torch, spec["dtype"]))
    clock, reward = _trl_clock(), _TRLReward(grpo.rewards)
    config = _trl_config(spec, grpo)
    trainer = trl.GRPOTrainer(model, reward, config, data, processing_class=tokenizer, callbacks=[clock])
    trainer.ref_model.to(getattr(torch, spec["dtype"]))  # it would load the reference in float32, which is slower
    trainer.train()
    step = statistics.median(b - a for a, b in list(itertools.pairwise(clock.ends))[2:])
    figures = {"step": step, "per_completion": step / (spec["prompts"] * SAMPLES), "micro": spec["micro"]}
    print(json.dumps({**figures, "tokens": statistics.fmean(reward.lengths), "version": trl.__version__}))


class _TRLReward:
    """Our reward in the form that TRL calls; notes how long the completions were."""

    __name__ = "reward"  # TRL names its columns by it

    def __init__(self, parts: Any):
        self.parts = parts
        self.lengths: list[int] = []

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], gold: list[str], **_: Any
    ) -> list[float]:
        from gubs.records import Option, Task
        from gubs.ufm.rewards import reward_answer

        self.lengths.extend(len(ids) for ids in completion_ids)
        judged = [
            reward_answer(text, Option(g), Task.SEQUENTIAL, self.parts, finished=True)[0]
            for text, g in zip(completions, gold, strict=True)
        ]
        return [parts.total for parts in judged]


def _trl_clock() -> Any:
    """A callback whose `ends` are the start of the first step and the times at which steps ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not self.ends:
                self.ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    return Clock()


def _trl_config(spec: dict[str, Any], grpo: Any) -> Any:
    """The same step: completions, tokens, rates, loss's KL weight."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=spec["out"],
        use_cpu=True,
        bf16=spec["dtype"] == "bfloat16",
        per_device_train_batch_size=spec["micro"],
        gradient_accumulation_steps=spec["prompts"] * SAMPLES // spec["micro"],
        num_generations=SAMPLES,
        max_completion_length=spec["tokens"],
        generation_kwargs={"min_new_tokens": spec["tokens"]},
        beta=grpo.beta,
        temperature=1.0,
        learning_rate=grpo.optimizer.learning_rate,
        lr_scheduler_type="constant",
        max_steps=len(spec["steps"]),
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10**6,
        disable_tqdm=True,
    )


def _spec(args: argparse.Namespace, settings: list[str], size: str) -> Path:
    """Writes down what our trainer will ask in each step, for the others."""
    from gubs.artifacts import Run
    from gubs.config import load_settings
    from gubs.records import Task
    from gubs.stages import make
    from gubs.ufm import model as models
    from gubs.ufm.held_out import HeldOut
    from gubs.ufm.inputs import Inputs
    from gubs.ufm.questions import Questions
    from gubs.ufm.samples import Planner

    run, loaded = Run(args.work / "run"), load_settings("tiny", settings)
    make(["frames", "labels"], run, loaded)
    folder = models.checkpoint(loaded.ufm.model)
    inputs = Inputs(folder, loaded.ufm.inputs)
    held_out = HeldOut(loaded.ufm.held_out, loaded.seed)
    questions = Questions(run, loaded.ufm.inputs)
    planner = Planner(questions, inputs, [Task.SEQUENTIAL], loaded.ufm.grpo, held_out, loaded.seed)
    steps = []
    for number in range(args.steps + 2):
        firsts = {s.group: s for s in planner.plan(number).samples}
        steps.append(
            [
                {
                    "ids": s.encoded.ids,
                    "text": inputs.processor.tokenizer.decode(s.encoded.ids),
                    "gold": str(s.item.gold),
                }
                for s in firsts.values()
            ]
        )
    spec = {
        "model": str(folder),
        "dtype": loaded.ufm.model.dtype,
        "settings": settings,
        "steps": steps,
        "prompts": args.prompts,
        "tokens": args.tokens,
        "micro": args.prompts * SAMPLES if size == "tiny" else SAMPLES * 2,
        "out": str(args.work / "trl"),
    }
    path = args.work / f"spec-{size}.json"
    path.write_text(json.dumps(spec))
    return path


def _worker(flag: str, spec: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Runs a part of the benchmark in a process of its own; its last line is the result."""
    command = [sys.executable, __file__, "--work", str(spec.parent), flag, str(spec)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise SystemExit(f"{flag} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _overrides(size: str, prompts: int, tokens: int, steps: int) -> list[str]:
    return [
        *COMMON,
        *SIZES[size],
        f"ufm.grpo.prompts={prompts}",
        f"ufm.grpo.steps={steps}",
        f"ufm.inputs.max_new_tokens={tokens}",
        f"ufm.rollout.min_new_tokens={tokens}",
    ]


if __name__ == "__main__":
    main()
