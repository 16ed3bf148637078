"""Do engine, trainer and reference compute the same thing? Figures, their bounds, and what is done beyond them.

The first step of an attempt is checked and ends the run where a bound is broken: what would be trained on is then not
what was sampled. Its log-probabilities are compared with those of a second forward pass, in which every answer has a
row of its own and micro-batches are half as large: a mask, a position or a padding that is wrong in one of the two
layouts shows as a ratio that is not 1. In later steps mismatch and drift beyond their bounds raise an alarm.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from gubs.ufm.checkpoint import SharedError
from gubs.ufm.inputs import Answered, Batch, Inputs
from gubs.ufm.trainer import micro_batches, reduce_sums

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALARM = "health/alarm"
"""1 in a step whose mismatch or drift is out of bounds, else 0."""
_CLOSE = {"float32": 1e-3, "bfloat16": 2e-2}
"""How far two passes over the same tokens may be apart: rounding depends on the layout."""
_SAME = {"float32": 1e-3, "bfloat16": 0.01}
"""How far the policy may be from the reference before it was trained. GPUs need not compute both with the same kernels:
0.0011 was measured for a 7B with random weights in bfloat16, on an H200."""
_MISMATCH = {"float32": 1.02, "bfloat16": 1.12}
"""Bounds of the mean of exp|log p(engine) - log p(trainer)|. It grows with rounding, which in bfloat16 takes an unsure
model (mean log p -4.5, `small` before SFT) to 1.06 already; wrong positions take it to 1.7."""
_DRIFT = 0.01
"""Bound of KL(engine || trainer). Rounding hardly moves it, being as often up as down: the same model's is 0.003 in
bfloat16, and 0.1 with wrong positions."""


class HealthError(SharedError):
    """Engine, trainer and reference do not compute the same thing."""

    exit_code = 9


def bounds(step: int, dtype: str) -> list[tuple[str, float, float]]:
    """Figure, lower and upper bound at the first step of an attempt; at step 0 the policy is still the reference."""
    close = _CLOSE[dtype]
    first = [("ratio", 1 - close, 1 + close), ("kl_old", -close, close), *_every_step(dtype)]
    return [*first, ("kl", -_SAME[dtype], _SAME[dtype])] if step == 0 else first


def check(figures: Mapping[str, float], step: int, dtype: str) -> None:
    """Looks at the first step of an attempt.

    Raises:
        HealthError: a figure is out of bounds.
    """
    problems = _problems(figures, bounds(step, dtype))
    if problems and not figures["skipped"]:
        raise HealthError(f"step {step}: engine, trainer and reference differ: {'; '.join(problems)}")


def alarm(figures: Mapping[str, float], dtype: str) -> str:
    """What is wrong with mismatch and drift of a step; empty if nothing is."""
    return "; ".join(_problems(figures, _every_step(dtype)))


def second_pass(
    logprobs: "Callable[[Batch], Tensor]",
    inputs: Inputs,
    sequences: Sequence[Answered],
    micro_tokens: int,
    device: "torch.device",
) -> "list[Tensor]":
    """Log-probabilities of each sequence's response tokens, in another layout than training has.

    Args:
        logprobs: of the response tokens of a batch on the device.
        inputs: pads sequences.
        sequences: prompts with responses.
        micro_tokens: of training; this pass takes half.
        device: of the model.
    """
    import torch

    lengths = [len(encoded.ids) + len(answer) for encoded, answer in sequences]
    values: list[Tensor] = [torch.empty(0)] * len(sequences)
    with torch.no_grad():
        for part in micro_batches(lengths, micro_tokens // 2):
            flat = logprobs(inputs.collate([sequences[i] for i in part]).to(device))
            for i, piece in zip(part, flat.split([len(sequences[i][1]) for i in part]), strict=True):
                values[i] = piece
    return values


def compared(first: "Tensor", second: "Tensor") -> dict[str, float]:
    """Mean ratio and KL of two passes over the same tokens of all ranks, by the figures' names.

    Args:
        first: log-probabilities of this rank's tokens in training, (tokens,).
        second: the same in the second pass.
    """
    from gubs.ufm.loss import k3

    ratio, kl = (first - second).exp().sum(), k3(first, second).sum()
    total = reduce_sums({"ratio": ratio, "kl_old": kl, "tokens": len(first)}, first.device)
    return {f"health/{name}": total[name] / max(1.0, total["tokens"]) for name in ("ratio", "kl_old")}


def _every_step(dtype: str) -> list[tuple[str, float, float]]:
    """The figures that find wrong masks and positions, and stale weights."""
    return [("mismatch", 0.0, _MISMATCH[dtype]), ("drift", -_CLOSE["float32"], _DRIFT)]


def _problems(figures: Mapping[str, float], limits: Sequence[tuple[str, float, float]]) -> list[str]:
    return [
        f"{name} = {value:.4g}, not {low:g} to {high:g}"
        for name, low, high in limits
        if (value := figures.get(f"health/{name}")) is not None and not low <= value <= high
    ]
