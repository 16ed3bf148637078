"""The policy's forward pass: log-probabilities of responses, each given its own prompt.

The vision tower runs once for every different clip of a batch, however many sequences show it, and the vocabulary is
only computed at the places of responses: the six samples of a GA-GRPO group share one clip. Answers to the same prompt
can stand behind it in one row (see `Batch`): then a prompt is computed once, not once an answer.
"""

from typing import Any

from gubs.ufm.inputs import Batch


def hidden_states(model: Any, batch: Batch, *, vision: bool = True) -> Any:
    """Last hidden states (b, n, hidden).

    Args:
        model: a Qwen2_5_VLForConditionalGeneration.
        batch: on the model's device.
        vision: the run trains the vision tower; then it takes part in the graph of every batch, also of one without
            pictures, so that all ranks reduce the same gradients in the same order.
    """
    core = model.model
    embedded = core.get_input_embeddings()(batch.ids)
    if batch.pixels:
        embedded = embedded.masked_scatter(batch.vision.unsqueeze(-1), _vision(core, batch).to(embedded.dtype))
    if vision and not {"video", "image"} & set(batch.pixels):
        embedded = embedded + 0.0 * _nothing(core).sum().to(embedded.dtype)
    return core.language_model(
        inputs_embeds=embedded, position_ids=batch.positions, attention_mask=batch.attention, use_cache=False
    ).last_hidden_state


def response_logits(model: Any, batch: Batch, *, vision: bool = True) -> Any:
    """Logits (tokens, vocabulary) at every place that predicts a token of a response, sequence by sequence."""
    hidden = hidden_states(model, batch, vision=vision)
    return model.lm_head(hidden.flatten(0, 1)[batch.predict])


def response_ids(batch: Batch) -> Any:
    """The response tokens (tokens,), in the order of `response_logits`."""
    return batch.targets


def _vision(core: Any, batch: Batch) -> Any:
    """Embeddings for all vision places, in the order of the sequences."""
    import torch

    features: dict[str, Any] = {}
    if "image" in batch.pixels:
        features["image"] = core.get_image_features(batch.pixels["image"], batch.grids["image"]).pooler_output
    if "video" in batch.pixels:
        features["video"] = core.get_video_features(batch.pixels["video"], batch.grids["video"]).pooler_output
    return torch.cat([features[place[0]][place[1]] for place in batch.clip_of if place])


def _nothing(core: Any) -> Any:
    """The tower's output for the smallest black picture."""
    import torch

    config = core.config.vision_config
    size = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    weight = next(core.visual.parameters())
    pixels = torch.zeros(size * size, width, dtype=weight.dtype, device=weight.device)
    grid = torch.tensor([[1, size, size]], device=weight.device)
    return torch.cat(tuple(core.get_image_features(pixels, grid).pooler_output))
