"""One rank of the trainer's tests, a process of its own: `trainer_ranks.py RANK WORLD RENDEZVOUS OUT CHECKPOINT`.

Runs every scenario with real DeepSpeed and gloo, and saves what came of it: gradients, weights, figures.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
if __name__ == "__main__":  # the tests import this module too, and other tests look at GPUs
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np
import torch
from ufm_helpers import image_prompt, text_prompt, tiny_inputs, video_prompt

from gubs.records import Option, Task
from gubs.ufm.advantage import SampleRole
from gubs.ufm.checkpoint import save_policy
from gubs.ufm.grpo import GRPOWorker, Reference
from gubs.ufm.inputs import Inputs
from gubs.ufm.loss import Denominators
from gubs.ufm.model import load
from gubs.ufm.monitor import Phases
from gubs.ufm.questions import Item
from gubs.ufm.rollout import Response
from gubs.ufm.samples import Sample
from gubs.ufm.settings import GRPOSettings, ModelSettings, OptimizerSettings
from gubs.ufm.trainer import Trainer

MODEL = ModelSettings(dtype="float32", gradient_checkpointing=False)
OPTIMIZER = OptimizerSettings(learning_rate=1e-3, max_grad_norm=1e9)
LENGTHS = (3, 11, 24, 1, 17, 6)
"""Response tokens of the six samples: the first three about pictures, the others text only."""
BETA1 = OPTIMIZER.beta1
CLIP = 0.5


def six_samples(inputs: Inputs) -> list[Sample]:
    """Two about a video, one about an image, three text-only ones; answers of unequal lengths."""
    rng = np.random.default_rng(3)
    prompts = [
        video_prompt("a"),
        video_prompt("another user of the same video"),
        image_prompt("b"),
        text_prompt("c"),
        text_prompt("User: x. A much longer text than that of the others"),
        text_prompt("d"),
    ]
    item = Item("i", "u", "v", Task.CLICK, Option.A, "rule")
    samples = []
    for k, (prompt, length) in enumerate(zip(prompts, LENGTHS, strict=True)):
        ids = tuple(int(i) for i in rng.integers(300, len(inputs.tokenizer), length))
        response = Response(ids, tuple(float(x) for x in rng.normal(-7.5, 0.3, length)), 0)
        sample = Sample(0, SampleRole.T, k, item, inputs.encode(prompt), 0, response=response)
        sample.advantage = float(rng.normal())
        samples.append(sample)
    return samples


def worker(checkpoint: str, reference: Any, model: ModelSettings = MODEL, **grpo: Any) -> GRPOWorker:
    """A GA-GRPO worker without Ray, engine and data."""
    shell = object.__new__(GRPOWorker)
    shell.device, shell.vision, shell._share, shell.phases = torch.device("cpu"), True, True, Phases()
    shell.grpo = GRPOSettings().model_copy(update=grpo)
    shell.inputs, shell.reference = tiny_inputs(Path(checkpoint)), Reference(reference, shell.device)
    shell.trainer = Trainer(load(checkpoint, model, train=True), model, OPTIMIZER, 10, shell.device, True)
    return shell


def moments(model: Any) -> dict[str, torch.Tensor]:
    """Adam's first moments."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return {n: safe_get_full_optimizer_state(p, "exp_avg").clone() for n, p in model.named_parameters()}


