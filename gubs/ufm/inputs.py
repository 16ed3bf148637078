"""Model inputs: one module builds what vLLM and the trainer see, so that both see the same.

A `Prompt` (text, pictures) is encoded once: `Encoded` has the token ids as the engine gets them (one placeholder a
picture or video), the ids as the model computes with them (placeholders repeated), and the pixels. `for_engine` makes
the engine's request, `collate` a padded batch for the trainer. Responses are token ids on both sides.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gubs.errors import SettingsError
from gubs.ufm.settings import InputSettings

VISION_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for the pictures in a prompt's text; `fields` lets no text from outside bring one in its place."""

IMAGE, VIDEO = 1, 2
"""Token types of transformers' Qwen2.5-VL."""

_CACHED_CLIPS = 512


@dataclass(frozen=True)
class Clip:
    """Pictures of a video (an even number of frames) or a single image (a cover)."""

    key: str
    """Content hash: equal keys, equal pictures."""
    frames: npt.NDArray[np.uint8]
    """(frames, height, width, 3), RGB; multiples of 28 pixels."""
    seconds: float = 0.0
    """Time the frames span; 0 for an image."""

    @property
    def kind(self) -> Literal["image", "video"]:
        """A single picture is an image."""
        return "image" if len(self.frames) == 1 else "video"


@dataclass(frozen=True)
class Prompt:
    """A question: text with at most one `VISION_MARK`, and the pictures that belong there."""

    text: str
    clip: Clip | None = None


@dataclass(frozen=True)
class Pixels:
    """A clip as the vision tower takes it."""

    kind: Literal["image", "video"]
    values: Any
    """(patches, channels x time x patch x patch) float32 tensor."""
    grid: tuple[int, int, int]
    """Patches in time, height and width."""
    seconds_per_grid: float
    """Seconds between two steps of the grid in time."""


@dataclass(frozen=True)
class Encoded:
    """A prompt in token ids."""

    engine_ids: list[int]
    """With one placeholder for the pictures; vLLM repeats it itself."""
    ids: list[int]
    """With the placeholder repeated, one a merged patch: what the model computes with."""
    clip: Clip | None
    pixels: Pixels | None


@dataclass
class Batch:
    """Padded sequences (prompt + response) for the trainer. b sequences of at most n tokens, v different clips."""

    ids: Any
    """(b, n) int64, padded on the right."""
    positions: Any
    """(3, b, n) int64, mRoPE positions."""
    response: Any
    """(b, n - 1) bool: the logits at this place predict a token of the response."""
    vision: Any
    """(b, n) bool: the embedding at this place comes from the vision tower."""
    pixels: dict[str, Any] = field(default_factory=dict)
    """Kind -> concatenated pixel values of the different clips of that kind."""
    grids: dict[str, Any] = field(default_factory=dict)
    """Kind -> (clips, 3) int64."""
    clip_of: list[tuple[str, int] | None] = field(default_factory=list)
    """For each sequence: kind and number of its clip."""

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return int(self.ids.numel())

    def to(self, device: Any) -> "Batch":
        """The batch on a device."""
        moved = {k: v.to(device, non_blocking=True) for k, v in self.pixels.items()}
        grids = {k: v.to(device) for k, v in self.grids.items()}
        tensors = (t.to(device, non_blocking=True) for t in (self.ids, self.positions, self.response, self.vision))
        return Batch(*tensors, moved, grids, self.clip_of)


