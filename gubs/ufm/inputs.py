"""Model inputs: one module builds what vLLM and the trainer see, so that both see the same.

A `Prompt` (text, pictures) is encoded once: `Encoded` has the token ids as the engine gets them (one placeholder a
picture or video), the ids as the model computes with them (placeholders repeated), and the pixels. `for_engine` makes
the engine's request, `collate` a padded batch for the trainer. Responses are token ids on both sides.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gubs.errors import SettingsError
from gubs.prompts.fields import PICTURES
from gubs.ufm.settings import InputSettings

VISION_MARK = PICTURES
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
        ids, positions, response, vision = (
            t.to(device, non_blocking=True) for t in (self.ids, self.positions, self.response, self.vision)
        )
        return Batch(ids, positions, response, vision, moved, grids, self.clip_of)


class Inputs:
    """Encodes prompts for one checkpoint."""

    def __init__(self, folder: str | Path, settings: InputSettings):
        """Loads the checkpoint's processor (tokenizer, chat template, picture settings)."""
        from transformers import AutoProcessor

        self.settings = settings
        self.processor = AutoProcessor.from_pretrained(str(folder))
        self.tokenizer = self.processor.tokenizer
        self._merge = int(self.processor.video_processor.merge_size)
        vision = json.loads((Path(folder) / "config.json").read_text())["vision_config"]
        self._per_second = float(vision.get("tokens_per_second", 4))
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
        pad, count = self._pads[clip.kind], int(np.prod(pixels.grid)) // self._merge**2
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
        data = _as_image(clip.frames[0]) if clip.kind == "image" else (clip.frames, _metadata(clip))
        request["multi_modal_data"] = {clip.kind: [data]}
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

    def collate(self, sequences: Sequence[tuple[Encoded, Sequence[int]]]) -> Batch:
        """Pads one or more sequences (prompt, response) on the right; every different clip goes in once."""
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
        positions = np.stack(
            [
                mrope_positions(t, e.pixels, self._merge, self._per_second)
                for t, (e, _) in zip(types.numpy(), sequences, strict=True)
            ],
            axis=1,
        )
        pixels = {k: torch.cat([p.values for p in found]) for k, found in kinds.items() if found}
        grids = {k: torch.tensor([p.grid for p in found]) for k, found in kinds.items() if found}
        return Batch(ids, torch.from_numpy(positions), response, types > 0, pixels, grids, clip_of)

    def _video(self, clip: Clip) -> Pixels:
        import torch

        frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
        out = self.processor.video_processor(
            videos=[frames], do_sample_frames=False, size=_size(clip), cap_pixels_per_frame=False, return_tensors="pt"
        )
        grid = tuple(out["video_grid_thw"][0].tolist())
        seconds = self.processor.video_processor.temporal_patch_size / _metadata(clip)["fps"]
        return Pixels("video", out["pixel_values_videos"], grid, seconds)

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


def mrope_positions(
    types: npt.NDArray[np.int64], pixels: Pixels | None, merge: int, tokens_per_second: float
) -> npt.NDArray[np.int64]:
    """Positions (3, n) in time, height and width of one sequence with at most one clip.

    Text goes on from the largest position so far, in whichever dimension, as in the released model and in vLLM.
    (`get_rope_index` of transformers 5 goes on from the largest spatial one, which differs for clips that last longer
    than they are wide: log-probabilities of trainer and engine would be apart.)

    Args:
        types: (n,) 0 text, otherwise vision.
        pixels: the clip.
        merge: patches merged in each direction.
        tokens_per_second: steps of the time dimension a second.
    """
    n = len(types)
    where = np.flatnonzero(types)
    if pixels is None or not len(where):
        return np.broadcast_to(np.arange(n), (3, n)).copy()
    t, h, w = pixels.grid[0], pixels.grid[1] // merge, pixels.grid[2] // merge
    at = where[0]
    clip = np.indices((t, h, w))
    step = 1.0 if pixels.kind == "image" else float(np.float32(pixels.seconds_per_grid)) * tokens_per_second
    clip[0] = (clip[0] * step).astype(np.int64)
    clip = clip.reshape(3, -1) + at
    before, after = np.arange(at), np.arange(n - at - clip.shape[1]) + clip.max() + 1
    return np.concatenate(
        [np.broadcast_to(before, (3, len(before))), clip, np.broadcast_to(after, (3, len(after)))], axis=1
    )