def gradients(model: Any, before: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The last step's gradients, by the first moments after it and before (none: it was the first step)."""
    return {n: (m - (BETA1 * before[n] if before else 0.0)) / (1 - BETA1) for n, m in moments(model).items()}


def weights(shell: GRPOWorker) -> dict[str, torch.Tensor]:
    return {n: w.clone() for n, w in shell.trainer.model.state_dict().items()}


def result(shell: GRPOWorker, update: Any, **more: Any) -> dict[str, Any]:
    figures = {"norm": update.grad_norm, "skipped": update.skipped, "sums": update.sums, "rate": update.learning_rate}
    return {"grads": gradients(shell.trainer.model), "weights": weights(shell), **figures, **more}


def micro(shell: GRPOWorker, samples: list[Sample], k: int) -> list[tuple[Any, list[Sample]]]:
    """The samples in k micro-batches of as equal numbers as possible."""
    parts = [list(p) for p in np.array_split(np.arange(len(samples)), k)]
    return [
        (
            shell.inputs.collate([(samples[i].encoded, samples[i].response.ids) for i in part]),
            [samples[i] for i in part],
        )
        for part in parts
    ]


def references(shell: GRPOWorker, batches: list[tuple[Any, Any]]) -> list[Any]:
    from gubs.ufm.trainer import logprobs

    with torch.no_grad(), shell.reference as asked:
        return [logprobs(asked, b, vision=True) for b, _ in batches]


def split(k: int, level: str = "sequence", **model: Any) -> Callable[..., dict[str, Any]]:
    """One step, this rank's share of the samples in k micro-batches, of a model with other settings."""

    def scenario(checkpoint: str, reference: Any, rank: int, world_size: int) -> dict[str, Any]:
        shell = worker(checkpoint, reference, MODEL.model_copy(update=model), level=level)
        own = np.array_split(np.arange(6), world_size)[rank]
        samples = [six_samples(shell.inputs)[i] for i in own]
        batches = micro(shell, samples, k)
        update = shell._update(batches, references(shell, batches), [], 0, first=True)
        return result(shell, update)

    return scenario


def as_on_a_gpu(checkpoint: str, reference: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Two steps in bfloat16 with the settings of a GPU: gradients added up in float32, AdamW fused. (Its moments are
    made by the first step and used by the second.) Only the overlap of collectives is a matter of streams."""
    import gubs.ufm.trainer as module

    adamw, config = module._adamw, module._config

    def gpu_config(model: Any, optimizer: Any, world_size: int, gpu: bool, parameters: int) -> dict[str, Any]:
        made = config(model, optimizer, world_size, True, parameters)
        return {**made, "zero_optimization": {**made["zero_optimization"], "overlap_comm": False}}

    module._adamw, module._config = lambda p, s, gpu: adamw(p, s, True), gpu_config
    try:
        shell = worker(checkpoint, reference, MODEL.model_copy(update={"dtype": "bfloat16"}))
    finally:
        module._adamw, module._config = adamw, config
    own = np.array_split(np.arange(6), world_size)[rank]
    batches = micro(shell, [six_samples(shell.inputs)[i] for i in own], 3 if world_size == 1 else 2)
    refs = references(shell, batches)
    first = result(shell, shell._update(batches, refs, [], 0, first=True))
    second = shell._update(batches, refs, [], 1, first=True)
    zero = shell.trainer.engine.optimizer
    return {
        **first,
        "after": weights(shell),
        "second": second.skipped,
        "accumulated": str(zero.gradient_accumulation_dtype),
        "fused": zero.optimizer.param_groups[0]["fused"],
    }


def twice(checkpoint: str, reference: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Two updates on one batch: the second is measured against the policy before the first, and clipped."""
    shell = worker(checkpoint, reference, clip=CLIP)
    own = np.array_split(np.arange(6), world_size)[rank]
    batches, old = micro(shell, [six_samples(shell.inputs)[i] for i in own], 2), []
    refs = references(shell, batches)
    first = shell._update(batches, refs, old, 0, first=True)
    between, moment = weights(shell), moments(shell.trainer.model)
    second = shell._update(batches, refs, old, 1, first=False)
    grads = gradients(shell.trainer.model, moment)
    return {"first": first.sums, "sums": second.sums, "between": between, "grads": grads}


def uneven(checkpoint: str, reference: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Dealt by tokens, as in a real step: ranks find different numbers of micro-batches (two against none)."""
    shell = worker(checkpoint, reference, micro_tokens=200)
    samples = six_samples(shell.inputs) if rank == 0 else []
    batches, refs = shell._references(samples)
    again, old = shell._second_pass(samples), []
    update = shell._update(batches, refs, old, 0, first=True)
    return result(shell, update, batches=len(batches), health=shell._compared(batches, old, again))


def naive(checkpoint: str, reference: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Each micro-batch divided by its own number of samples, and the mean taken: what must not be done."""
    shell = worker(checkpoint, reference)
    indices = np.array_split(np.arange(6), world_size)[rank]
    batches = micro(shell, [six_samples(shell.inputs)[i] for i in indices], 4 // world_size)
    refs, old = references(shell, batches), []
    import gubs.ufm.grpo as module

    real, parts = module.Denominators, iter([b.response for b, _ in batches])

    class Own:
        of = staticmethod(real.of)

        def __new__(cls, *_: int) -> Denominators:
            return real(1, 1)  # the whole step's sums; divided by each part's own count below

    module.Denominators = Own
    try:
        update_of = shell.trainer.update

        def update(given: Any, loss_of: Any, step: int) -> Any:
            def own(logp: Any, number: int) -> Any:
                loss, sums = loss_of(logp, number)
                return loss / real.of(next(parts)).samples / len(given) / world_size, sums

            return update_of(given, own, step)

        shell.trainer.update = update
        return result(shell, shell._update(batches, refs, old, 0, first=True))
    finally:
        module.Denominators = real


def not_a_number(checkpoint: str, reference: Any, rank: int, world_size: int) -> dict[str, Any]:
    """NaN in one micro-batch of the last rank only; then the same step without it."""
    shell = worker(checkpoint, reference)
    before = weights(shell)
    own = np.array_split(np.arange(6), world_size)[rank]
    batches = micro(shell, [six_samples(shell.inputs)[i] for i in own], 2)

    def loss_of(bad: float) -> Any:
        def loss(logp: Any, number: int) -> Any:
            return -logp.sum() * (bad if rank == world_size - 1 and number == 1 else 1.0), {}

        return loss

    given = [b for b, _ in batches]
    bad = shell.trainer.update(given, loss_of(float("nan")), 0)
    infinite = shell.trainer.update(given, loss_of(float("inf")), 1)
    unchanged = all(torch.equal(w, before[n]) for n, w in weights(shell).items())
    good = shell.trainer.update(given, loss_of(1.0), 0)
    clean = worker(checkpoint, reference)
    clean.trainer.update(given, loss_of(1.0), 0)
    recovered = all(torch.equal(w, weights(clean)[n]) for n, w in weights(shell).items())
    return {
        "skipped": [bad.skipped, infinite.skipped, good.skipped],
        "norms": [bad.grad_norm, infinite.grad_norm, good.grad_norm],
        "unchanged": unchanged,
        "recovered": recovered,
    }


def resumed(checkpoint: str, reference: Any, rank: int, world_size: int, copy: bool = False) -> dict[str, Any]:
    """Three steps, against one step, saved, loaded into another trainer, and two more; with `copy`, it is written while
    training goes on."""
    folder = Path(sys.argv[4]).parent / f"state-{world_size}-{copy}"
    own = np.array_split(np.arange(6), world_size)[rank]

    def steps(shell: GRPOWorker, numbers: range) -> None:
        batches = micro(shell, [six_samples(shell.inputs)[i] for i in own], 2)
        for number in numbers:
            shell._update(batches, references(shell, batches), [], number, first=True)

    whole = worker(checkpoint, reference)
    steps(whole, range(3))
    first = worker(checkpoint, reference)
    steps(first, range(1))
    write = first.trainer.save(folder, copy=copy)
    if rank == 0:
        save_policy(first.trainer.model, first.inputs, folder / "policy")
    if copy:
        steps(first, range(1, 2))  # what is written later is the state of before
    write()
    torch.distributed.barrier()
    second = worker(checkpoint, reference)
    second.trainer.load(folder, folder / "policy")
    steps(second, range(1, 3))
    saved = sum(p.stat().st_size for p in folder.rglob("*.pt"))
    moved = any(not torch.equal(w, weights(first)[n]) for n, w in weights(whole).items())
    equal = all(torch.equal(w, weights(second)[n]) for n, w in weights(whole).items())
    return {"equal": equal, "moved": moved, "saved": saved}


def full_disk(checkpoint: str, reference: Any, rank: int, world_size: int) -> dict[str, Any]:
    """The last rank's disk is full in the middle of DeepSpeed's own saving, and then no longer."""
    folder = Path(sys.argv[4]).parent / f"full-{world_size}"
    shell = worker(checkpoint, reference)
    writer, saved = shell.trainer.engine.checkpoint_engine, []
    real = writer.save

    def save(*args: Any, **named: Any) -> None:
        if rank == world_size - 1 and not saved:
            saved.append(1)
            raise OSError(28, "No space left on device")
        real(*args, **named)

    writer.save = save
    try:
        shell.trainer.save(folder)()
        message = ""
    except OSError as e:
        message = str(e)
    torch.distributed.barrier()
    shell.trainer.save(folder)()  # would wait for ever if a rank had missed one of DeepSpeed's barriers
    torch.distributed.barrier()
    return {"message": message, "files": len(list(folder.rglob("*.pt")))}


def silent(checkpoint: str, reference: Any, rank: int, world_size: int) -> dict[str, Any]:
    """A step with answers, and one without any on any rank."""
    shell = worker(checkpoint, reference)
    batches = micro(shell, six_samples(shell.inputs), 2)
    shell._update(batches, references(shell, batches), [], 0, first=True)
    before = weights(shell)
    batches, refs = shell._references([])
    update = shell._update(batches, refs, [], 1, first=True)
    equal = all(torch.equal(w, before[n]) for n, w in weights(shell).items())
    return {"equal": equal, "skipped": update.skipped}


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "k1": split(1),
    "k2": split(2),
    "k3": split(3),
    "token": split(2, "token"),
    "recomputed": split(2, gradient_checkpointing=True),
    "bfloat16": split(2, dtype="bfloat16"),
    "as on a GPU": as_on_a_gpu,
    "twice": twice,
    "uneven": uneven,
    "naive": naive,
    "nan": not_a_number,
    "resumed": resumed,
    "resumed from a copy": partial(resumed, copy=True),
    "full disk": full_disk,
    "silent": silent,
}


def main(rank: int, world_size: int, rendezvous: str, out: str, checkpoint: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=40)
    )
    torch.manual_seed(1)
    reference = load(checkpoint, MODEL)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.01 * torch.randn_like(p))
    results = {name: scenario(checkpoint, reference, rank, world_size) for name, scenario in SCENARIOS.items()}
    torch.save(results, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
