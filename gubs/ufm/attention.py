"""Attention without masks and without loops over windows, by SDPA's fast kernels.

Two things would otherwise keep a GPU from its fast kernels. Answers that share a row must not see each other: a mask
says so, and a mask of n x n rules out flash attention and its skipping of what lies ahead. And transformers computes
the windows of the vision tower one by one, a thousand calls per clip, and asks the GPU for their lengths in each layer.
Here the answers of a row are computed as what they are, queries behind a prompt, and windows of the same length
together.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import Qwen2_5_VLForConditionalGeneration

NAME = "gubs_rows"
"""Of the text model's attention, where transformers looks it up."""


@dataclass(frozen=True)
class Row:
    """A prompt with its answers, one behind the other."""

    prompt: int
    """Tokens of the prompt."""
    answers: tuple[int, ...]
    """Tokens of each answer: it sees the prompt and itself."""


def install(model: "Qwen2_5_VLForConditionalGeneration") -> None:
    """Has a model with SDPA compute attention here. Its weights and their names stay as they are."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, rows_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config: Any = model.config.text_config
    config._attn_implementation = NAME
    for block in model.model.visual.blocks:
        block.attn.__class__ = _window_attention()


def rows_attention(
    module: "nn.Module",
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    attention_mask: "Tensor | None",
    rows: Sequence[Row] | None = None,
    **more: Any,
) -> "tuple[Tensor, None]":
    """SDPA; with `rows`, of rows that hold several answers.

    Args:
        module: the layer's attention.
        query: (b, heads, n, d).
        key: (b, key heads, n, d).
        value: like `key`.
        attention_mask: None, where `rows` are given.
        rows: what stands in each of the b rows, padded on the right; None = every place sees all before it.
        more: what transformers passes on.

    Returns:
        (b, n, heads, d); zeros at padding behind shared rows.
    """
    import torch
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if rows is None:
        result: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **more)[0]
        return result, None
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    size = query.shape[2]
    first = max(row.prompt + row.answers[0] for row in rows)  # each row's prompt and first answer, all rows at once
    whole = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :first], key[:, :, :first], value[:, :, :first], is_causal=True, scale=more.get("scaling")
    )
    made = []
    for number, row in enumerate(rows):
        pieces = [whole[number, :, : row.prompt + row.answers[0]]]
        if any(row.answers[1:]):
            further = _further(query[number], key[number], value[number], row, more.get("scaling"))
            pieces += [further[n, :, :length] for n, length in enumerate(row.answers[1:])]
        made.append(_padded(torch.cat(pieces, dim=1), size))
    return torch.stack(made).transpose(1, 2).contiguous(), None


def _further(query: "Tensor", key: "Tensor", value: "Tensor", row: Row, scale: float | None) -> "Tensor":
    """All answers of a row but the first: (answers - 1, heads, the longest of them, d)."""
    import torch

    begins = list(itertools.accumulate(row.answers[:-1], initial=row.prompt))[1:]
    width = max(row.answers[1:])

    def answers(part: "Tensor") -> "Tensor":
        # what follows a shorter answer comes along: its own tokens do not see it, and what it computes is dropped
        return torch.stack([_padded(part[:, begin : begin + width], width) for begin in begins])

    def seen(part: "Tensor") -> "Tensor":
        prompt = part[:, : row.prompt].expand(len(begins), -1, -1, -1)
        return torch.cat([prompt, answers(part)], dim=2)

    mask: Any = _behind(width, row.prompt, query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        answers(query), seen(key), seen(value), attn_mask=mask, scale=scale
    )


def _behind(width: int, prompt: int, device: "torch.device") -> "Tensor":
    """What `width` places behind a prompt see: the prompt, and those before them. A GPU's kernels know this mask by
    name; elsewhere it is written out.
    """
    import torch
    from torch.nn.attention.bias import causal_lower_right

    if device.type == "cuda":
        return causal_lower_right(width, prompt + width)
    return torch.ones(width, prompt + width, dtype=torch.bool, device=device).tril(prompt)


def _padded(part: "Tensor", size: int) -> "Tensor":
    """(heads, n, d) with zeros behind, up to a size."""
    import torch

    return torch.nn.functional.pad(part, (0, 0, 0, size - part.shape[1])) if part.shape[1] < size else part


@dataclass(frozen=True)
class Windows:
    """The windows of a batch of pictures, those of the same length together."""

    counts: tuple[tuple[int, int], ...]
    """How many windows have which length, in the order in which they are computed."""
    order: "Tensor | None"
    """(n,) int64: the patches in that order; None = as they are."""
    back: "Tensor | None"
    """(n,) int64: the inverse of `order`."""

    @classmethod
    def of(cls, ends: "Tensor") -> "Windows":
        """Windows by their ends, (windows + 1,) from 0. The tower gives all layers one tensor, which keeps them."""
        import torch

        cached: Windows | None = getattr(ends, "_gubs_windows", None)
        if cached:
            return cached
        places = ends.tolist()
        by_length: dict[int, list[int]] = {}
        for begin, end in itertools.pairwise(places):
            if end > begin:
                by_length.setdefault(end - begin, []).append(begin)
        counts = tuple((len(begins), length) for length, begins in by_length.items())
        order = back = None
        if len(counts) > 1:
            parts = [torch.tensor(b).unsqueeze(1) + torch.arange(length) for length, b in by_length.items()]
            order = torch.cat([p.flatten() for p in parts])
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
            order, back = order.to(ends.device), back.to(ends.device)
        made = cls(counts, order, back)
        ends._gubs_windows = made  # type: ignore[attr-defined]
        return made


def windows_attention(query: "Tensor", key: "Tensor", value: "Tensor", windows: Windows) -> "Tensor":
    """Each patch sees those of its window; all of them (n, heads, d)."""
    import torch

    if windows.order is not None:
        query, key, value = (t.index_select(0, windows.order) for t in (query, key, value))
    made, begin = [], 0
    for count, length in windows.counts:
        end = begin + count * length
        q, k, v = (t[begin:end].unflatten(0, (count, length)).transpose(1, 2) for t in (query, key, value))
        made.append(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
        begin = end
    result = torch.cat(made)
    return result if windows.back is None else result.index_select(0, windows.back)


@functools.cache
def _window_attention() -> type:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    class WindowAttention(qwen.Qwen2_5_VLVisionAttention):
        """The vision tower's attention, over all windows of the same length at once."""

        def forward(
            self,
            hidden_states: "Tensor",
            cu_seqlens: "Tensor",
            position_embeddings: "tuple[Tensor, Tensor] | None" = None,
            max_seqlen: int | None = None,  # noqa: ARG002 - ours come from the ends
            **kwargs: Any,  # noqa: ARG002
        ) -> "Tensor":
            """(n, hidden) of all patches; `cu_seqlens` are the windows' ends."""
            assert position_embeddings
            query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
            query, key = qwen.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
            made: Tensor = self.proj(windows_attention(query, key, value, Windows.of(cu_seqlens)).flatten(1))
            return made

    return WindowAttention
