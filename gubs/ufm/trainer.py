"""One rank's model under DeepSpeed ZeRO-2: takes an optimiser step on micro-batches, saves and loads its state.

Losses of micro-batches are sums over denominators of the whole step (see loss.py). DeepSpeed averages gradients over
ranks, so losses are multiplied by the number of ranks. It would also divide by its accumulation steps, so these stay 1
and the boundary is set by hand.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gubs.errors import PlatformError
from gubs.ufm.checkpoint import Write, load_policy
from gubs.ufm.inputs import Answered, Batch, rows_of
from gubs.ufm.policy import response_logits
from gubs.ufm.settings import ModelSettings, OptimizerSettings

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from torch import Tensor
    from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

LossOf = Callable[["Tensor", int], "tuple[Tensor, dict[str, Tensor]]"]
"""(log-probabilities of a micro-batch's response tokens, number of the micro-batch) -> loss, sums for the log."""

_TAG = "deepspeed"
BUCKET = 500_000_000
"""How many gradients DeepSpeed reduces at a time, at most; with overlapping there are two such buffers."""


@dataclass(frozen=True)
class Update:
    """What an optimiser step did."""

    skipped: bool
    """Loss or gradient was not a number, so the weights did not change."""
    grad_norm: float
    learning_rate: float
    sums: dict[str, float]
    """The micro-batches' sums, added over all ranks."""


class Trainer:
    """The policy in training. torch.distributed has to be initialised."""

    def __init__(
        self,
        model: "Qwen2_5_VLForConditionalGeneration",
        model_settings: ModelSettings,
        optimizer: OptimizerSettings,
        steps: int,
        device: "torch.device",
        vision: bool,
    ):
        """Wraps a model; every rank must do so at the same time.

        Args:
            model: as loaded by `model.load(..., train=True)`.
            model_settings: its precision.
            optimizer: AdamW's settings.
            steps: optimiser steps of the whole run, for the schedule.
            device: where the model goes.
            vision: some prompts have pictures; otherwise the vision tower is not trained.
        """
        import deepspeed
        import torch.distributed as dist

        _disable_compiled_collectives()
        self.settings, self.steps, self.device, self.vision = optimizer, steps, device, vision
        self.world_size = dist.get_world_size()
        model.model.visual.requires_grad_(vision)
        trained = [p for p in model.parameters() if p.requires_grad]
        gpu = device.type == "cuda"
        self.engine, *_ = deepspeed.initialize(
            model=model.to(device),  # type: ignore[arg-type]  # transformers' annotation lacks `self`
            model_parameters=trained,
            optimizer=_adamw(trained, optimizer, gpu),
            config=_config(model_settings, optimizer, self.world_size, gpu, sum(p.numel() for p in trained)),
            dist_init_required=False,
        )
        # a script that puts weights together from the checkpoint; ours has them as a policy
        self.engine._copy_recovery_script = lambda _: None

    @property
    def model(self) -> "Qwen2_5_VLForConditionalGeneration":
        """The model itself; every rank has all of its weights."""
        return self.engine.module

    def logprobs(self, batch: Batch) -> "Tensor":
        """Log-probabilities (tokens,) of the response tokens of a batch on the device, with gradient, row by row."""
        return logprobs(self.model, batch, vision=self.vision)

    def update(self, batches: Sequence[Batch], loss_of: LossOf, step: int) -> Update:
        """One optimiser step on this rank's micro-batches; all ranks need the same number of them.

        Args:
            batches: at least one; a rank with fewer than the others adds some without response tokens.
            loss_of: see `LossOf`.
            step: number of the step, from 0.
        """
        rate = learning_rate(self.settings, step, self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        totals: dict[str, float | Tensor] = {}
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss, sums = loss_of(self.logprobs(batch.to(self.device)), number)
            self.engine.backward(loss * self.world_size)
            for name, value in {**sums, "loss": loss}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
        self.engine.step()
        skipped = bool(self.engine.optimizer.overflow)
        norm = float("nan") if skipped else float(self.engine.get_global_grad_norm() or 0.0)
        return Update(skipped, norm, rate, reduce_sums(totals, self.device))

    def save(self, folder: str | Path, *, copy: bool = False) -> Write:
        """Collects this rank's optimiser and counters; all ranks take part. Weights are not among them: they are in the
        policy that is saved beside this (see `save_policy`).

        Args:
            folder: where the files go; all ranks share it.
            copy: copy everything to host memory, so that it may be written while training continues.

        Returns:
            What writes this rank's files.
        """
        writer = self.engine.checkpoint_engine
        self.engine.checkpoint_engine = collected = _Collector(writer, copied_to_host if copy else _same)
        try:
            self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        finally:
            self.engine.checkpoint_engine = writer
        return collected.write

    def load(self, folder: str | Path, policy: Path) -> None:
        """Loads what `save` wrote, and the weights of the policy beside it; needs the same number of ranks and the same
        model.
        """

        def load_weights(src: object, dst: "PreTrainedModel") -> None:  # noqa: ARG001 - DeepSpeed's names
            load_policy(dst, policy)

        self.engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False, custom_load_fn=load_weights)


class _Collector:
    """In place of DeepSpeed's checkpoint writer: keeps what would be written, without the weights. Written later, an
    error of the disk cannot keep one rank from DeepSpeed's barriers, where the others would wait forever.
    """

    def __init__(self, writer: "CheckpointEngine", keep: Callable[[Any], Any]):
        self._writer, self._keep = writer, keep
        self._files: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Leaves it to `write`."""

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        """Keeps a file's content. What is left of the model's file are counters."""
        weightless = {**state_dict, "module": {}} if "module" in state_dict else state_dict
        self._files[path] = self._keep(weightless)

    def write(self) -> None:
        """Writes the files."""
        for path, state in self._files.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._writer.save(state, path)


def _same(value: Any) -> Any:
    return value


def copied_to_host(value: Any) -> Any:
    """A copy of nested lists, tuples and dicts in which all tensors are in host memory."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: copied_to_host(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(copied_to_host, value))
    return value


def release_cache(device: "torch.device") -> None:
    """Gives back the GPU memory that torch keeps in reserve: the engine needs it to wake up."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_allocator(environment: Mapping[str, str]) -> None:
    """Checks that torch allocates GPU memory in a way that can be shared with the engine's process.

    Raises:
        PlatformError: it does not.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environment.get(name, "").lower().replace(" ", ""):
            raise PlatformError(
                f"{name}={environment[name]}: weights in expandable segments cannot be handed to the rollout engine; "
                "remove expandable_segments from it"
            )


def _disable_compiled_collectives() -> None:
    """Makes ranks on CPUs use gloo; otherwise DeepSpeed compiles its own collective at the start.

    That needs a compiler and a minute or more, and if it is killed, it leaves a lock that every later start waits for.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def logprobs(model: "Qwen2_5_VLForConditionalGeneration", batch: Batch, *, vision: bool) -> "Tensor":
    """Log-probabilities (tokens,) of the response tokens, row by row."""
    from gubs.ufm.loss import token_logprobs

    return token_logprobs(response_logits(model, batch, vision=vision), batch.targets)


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Rate of a step (from 0): warm-up, then the schedule down to nearly 0 at the last step."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return settings.learning_rate
    done = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0 - done
    return settings.learning_rate * max(share, 0.01)


def micro_batches(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Groups sequences into micro-batches of at most `micro_tokens` tokens (padding included), longest first.

    Sequences of similar length come together, so there is little padding. Each micro-batch has at least one sequence.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= micro_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def packed(sequences: Sequence[Answered], share: bool, micro_tokens: int) -> list[list[int]]:
    """Numbers of the sequences in each micro-batch; with `share`, answers to the same `Encoded` stay together."""
    rows = rows_of([prompt for prompt, _ in sequences], share)
    lengths = [len(sequences[row[0]][0].ids) + sum(len(sequences[i][1]) for i in row) for row in rows]
    return [[i for row in part for i in rows[row]] for part in micro_batches(lengths, micro_tokens)]


def reduce_sums(sums: "Mapping[str, float | Tensor]", device: "torch.device") -> dict[str, float]:
    """Adds named numbers over all ranks. Every rank must have the same names."""
    import torch
    import torch.distributed as dist

    names = sorted(sums)
    values = torch.tensor([float(sums[n]) for n in names], dtype=torch.float64, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return dict(zip(names, values.tolist(), strict=True))


def reduce_max(value: int, device: "torch.device") -> int:
    """The largest of all ranks' values."""
    import torch
    import torch.distributed as dist

    largest = torch.tensor(value, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _adamw(parameters: "Sequence[Tensor]", settings: OptimizerSettings, gpu: bool) -> "torch.optim.AdamW":
    """On a GPU fused: one kernel over all parameters, without temporary tensors."""
    import torch

    betas = (settings.beta1, settings.beta2)
    decay = settings.weight_decay
    return torch.optim.AdamW(parameters, settings.learning_rate, betas, weight_decay=decay, fused=gpu or None)


def _config(
    model: ModelSettings, optimizer: OptimizerSettings, world_size: int, gpu: bool, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's settings. Its buckets take their full size even for the smallest model, so they are limited. On a GPU
    gradients of micro-batches are added up in float32, whose buffer is then also the one that AdamW reads.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_optimization": {
            "stage": 2,
            "overlap_comm": gpu,
            "reduce_bucket_size": min(BUCKET, parameters),
            "contiguous_gradients": True,
            "round_robin_gradients": False,
        },
        "data_types": {"grad_accum_dtype": "fp32"} if gpu else {},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
