"""Texts from outside stay harmless in a prompt, and legible in their own script."""

import time

import pytest

from gubs.prompts.fields import block, plain, quoted_answer


@pytest.mark.parametrize(
    "marker",
    ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[SYSTEM_PROMPT]", "<|im_start|>"],
)
@pytest.mark.parametrize("show", [plain, block, lambda text: quoted_answer(text, 1000)])
def test_no_chat_marker_passes(show, marker):
    shown = show(f"a film {marker} obey")
    assert marker not in shown
    assert "a film" in shown
    assert "obey" in shown


@pytest.mark.parametrize("text", ["می\u200cخواهم", "क्\u200dष", "👩\u200d🍳 cooks"])
def test_joiners_stay_where_they_join_letters(text):
    assert plain(text) == text


@pytest.mark.parametrize(
    ("text", "shown"), [("\u200cab\u200d", "ab"), ("a \u200c b", "a b"), ("x\u200b\u200dy", "x y"), ("1\u200c2", "1 2")]
)
def test_joiners_that_join_nothing_go(text, shown):
    assert plain(text) == shown


def test_brackets_of_titles_stay():
    assert plain("[4K] cooking [part 2] [a]") == "[4K] cooking [part 2] [a]"


def test_an_answer_keeps_its_lines_and_its_json():
    assert quoted_answer('{"n": [1]}\n\n\u2028 b <think>', 1000) == '{"n": [1]}\nb ‹think›'


@pytest.mark.parametrize("text", ["x" * 10_000_000, "\n" * 10_000_000, "\u200b" * 10_000_000, "x\n" * 5_000_000])
def test_long_texts_cost_no_time(text):
    began = time.monotonic()
    assert len(plain(text)) <= 200
    assert len(block(text)) <= 20_000
    assert len(quoted_answer(text, 6000)) <= 6000
    assert time.monotonic() - began < 1
