"""The policy's forward pass: log-probabilities of responses, each given its own prompt.

The vision tower runs once per different clip of a batch, however many sequences show it, and the vocabulary is only
computed where responses are predicted: the six samples of a GA-GRPO group share one clip. Responses to the same prompt
can share a row (see `Batch`); the prompt is then computed once instead of once per response.
"""

from typing import TYPE_CHECKING

from gubs.ufm import attention
from gubs.ufm.inputs import Batch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel


def hidden_states(model: "Qwen2_5_VLForConditionalGeneration", batch: Batch, *, vision: bool = True) -> "Tensor":
    """Last hidden states (b, n, hidden).

    Args:
        model: the policy.
        batch: on the model's device.
        vision: the run trains the vision tower, so the tower takes part in the graph of every batch, also of one
            without pictures: all ranks then reduce the same gradients in the same order.
    """
    core = model.model
    embedded = core.get_input_embeddings()(batch.ids)
    if batch.pixels:
        embedded = embedded.masked_scatter(batch.vision.unsqueeze(-1), _vision(core, batch).to(embedded.dtype))
    elif vision:
        embedded = embedded + 0.0 * _black(core).sum().to(embedded.dtype)
    ours = core.config.text_config._attn_implementation == attention.NAME
    assert ours or not batch.rows, "only our own attention keeps answers in one row apart"
    # a mapping keeps transformers from making a mask
    more = {"attention_mask": {"full_attention": None}, "rows": batch.rows} if ours else {}
    return core.language_model(
        inputs_embeds=embedded, position_ids=batch.positions, use_cache=False, **more
    ).last_hidden_state


def response_logits(model: "Qwen2_5_VLForConditionalGeneration", batch: Batch, *, vision: bool = True) -> "Tensor":
    """Logits (tokens, vocabulary) at every place that predicts a response token, in the order of `batch.targets`."""
    hidden = hidden_states(model, batch, vision=vision)
    return model.lm_head(hidden.flatten(0, 1)[batch.predict])


def _vision(core: "Qwen2_5_VLModel", batch: Batch) -> "Tensor":
    """Embeddings for all vision places, in the order of the rows."""
    import torch

    towers = {"image": core.get_image_features, "video": core.get_video_features}
    features = {kind: towers[kind](pixels, batch.grids[kind]).pooler_output for kind, pixels in batch.pixels.items()}
    return torch.cat([features[clip[0]][clip[1]] for clip in batch.clip_of if clip])


def _black(core: "Qwen2_5_VLModel") -> "Tensor":
    """The tower's output for the smallest black picture."""
    import torch

    config = core.visual.config
    size = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    weight = next(core.visual.parameters())
    grid = torch.tensor([[1, size, size]], device=weight.device)
    return torch.cat(tuple(core.get_image_features(weight.new_zeros(size * size, width), grid).pooler_output))
