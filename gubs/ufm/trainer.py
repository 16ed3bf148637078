"""One rank's model under DeepSpeed ZeRO-2: micro-batches in, one optimiser step out, the whole of it saved and loaded.

Losses of micro-batches are sums over denominators of the whole step (see loss.py). DeepSpeed averages gradients over
ranks, so losses are multiplied by their number; its accumulation steps stay 1 and the boundary is set by hand, since it
would divide by them too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gubs.ufm.inputs import Batch
from gubs.ufm.policy import response_ids, response_logits
from gubs.ufm.settings import ModelSettings, OptimizerSettings

MICRO = Callable[[Any, int], tuple[Any, dict[str, Any]]]
"""(log-probabilities of a micro-batch's response tokens, number of the micro-batch) -> loss, sums for the log."""

_TAG = "deepspeed"
BUCKET = 500_000_000
"""Gradients that DeepSpeed reduces at a time, at most; with overlapping there are two such buffers."""


@dataclass(frozen=True)
class Update:
    """What an optimiser step did."""

    skipped: bool
    """Loss or gradient was not a number: the weights are what they were."""
    grad_norm: float
    learning_rate: float
    sums: dict[str, float]
    """Sums of the micro-batches' sums over all ranks."""


class Trainer:
    """The policy in training. torch.distributed has to be initialised."""

    def __init__(
        self,
        model: Any,
        model_settings: ModelSettings,
        optimizer: OptimizerSettings,
        steps: int,
        device: Any,
        vision: bool,
    ):
        """Wraps a model; every rank has to do so at the same time.

        Args:
            model: as loaded by `model.load(..., train=True)`.
            model_settings: its precision.
            optimizer: AdamW's settings.
            steps: optimiser steps of the whole run, for the schedule.
            device: where the model goes.
            vision: some prompts have pictures; else the vision tower is not trained.
        """
        import deepspeed
        import torch
        import torch.distributed as dist

        _compile_nothing()
        self.settings, self.steps, self.device, self.vision = optimizer, steps, device, vision
        self.world = dist.get_world_size()
        model.model.visual.requires_grad_(vision)
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(
            trained,
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            weight_decay=optimizer.weight_decay,
        )
        self.engine, *_ = deepspeed.initialize(
            model=model.to(device),
            model_parameters=trained,
            optimizer=adam,
            config=_config(model_settings, optimizer, self.world, device, sum(p.numel() for p in trained)),
            dist_init_required=False,
        )

    @property
    def model(self) -> Any:
        """The model itself, all of its weights on every rank."""
        return self.engine.module

    def logprobs(self, batch: Batch) -> Any:
        """Log-probabilities (tokens,) of the response tokens of a batch on the device, with gradient, row by row."""
        return logprobs(self.model, batch, vision=self.vision)

    def update(self, batches: Sequence[Batch], loss_of: MICRO, step: int) -> Update:
        """One optimiser step on this rank's micro-batches; all ranks need the same number of them.

        Args:
            batches: micro-batches, at least one; without response tokens where a rank has fewer than the others.
            loss_of: see `MICRO`.
            step: number of the step, from 0.
        """
        rate = learning_rate(self.settings, step, self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Any] = {}
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss, found = loss_of(self.logprobs(batch.to(self.device)), number)
            self.engine.backward(loss * self.world)
            for name, value in {**found, "loss": loss.detach()}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        self.engine.step()
        skipped = bool(self.engine.optimizer.overflow)
        norm = float("nan") if skipped else float(self.engine.get_global_grad_norm() or 0.0)
        return Update(skipped, norm, rate, reduce_sums(sums, self.device))

    def save(self, folder: str | Path) -> None:
        """Weights, optimiser and counters of this rank under a folder that all ranks share; all ranks take part."""
        writer = self.engine.checkpoint_engine
        self.engine.checkpoint_engine = patient = _PatientWriter(writer)
        try:
            self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        finally:
            self.engine.checkpoint_engine = writer
        if patient.error:
            raise patient.error

    def load(self, folder: str | Path) -> None:
        """Takes back what `save` wrote; same number of ranks, same model."""
        self.engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False)


class _PatientWriter:
    """DeepSpeed's writer of checkpoints, whose errors wait: raised between DeepSpeed's barriers, the error of one rank
    would leave the others waiting there for ever.
    """

    def __init__(self, writer: Any):
        self._writer = writer
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def makedirs(self, *args: Any, **named: Any) -> None:
        self._try(self._writer.makedirs, *args, **named)

    def save(self, *args: Any, **named: Any) -> None:
        self._try(self._writer.save, *args, **named)

    def _try(self, write: Callable[..., Any], *args: Any, **named: Any) -> None:
        try:
            write(*args, **named)
        except Exception as e:  # noqa: BLE001 - raised by `Trainer.save`
            self.error = self.error or e


def release_cache(device: Any) -> None:
    """Gives the GPU's memory that torch keeps in reserve to other processes: the engine needs it to wake up."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def _compile_nothing() -> None:
    """Lets ranks on CPUs speak through gloo: DeepSpeed would else compile a collective of its own when it starts.

    That takes a compiler and a minute or more, and one that is killed leaves a lock for which every later start waits.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def logprobs(model: Any, batch: Batch, *, vision: bool) -> Any:
    """Log-probabilities (tokens,) of the response tokens, row by row."""
    from gubs.ufm.loss import token_logprobs

    return token_logprobs(response_logits(model, batch, vision=vision), response_ids(batch))


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Rate of a step (from 0): warm-up, then the schedule down to nearly 0 at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * min(1.0, done))) if settings.schedule == "cosine" else 1.0 - min(1.0, done)
    return settings.learning_rate * max(left, 0.01)


def micro_batches(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Deals sequences to micro-batches of at most `micro_tokens` tokens (padding included), longest first.

    Sequences of about the same length come together, so little is padded. Each micro-batch has one sequence at least.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= micro_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def reduce_sums(sums: dict[str, Any], device: Any) -> dict[str, float]:
    """Adds named numbers over all ranks. Every rank must have the same names."""
    import torch
    import torch.distributed as dist

    names = sorted(sums)
    values = torch.tensor([float(sums[n]) for n in names], dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


def most(value: int, device: Any) -> int:
    """The largest of all ranks' values."""
    import torch
    import torch.distributed as dist

    found = torch.tensor(value, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def _config(
    model: ModelSettings, optimizer: OptimizerSettings, world: int, device: Any, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's settings. It would set aside buckets of their full size for the smallest model too."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": device.type == "cuda",
            "reduce_bucket_size": min(BUCKET, parameters),
            "contiguous_gradients": True,
            "round_robin_gradients": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
