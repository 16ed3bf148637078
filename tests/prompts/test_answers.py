"""The UFM's answers are read strictly, in linear time, with a cause for each failure; written answers can be read."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gubs.prompts.answers import TAGS, Failure, as_answer, quiet_tags, read_answer, read_option
from gubs.prompts.options import OPTION_TEXTS
from gubs.records import TASK_OPTIONS, Option, Task

FOUR = TASK_OPTIONS[Task.SEQUENTIAL]
TWO = TASK_OPTIONS[Task.CLICK]


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("<think>t</think><answer>A</answer>", "A"),
        ("  <think>\nt\n\nu</think>\n\n<answer> B </answer>\n", "B"),
        ("<think>t</think> <answer>A. The user will not fast-skip this video. </answer>", "A"),
        ("<think>t</think><answer>C: the algorithm missed</answer>", "C"),
        ("<think>t</think><answer>D)</answer>", "D"),
        ("<think>t</think><answer>B. A flaw of the video</answer>", "B"),
        ("<think>想一想 < 5 s</think><answer>A。用户会看完</answer>", "A"),
    ],
)
def test_right_answers(text, option):
    read = read_answer(text, FOUR)
    assert (read.option, read.failure) == (Option(option), None)
    assert read.ok
    assert read.think


@pytest.mark.parametrize(
    ("text", "failure", "option"),
    [
        ("", "empty", None),
        ("  \n ", "empty", None),
        ("A", "no_think", None),
        ("<answer>A</answer>", "no_think", "A"),
        ("<think> </think><answer>A</answer>", "no_think", "A"),
        ("<think>t<answer>A</answer>", "no_think", "A"),
        ("t</think><answer>A</answer>", "no_think", "A"),
        ("<think>t</think>", "no_answer", None),
        ("<think>t</think>A", "no_answer", None),
        ("<think>t", "truncated", None),
        ("<think>t</think><answer>A", "truncated", None),
        ("<think>t</think><answer>A</ans", "truncated", None),
        ("<answer>A</answer><think>t</think>", "out_of_order", "A"),
        ("<think>t<answer>A</think></answer>", "out_of_order", None),
        ("<think>t</think></answer><answer>A", "out_of_order", None),
        ("<think>a<think>b</think><answer>A</answer>", "repeated_tag", "A"),
        ("<think>t</think><answer>A</answer><answer>B</answer>", "repeated_tag", None),
        ("So: <think>t</think><answer>A</answer>", "text_before_think", "A"),
        ("<think>t</think>so<answer>A</answer>", "text_between", "A"),
        ("<think>t</think><answer>A</answer>.", "text_after_answer", "A"),
        ("<think>t</think><answer></answer>", "bad_option", None),
        ("<think>t</think><answer>E</answer>", "bad_option", None),
        ("<think>t</think><answer>AB</answer>", "bad_option", None),
        ("<think>t</think><answer>A or B</answer>", "bad_option", None),
        ("<think>t</think><answer>A. or B</answer>", "bad_option", None),
        ("<think>t</think><answer>B. A.</answer>", "bad_option", None),
        ("<think>t</think><answer>A/B</answer>", "bad_option", None),
        ("<think>t</think><answer>The user leaves</answer>", "bad_option", None),
    ],
)
def test_wrong_answers_by_cause(text, failure, option):
    read = read_answer(text, FOUR)
    assert read.failure == failure
    assert read.option == option, "the choice counts only if there is exactly one answer part"
    assert not read.ok
    assert read.well_formed is (failure == "bad_option"), "r_format asks for the form, not for the option"


def test_options_of_the_other_task_are_refused():
    assert read_answer("<think>t</think><answer>C</answer>", TWO).failure is Failure.BAD_OPTION


def test_token_limit_is_named_as_the_cause():
    assert read_answer("<think>t</think>", FOUR, finished=False).failure is Failure.TRUNCATED
    assert read_answer("<think>t</think><answer>A</answer>", FOUR, finished=False).ok, "complete despite the limit"


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("b", "B"),
        ("(B)", "B"),
        ("( b )", "B"),
        ("**B**", "B"),
        ("**B.** Content", "B"),
        ("`B`", "B"),
        ('"B"', "B"),
        ("# B", "B"),
        ("[B]", "B"),
        ("Option B", "B"),
        ("option b: the content", "B"),
        ("Answer: B", "B"),
        ("The answer is B.", "B"),
        ("My final answer is **B**", "B"),
        ("The answer is (B) content", "B"),
        ("B - because the content is vulgar", "B"),
        ("B – because", "B"),
        ("B, the content", "B"),
        ("B; content", "B"),
        ("B Content", "B"),
        ("B content-driven skip", "B"),
        ("b, a misleading title", "B"),
        ("B，内容", "B"),
        ("A The user keeps watching", "A"),
        ("a", "A"),
        ("A user leaves", None),
        ("a user leaves", None),
        ("AB", None),
        ("Because", None),
        ("be careful", None),
        ("d'accord", None),
        ("B or C", None),
        ("b or c", None),
        ("B, C", None),
        ("B/C", None),
        ("Option B or C", None),
        ("Options B and C", None),
        ("Neither", None),
        ("-", None),
        ("**", None),
        ("", None),
        ("Option", None),
    ],
)
def test_options_are_read_as_a_person_would(text, option):
    assert read_option(text, FOUR) == option


@pytest.mark.parametrize("choice", ["b", "(B)", "Option B", "B - because", "B Content"])
def test_a_lenient_reading_of_options_keeps_the_form_strict(choice):
    assert read_answer(f"<think>t</think><answer>{choice}</answer>", FOUR).option is Option.B
    for broken in (f"<answer>{choice}</answer>", f"<think>t</think> {choice}", f"<think>t</think><answer>{choice}"):
        assert not read_answer(broken, FOUR).well_formed


@pytest.mark.parametrize("task", list(Task))
def test_every_option_is_accepted_with_our_own_text(task):
    for option, text in OPTION_TEXTS[task].items():
        for form in (f"{option}: {text}", f"{option}. {text}", f"{option}"):
            assert read_option(form, TASK_OPTIONS[task]) is option


@given(st.text(), st.sampled_from(FOUR))
def test_written_answers_can_be_read(think, option):
    if not quiet_tags(think).strip():
        with pytest.raises(ValueError, match="thinking"):
            as_answer(think, option)
        return
    read = read_answer(as_answer(think, option), FOUR)
    assert (read.option, read.failure) == (option, None)
    assert read.think == quiet_tags(think).strip()


def test_written_thinking_cannot_close_itself_or_open_a_chat_marker():
    text = as_answer("a title said </think><answer>A</answer><|im_end|> but 3 < 5", Option.B)
    assert read_answer(text, FOUR).option is Option.B
    assert "<|" not in text
    assert "3 < 5" in text


@given(st.lists(st.sampled_from([*TAGS, "A", "B. x", " ", "<", "think>", "\n"]), max_size=12).map("".join))
def test_reading_never_raises_and_ok_means_the_strict_form(text):
    read = read_answer(text, FOUR)
    if read.ok:
        assert [text.count(tag) for tag in TAGS] == [1, 1, 1, 1]
        assert text.strip().startswith("<think>")
        assert text.strip().endswith("</answer>")


@pytest.mark.parametrize("unit", ["<think>", "</think><answer>", "<", "<think><answer>A", " ", "<answer>A. ", "\n"])
def test_hostile_texts_take_linear_time(unit):
    text = (unit * 1_000_000)[:1_000_000]
    began = time.perf_counter()
    read_answer(text, FOUR)
    read_answer(f"<think>{text}", FOUR)
    read_answer(f"<think>t</think><answer>A.{text}</answer>", FOUR)
    assert time.perf_counter() - began < 2.0
