"""The loss of GA-GRPO: policy gradient with an importance ratio, and the KL to the SFT model.

    per token:  -w * ratio * A + beta * k3,   ratio = exp(logp - old),   w = min(exp(old - rollout), cap)
    `sequence`: sum over sequences of (mean over the sequence's response tokens) / samples
    `token`:    sum over all response tokens / tokens

`samples` and `tokens` are counted over the *whole optimiser step on all ranks*. A mean taken inside a micro-batch
weighs a token by the other tokens it happens to be with; a sum over a fixed number does not, so losses and gradients of
micro-batches and ranks simply add up. A runtime that averages gradients (DDP and DeepSpeed average over ranks,
DeepSpeed also over its accumulation steps) must be given the loss times what it will divide by.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Level = Literal["sequence", "token"]

_CHUNK_BYTES = 64 * 2**20
"""Size of the fp32 copy of logits that is alive at one time, bytes."""


@dataclass(frozen=True, slots=True)
class Denominators:
    """What the sums of one optimiser step are divided by, counted over all its micro-batches and all ranks."""

    samples: int
    """Sequences with at least one response token."""
    tokens: int
    """Response tokens."""

    @classmethod
    def of(cls, mask: Tensor) -> "Denominators":
        """Counts a part of the step (any batch of it); add the parts up.

        Args:
            mask: true for response tokens, [B, L].
        """
        per_sequence = (mask != 0).sum(-1)
        return cls(int((per_sequence > 0).sum()), int(per_sequence.sum()))

    def __add__(self, other: "Denominators") -> "Denominators":
        return Denominators(self.samples + other.samples, self.tokens + other.tokens)


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each token, in fp32 (fp64 for fp64 logits).

    Forward and backward work on chunks of tokens, so no fp32 copy of the logits, nor their log-softmax, ever exists as
    a whole: beyond the logits and their gradient (both in the logits' own type) the cost is 64 MiB. Logits that are a
    slice in the middle (`logits[:, :-1]` of several sequences) are copied once, in their own type.

    Args:
        logits: [..., L, V]; `logits[..., t, :]` must be those that predict `ids[..., t]` (the caller shifts).
        ids: [..., L], each in [0, V); at masked positions too.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit ids {tuple(ids.shape)}")
    flat: Tensor = _TokenLogprobs.apply(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1))
    return flat.view(ids.shape)


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), exp(d) - d - 1 with d = ref_logp - logp: never below 0."""
    d = ref_logp - logp
    return torch.expm1(d) - d


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    *,
    denominators: Denominators,
    beta: float,
    clip: float | None = None,
    rollout_logp: Tensor | None = None,
    tis_cap: float = 2.0,
    level: Level = "sequence",
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the step's loss. Add shares (and gradients) up over micro-batches and ranks.

    Padding may hold anything, NaN included; a sequence or a micro-batch without response tokens adds 0 and still hangs
    on the graph, so every rank can run its backward pass.

    Args:
        logp: log-probabilities of the response tokens under the policy, with gradient, [B, L].
        old_logp: the same under the policy that the step began with, [B, L]; None for the first update on a batch: the
            detached current ones, a ratio of exactly 1.
        ref_logp: the same under the reference (SFT) model, [B, L]; may be None where beta is 0.
        advantage: of each sequence, [B].
        mask: true for response tokens, [B, L].
        denominators: of the whole optimiser step over all ranks, never of this micro-batch.
        beta: weight of the KL (0.04).
        clip: PPO's epsilon; None (the paper) does not clip.
        rollout_logp: log-probabilities that the rollout engine gave when it sampled, [B, L]. Given, each token's policy
            term is weighted by min(exp(old - rollout), tis_cap), detached: truncated importance sampling.
        tis_cap: that cap; 0 = no weight, only its figures.
        level: `sequence` or `token`, see the module.

    Returns:
        The loss (fp32 scalar) and detached sums over this micro-batch's tokens: `tokens`, `samples`, `ratio`, `kl_old`
        (to the old policy), `clipped`, with ref_logp `kl` (to the reference), and with rollout_logp `mismatch`
        (exp|old - rollout|), `drift` (k3 estimate of KL(rollout || old)) and `capped`. Add them up too, then
        `step_means` divides.

    Raises:
        ValueError: shapes differ, a denominator is not positive, beta without ref_logp, or an unknown level.
    """
    old_logp = logp.detach() if old_logp is None else old_logp.detach()
    if ref_logp is None and beta:
        raise ValueError(f"beta {beta} needs the reference model's log-probabilities")
    _check(logp, advantage, {"old_logp": old_logp, "ref_logp": ref_logp, "mask": mask, "rollout_logp": rollout_logp})
    mask = mask != 0
    logp, old = _clean(logp, mask), _clean(old_logp, mask)
    ratio = torch.exp(logp - old)
    objective, clipped = _objective(ratio, advantage.to(ratio.dtype).detach().unsqueeze(-1), clip)
    sums = {"ratio": ratio, "kl_old": k3(logp, old), "clipped": clipped.to(ratio.dtype)}
    if ref_logp is not None:
        sums["kl"] = k3(logp, _clean(ref_logp.detach(), mask))
    if rollout_logp is not None:
        importance, seen = _engine(_clean(rollout_logp.detach(), mask), old, tis_cap)
        objective = objective * importance.clamp(max=tis_cap) if tis_cap else objective
        sums |= seen
    loss = _reduce(beta * sums.get("kl", 0.0) - objective, mask, denominators, level)
    return loss, _masked_sums(sums, mask)


def step_means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means over tokens of a step's sums (already added over micro-batches and ranks), for the log.

    With no token at all there is no mean: an empty dict.
    """
    tokens = float(sums["tokens"])
    counts = ("tokens", "samples")
    return {name: float(value) / tokens for name, value in sums.items() if name not in counts} if tokens else {}