class Inputs:
    """Encodes prompts for one checkpoint."""

    def __init__(self, folder: str | Path, settings: InputSettings):
        """Loads the checkpoint's processor (tokenizer, chat template, picture settings)."""
        from transformers import AutoProcessor

        self.settings = settings
        self.processor = AutoProcessor.from_pretrained(str(folder))
        self.tokenizer = self.processor.tokenizer
        self._merge = self.processor.video_processor.merge_size**2
        self._pads = {k: self.tokenizer.convert_tokens_to_ids(f"<|{k}_pad|>") for k in ("image", "video")}
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._cache: OrderedDict[str, Pixels] = OrderedDict()

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt in token ids, as one turn of the user and the start of the model's.

        Raises:
            SettingsError: text and pictures do not belong together.
        """
        clip = prompt.clip
        before, mark, after = prompt.text.partition(VISION_MARK)
        if bool(mark) != (clip is not None) or VISION_MARK in after:
            raise SettingsError("a prompt needs one mark for its pictures, and pictures for its mark")
        text = [{"type": "text", "text": prompt.text}]
        if clip:
            text = [{"type": "text", "text": before}, {"type": clip.kind}, {"type": "text", "text": after}]
        messages = [{"role": "user", "content": text}]
        chat = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(chat, add_special_tokens=False).input_ids
        if clip is None:
            return Encoded(ids, ids, None, None)
        pixels = self.pixels(clip)
        pad, count = self._pads[clip.kind], int(np.prod(pixels.grid)) // self._merge
        if ids.count(pad) != 1:
            raise SettingsError("the chat template does not keep exactly one placeholder for the pictures")
        at = ids.index(pad)
        return Encoded(ids, ids[:at] + [pad] * count + ids[at + 1 :], clip, pixels)

    def fits(self, encoded: Encoded) -> bool:
        """Whether the prompt may be used; a longer one is dropped, never cut."""
        return len(encoded.ids) <= self.settings.max_prompt_tokens

    def pixels(self, clip: Clip) -> Pixels:
        """The clip's pixels; of clips met lately, without computing them again."""
        if found := self._cache.get(clip.key):
            self._cache.move_to_end(clip.key)
            return found
        made = self._image(clip) if clip.kind == "image" else self._video(clip)
        self._cache[clip.key] = made
        if len(self._cache) > _CACHED_CLIPS:
            self._cache.popitem(last=False)
        return made

    def for_engine(self, encoded: Encoded) -> dict[str, Any]:
        """The prompt as vLLM takes it."""
        request: dict[str, Any] = {"prompt_token_ids": encoded.engine_ids}
        clip = encoded.clip
        if clip is None:
            return request
        data = clip.frames[0] if clip.kind == "image" else (clip.frames, _metadata(clip))
        request["multi_modal_data"] = {clip.kind: [_as_image(data) if clip.kind == "image" else data]}
        request["multi_modal_uuids"] = {clip.kind: [clip.key]}
        request["mm_processor_kwargs"] = {"size": _size(clip)}
        return request

    def answer_ids(self, text: str) -> list[int]:
        """A whole answer as the model should write it: its text and the end of the turn."""
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.end]

    def text(self, response: Sequence[int]) -> tuple[str, bool]:
        """A response as text, and whether the model ended it by itself."""
        ids = list(response)
        finished = bool(ids) and ids[-1] == self.end
        return self.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False), finished

    def collate(self, sequences: Sequence[tuple[Encoded, Sequence[int]]], rope: Any) -> Batch:
        """Pads sequences (prompt, response) on the right; every different clip goes in once.

        Args:
            sequences: at least one.
            rope: the model's `get_rope_index`, which knows mRoPE.
        """
        import torch

        size = max(len(e.ids) + len(r) for e, r in sequences)
        ids = torch.full((len(sequences), size), self.end, dtype=torch.long)
        types = torch.zeros((len(sequences), size), dtype=torch.int)
        response = torch.zeros((len(sequences), size - 1), dtype=torch.bool)
        clips: dict[tuple[str, str], int] = {}
        kinds: dict[str, list[Pixels]] = {"image": [], "video": []}
        clip_of: list[tuple[str, int] | None] = []
        for row, (encoded, answer) in enumerate(sequences):
            whole = torch.tensor([*encoded.ids, *answer])
            ids[row, : len(whole)] = whole
            response[row, len(encoded.ids) - 1 : len(whole) - 1] = True
            clip_of.append(_place(encoded, clips, kinds))
            if encoded.clip:
                pad = self._pads[encoded.clip.kind]
                types[row, : len(encoded.ids)][whole[: len(encoded.ids)] == pad] = _TYPES[encoded.clip.kind]
        positions = _positions(rope, ids, types, [e.pixels for e, _ in sequences])
        pixels = {k: torch.cat([p.values for p in found]) for k, found in kinds.items() if found}
        grids = {k: torch.tensor([p.grid for p in found]) for k, found in kinds.items() if found}
        return Batch(ids, positions, response, types > 0, pixels, grids, clip_of)

    def _video(self, clip: Clip) -> Pixels:
        import torch

        frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
        out = self.processor.video_processor(
            videos=[frames], do_sample_frames=False, size=_size(clip), cap_pixels_per_frame=False, return_tensors="pt"
        )
        grid = tuple(out["video_grid_thw"][0].tolist())
        fps = _metadata(clip)["fps"]
        return Pixels("video", out["pixel_values_videos"], grid, self.processor.video_processor.temporal_patch_size / fps)

    def _image(self, clip: Clip) -> Pixels:
        out = self.processor.image_processor(images=[_as_image(clip.frames[0])], size=_size(clip), return_tensors="pt")
        return Pixels("image", out["pixel_values"], tuple(out["image_grid_thw"][0].tolist()), 0.0)


_TYPES = {"image": IMAGE, "video": VIDEO}


def _as_image(frame: npt.NDArray[np.uint8]) -> Any:
    from PIL import Image

    return Image.fromarray(frame)


def _size(clip: Clip) -> dict[str, int]:
    """A pixel budget that leaves the stored frames as they are: they were brought to their size when decoded."""
    pixels = int(clip.frames.shape[1] * clip.frames.shape[2])
    return {"shortest_edge": min(pixels, 28 * 28), "longest_edge": pixels}


def _metadata(clip: Clip) -> dict[str, Any]:
    count = len(clip.frames)
    return {
        "total_num_frames": count,
        "fps": count / (clip.seconds or count / 2.0),
        "duration": clip.seconds or count / 2.0,
        "video_backend": "gubs",
        "frames_indices": list(range(count)),
        "do_sample_frames": False,
    }


def _place(
    encoded: Encoded, clips: dict[tuple[str, str], int], kinds: dict[str, list[Pixels]]
) -> tuple[str, int] | None:
    """Kind and number of the sequence's clip among the different ones."""
    if encoded.clip is None or encoded.pixels is None:
        return None
    kind = encoded.clip.kind
    key = (kind, encoded.clip.key)
    if key not in clips:
        clips[key] = len(kinds[kind])
        kinds[kind].append(encoded.pixels)
    return kind, clips[key]


def _positions(rope: Any, ids: Any, types: Any, pixels: Sequence[Pixels | None]) -> Any:
    import torch

    grids = {k: [p.grid for p in pixels if p and p.kind == k] for k in ("image", "video")}
    if not any(grids.values()):
        return torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, ids.shape[0], -1)
    seconds = [p.seconds_per_grid for p in pixels if p and p.kind == "video"]
    positions, _ = rope(
        ids,
        types,
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
    )
    return positions
