"""The checkpoint `small`: SmolLM2's text model under a vision tower."""

import pytest
import torch
from ufm_helpers import text_prompt, tiny_inputs, video_prompt

from gubs.llm.embedded import prepare_embedded_model
from gubs.ufm import model as models
from gubs.ufm.settings import ModelSettings
from gubs.ufm.trainer import logprobs


@pytest.mark.slow
@torch.no_grad()
def test_small_says_what_its_text_model_says_and_sees_pictures(tmp_path):
    """On text the graft is exact: mRoPE is RoPE there, and a bias of zero is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = prepare_embedded_model()
    folder = models.init("small", tmp_path / "small")
    donor = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    small = models.load(folder, ModelSettings(size="small", dtype="float32"))
    text = "Interests: music, travel. The video is about"
    ids = torch.tensor([AutoTokenizer.from_pretrained(source)(text).input_ids])
    wanted = donor(ids).logits
    assert (small(input_ids=ids).logits[..., : wanted.shape[-1]] - wanted).abs().max() < 1e-3
    inputs = tiny_inputs(folder)
    answer = inputs.answer_ids("<think>long</think><answer>D</answer>")
    batch = inputs.collate([(inputs.encode(p), answer) for p in (text_prompt(), video_prompt())])
    logps = logprobs(small, batch, vision=True)
    assert logps.shape == (2 * len(answer),)
    assert logps.isfinite().all()
