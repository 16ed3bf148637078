"""Attention without masks and loops computes what masks and loops compute."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gubs.ufm import attention
from gubs.ufm.attention import Row, Windows, install, rows_attention, windows_attention
from gubs.ufm.model import load
from gubs.ufm.settings import ModelSettings

rows_of_answers = st.lists(
    st.builds(Row, st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)),
    min_size=1,
    max_size=3,
)


def masked(query, key, value, rows):
    """The same with a mask that says what sees what."""
    size = query.shape[2]
    mask = torch.ones(size, size, dtype=torch.bool).tril().repeat(len(rows), 1, 1)
    for number, row in enumerate(rows):
        begin = row.prompt
        for length in row.answers:
            mask[number, begin : begin + length, row.prompt : begin] = False
            begin += length
    module = SimpleNamespace(num_key_value_groups=2)
    return sdpa_attention_forward(module, query, key, value, mask.unsqueeze(1), scaling=0.3)[0]


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_answers, padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_answers_behind_a_prompt_see_what_a_mask_would_let_them_see(rows, padding, seed):
    """Values and gradients, of rows of any lengths, with answers of any number, also empty ones."""
    size = max(row.prompt + sum(row.answers) for row in rows) + padding
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(len(rows), heads, size, 8, generator=draw, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    module = SimpleNamespace(num_key_value_groups=2)
    ours = rows_attention(module, query, key, value, None, rows=tuple(rows), scaling=0.3)[0]
    theirs = masked(query, key, value, rows)
    used = torch.zeros(len(rows), size, 1, 1, dtype=torch.bool)
    for number, row in enumerate(rows):
        used[number, : row.prompt + sum(row.answers)] = True
    assert ours.shape == theirs.shape
    assert torch.allclose(ours * used, theirs * used)
    weights = torch.randn(ours.shape, generator=draw, dtype=torch.float64) * used
    for own, plain in zip(
        torch.autograd.grad((ours * weights).sum(), (query, key, value)),
        torch.autograd.grad((theirs * weights).sum(), (query, key, value)),
        strict=True,
    ):
        assert torch.allclose(own, plain)


def test_a_gpu_gets_the_mask_by_name():
    """A mask that is written out would rule out flash attention there."""
    on_gpu = attention._behind(3, 5, torch.device("cuda"))
    assert isinstance(on_gpu, CausalBias)
    assert on_gpu._materialize().equal(attention._behind(3, 5, torch.device("cpu")))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 4, 6]), min_size=1, max_size=8).filter(any), seed=st.integers(0, 99))
def test_windows_of_one_length_are_computed_together(lengths, seed):
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(int(ends[-1]), 3, 8, generator=draw) for _ in range(3))
    parts = [tuple(t[a:b].transpose(0, 1) for t in (query, key, value)) for a, b in ends.unfold(0, 2, 1).tolist()]
    one_by_one = torch.cat([sdpa(q, k, v).transpose(0, 1) for q, k, v in parts if q.shape[1]])
    windows = Windows.of(ends)
    assert len(windows.counts) == len(set(lengths) - {0})
    assert torch.allclose(windows_attention(query, key, value, windows), one_by_one, atol=1e-6)
    assert Windows.of(ends) is windows, "each layer would ask the GPU again"


@pytest.mark.parametrize("side", [4, 10, 22])
def test_the_tower_is_that_of_transformers(tiny, side):
    """Also where the windows at the edges are smaller; gradients too."""
    config = AutoConfig.from_pretrained(tiny)
    torch.manual_seed(0)
    plain = Qwen2_5_VLForConditionalGeneration(config)
    ours = Qwen2_5_VLForConditionalGeneration(config)
    ours.load_state_dict(plain.state_dict())
    install(ours)
    grid = torch.tensor([[2, side, side], [1, 4, 8]])
    width = 3 * 2 * config.vision_config.patch_size**2
    pixels = torch.randn(int(grid.prod(1).sum()), width)
    results = []
    for model in (plain, ours):
        made = torch.cat(list(model.model.get_video_features(pixels, grid).pooler_output))
        (made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum().backward()
        results.append((made, {n: p.grad for n, p in model.model.visual.named_parameters()}))
    (wanted, gradients), (made, ours_gradients) = results
    assert torch.allclose(made, wanted, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(ours_gradients[name], gradient, atol=1e-3 * float(gradient.abs().max() + 1e-3)), name


def test_only_sdpa_is_replaced(tiny):
    eager = load(tiny, ModelSettings(dtype="float32", attention="eager"))
    assert eager.config.text_config._attn_implementation == "eager"
    assert type(eager.model.visual.blocks[0].attn).__name__ == "Qwen2_5_VLVisionAttention"
    ours = load(tiny, ModelSettings(dtype="float32"))
    assert ours.config.text_config._attn_implementation == attention.NAME