def _check(logp: Tensor, advantage: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} is not of the shape of logp {tuple(logp.shape)}")
    if advantage.shape != logp.shape[:1]:
        raise ValueError(
            f"advantage {tuple(advantage.shape)}: one for each sequence of logp {tuple(logp.shape)} needed"
        )


def _clean(logp: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities in fp32 or better, 0 outside the mask: masking after exp would let padding's inf become NaN."""
    wide = logp if logp.dtype == torch.float64 else logp.float()
    return torch.where(mask, wide, wide.new_zeros(()))


def _objective(ratio: Tensor, advantage: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """The surrogate ratio * A, clipped where asked, and whether the clip bit, [B, L] each."""
    free = ratio * advantage
    if clip is None:
        return free, torch.zeros_like(free, dtype=torch.bool)
    bound = ratio.clamp(1 - clip, 1 + clip) * advantage
    return torch.minimum(free, bound), bound < free


def _engine(sampled: Tensor, old: Tensor, cap: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The importance weight of what the engine sampled, and how far engine and trainer are apart, [B, L] each."""
    importance = torch.exp(old - sampled)
    capped = (importance > cap).to(importance.dtype)
    return importance, {"mismatch": torch.exp((old - sampled).abs()), "drift": k3(sampled, old), "capped": capped}


def _reduce(per_token: Tensor, mask: Tensor, denominators: Denominators, level: Level) -> Tensor:
    """The micro-batch's sum over the whole step's denominator."""
    per_token = torch.where(mask, per_token, per_token.new_zeros(()))
    if level not in ("sequence", "token"):
        raise ValueError(f"unknown level {level!r}: sequence or token")
    divisor = denominators.samples if level == "sequence" else denominators.tokens
    if divisor <= 0:
        raise ValueError(f"{denominators}: the step has no response tokens; skip it")
    if level == "token":
        return per_token.sum() / divisor
    lengths = mask.sum(-1).clamp(min=1)
    return (per_token.sum(-1) / lengths).sum() / divisor


def _masked_sums(per_token: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    sums = {name: torch.where(mask, value.detach(), 0.0).sum() for name, value in per_token.items()}
    like = sums["ratio"]
    return sums | {"tokens": mask.sum().to(like), "samples": mask.any(-1).sum().to(like)}


class _TokenLogprobs(torch.autograd.Function):
    """logit of the token minus logsumexp; the softmax of the backward pass is made again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(len(ids), dtype=wide, device=logits.device)
        for rows in _chunks(logits):
            lse[rows] = torch.logsumexp(logits[rows].to(wide), dim=-1)
        ctx.save_for_backward(logits, ids, lse)
        return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1).to(wide) - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        logits, ids, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _chunks(logits):
            part = torch.exp(logits[rows].to(lse.dtype) - lse[rows].unsqueeze(-1)).neg_()
            part.scatter_add_(-1, ids[rows].unsqueeze(-1), torch.ones_like(part[:, :1]))
            out[rows] = part.mul_(grad[rows].unsqueeze(-1)).to(out.dtype)
        return out, None


def _chunks(logits: Tensor) -> list[slice]:
    """Rows of [N, V] logits whose fp32 copy fits `_CHUNK_BYTES`."""
    rows = max(1, _CHUNK_BYTES // (4 * max(1, logits.shape[-1])))
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]
