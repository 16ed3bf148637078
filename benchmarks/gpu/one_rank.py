"""A GA-GRPO worker of the 7B on one GPU, as one of four ranks would run it: phases, peaks, MFU, sync, sleep.

    python benchmarks/gpu/one_rank.py --run RUN --model FOLDER --ranks 4 --json out.jsonl

Whole, the 7B's ZeRO-2 state does not fit one GPU of 80 GB (187 GiB). One rank of four keeps a quarter of masters and
moments, and computes everything else whole: so AdamW gets a quarter of the parameters here, and the gradients of the
others are dropped as soon as they are made, as ZeRO-2 drops what other ranks keep. What is missing is NCCL's time.
Advantages are drawn at random, since a random model earns none.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probe import Probe, watched
from results import GpuMemory, Results, peak_flops, speeds
from runs import settings


def main() -> None:
    """Runs the worker in a Ray task with the GPU."""
    import ray

    from gubs.ray_runtime import init_patiently

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="see runs.py")
    parser.add_argument("--model", type=Path, required=True, help="see random_model.py")
    parser.add_argument("--ranks", type=int, default=4, help="number of ranks that would share the optimiser")
    parser.add_argument("--records", type=int, nargs="+", default=[1, 4], help="records of a step; each is measured")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of every answer")
    parser.add_argument("--steps", type=int, default=3, help="steps of each size; the first one does not count")
    parser.add_argument("--profile", type=Path, help="text file for the trainer's kernels in one more step, by time")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args()
    gpu = _has_gpu()
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = f"{here}:{os.environ.get('PYTHONPATH', '')}"
    init_patiently(
        address="local", num_gpus=int(gpu), include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    task: Any = ray.remote(work)
    ray.get(task.options(num_cpus=1, num_gpus=int(gpu), max_retries=0).remote(args, gpu))


def work(args: argparse.Namespace, gpu: bool) -> None:
    """All measurements; each error is written down, and the rest continues where it can."""
    import torch

    from gubs.ufm import grpo, rollout, train_worker
    from gubs.ufm.memory import Architecture, config_of

    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    train_worker._device = lambda: device  # Ray Train, which is asked otherwise, does not run
    rollout.Engine = Probe  # type: ignore[misc]
    _alone(gpu)
    _deal(args.ranks)
    results, memory = Results(args.json), GpuMemory() if gpu else None
    with tempfile.TemporaryDirectory() as folder:
        job, worker = _job(args, gpu, folder), None
        with results.measure("start", ranks=args.ranks) as figures:
            worker = grpo.GRPOWorker(job)
            figures["phases_s"] = {name: round(s, 2) for name, s in worker.phases.take().items()}
        if worker is None:
            return  # nothing can be measured without it
        peaks = watched(worker, memory)
        _random_advantages(grpo)
        parameters = Architecture.of(config_of(job.ufm, args.model)).text_parameters
        worker.begin(0)
        number = 0
        for records in args.records:
            with results.measure(f"step of {records} record(s)", ranks=args.ranks) as figures:
                steps = []
                _resize(worker, records)
                for _ in range(args.steps):
                    steps.append(worker._timed(number))
                    number += 1
                figures |= speeds(steps[1:] or steps, parameters, 1, peak_flops())
                figures["health"] = {k: v for k, v in steps[-1].items() if k.startswith("health/")}
                figures["peaks_gib"] = dict(peaks)
                peaks.clear()
        if args.profile:
            with results.measure("profile", records=args.records[0]):
                _resize(worker, args.records[0])  # of more, the profiler takes minutes
                args.profile.write_text(_profile(worker, number))
        _sleeps(worker, results)
        worker.end()


def _profile(worker: Any, number: int) -> str:
    """The kernels of a step of the worker's own process, those with most time first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        worker._timed(number)
    return profiled.key_averages().table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=100)


def _sleeps(worker: Any, results: Results) -> None:
    """Falling asleep, weights into a sleeping engine, and waking for answers: at both of vLLM's levels."""
    import ray

    handle = worker.engine.handle
    for level in (1, 2):
        with results.measure(f"sleep at level {level}") as figures:
            for _ in range(3):
                figures["sleep_s"] = ray.get(handle.timed_sleep.remote(level), timeout=300)
                began = time.perf_counter()
                worker.engine.push(worker.trainer.model)
                figures["wake_and_sync_s"] = time.perf_counter() - began
                figures["wake_cache_s"] = ray.get(handle.timed_wake.remote(), timeout=300)


def _job(args: argparse.Namespace, gpu: bool, folder: str) -> Any:
    from gubs.records import Task
    from gubs.ufm.train_worker import Job

    loaded = settings(
        f"ufm.model.path={args.model}",
        f"ufm.model.dtype={'bfloat16' if gpu else 'float32'}",
        "ufm.workers.count=1",
        f"ufm.workers.gpu={'yes' if gpu else 'no'}",
        "ufm.grpo.prompts=1",
        f"ufm.inputs.max_new_tokens={args.tokens}",
        f"ufm.rollout.min_new_tokens={args.tokens}",
        *args.settings,
    )
    recorded = loaded.model_dump(mode="json")
    start = str(args.model)
    return Job(str(args.run), loaded.ufm, 0, recorded, "grpo", folder, start, {}, False, (Task.SEQUENTIAL,))


def _alone(gpu: bool) -> None:
    """A process group of one rank."""
    import torch.distributed as dist

    from gubs.ray_runtime import free_port

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    place = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("nccl" if gpu else "gloo", init_method=place, rank=0, world_size=1)


def _deal(ranks: int) -> None:
    """AdamW gets every so many of the parameters by size; the gradients of the others are dropped."""
    from gubs.ufm import trainer

    module: Any = trainer
    whole = module._adamw

    def dealt(parameters: Sequence[Any], chosen: Any, gpu: bool) -> Any:
        kept: list[Any] = []
        seen = total = 0
        for p in parameters:
            total += p.numel()
            if not kept or seen * ranks < total - p.numel() / 2:
                kept.append(p)
                seen += p.numel()
            else:
                p.register_post_accumulate_grad_hook(_drop)
        return whole(kept, chosen, gpu)

    module._adamw = dealt


def _drop(parameter: Any) -> None:
    parameter.grad = None


def _random_advantages(grpo: Any) -> None:
    assign, rng = grpo.assign_rewards, random.Random(0)

    def assign_at_random(samples: Sequence[Any], *rest: Any) -> Any:
        result = assign(samples, *rest)
        for sample in samples:
            sample.advantage = rng.choice((-1.0, 1.0))
        return result

    grpo.assign_rewards = assign_at_random


def _resize(worker: Any, records: int) -> None:
    """Steps of so many records from now on."""
    from gubs.ufm.held_out import HeldOut
    from gubs.ufm.samples import Planner

    worker.grpo = worker.grpo.model_copy(update={"prompts": records})
    worker.planner = Planner(
        worker.questions,
        worker.inputs,
        worker.job.tasks,
        worker.grpo,
        HeldOut(worker.ufm.held_out, worker.job.seed),
        worker.job.seed,
    )
    worker._next = None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
