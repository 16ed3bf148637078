import pytest

from gubs.prompts.answers import Failure
from gubs.records import Option, Task
from gubs.ufm.rewards import reward_answer
from gubs.ufm.settings import RewardSettings

ALL = RewardSettings()


def answered(option, think="he likes it"):
    return f"<think>{think}</think><answer>{option}</answer>"


@pytest.mark.parametrize(
    ("text", "gold", "parts"),
    [
        (answered("A"), "A", (1, 1, 1)),
        (answered("B"), "B", (1, 1, 1)),
        (answered("C"), "B", (1, 1, 0)),  # right that it is skipped, wrong why
        (answered("A"), "B", (1, 0, 0)),
        (answered("D"), "A", (1, 0, 0)),
        (answered("E"), "A", (1, 0, 0)),  # no option, but the form is right
        ("<answer>B</answer>", "B", (0, 1, 1)),  # a broken form loses only the format reward
        (answered("B") + " really", "B", (0, 1, 1)),
        ("B", "B", (0, 0, 0)),
        ("", "A", (0, 0, 0)),  # saying nothing is not "did not skip"
        ("<answer>A</answer><answer>B</answer>", "A", (0, 0, 0)),  # two answers are none
    ],
)
def test_parts_in_the_sequential_task(text, gold, parts):
    """Wrong here: another reward than Eq. 4's is trained on."""
    got, _ = reward_answer(text, Option(gold), Task.SEQUENTIAL, ALL, finished=True)
    assert (got.format, got.skip, got.choice) == parts
    assert got.total == sum(parts)


@pytest.mark.parametrize("gold", ["A", "B"])
@pytest.mark.parametrize("answer", ["A", "B"])
def test_in_the_click_task_skip_equals_choice(gold, answer):
    got, _ = reward_answer(answered(answer), Option(gold), Task.CLICK, ALL, finished=True)
    assert got.skip == got.choice == float(gold == answer), "with two options both parts ask the same thing"


def test_click_answers_of_the_other_task_are_no_options():
    got, reading = reward_answer(answered("C"), Option.B, Task.CLICK, ALL, finished=True)
    assert (got.format, got.skip, got.choice) == (1, 0, 0)
    assert reading.failure is Failure.BAD_OPTION


def test_truncated_answers_get_no_format_reward():
    """Wrong here: rambling until the token limit pays."""
    whole, _ = reward_answer(answered("B"), Option.B, Task.SEQUENTIAL, ALL, finished=False)
    assert (whole.format, whole.skip, whole.choice) == (0, 1, 1)
    cut, reading = reward_answer("<think>he", Option.B, Task.SEQUENTIAL, ALL, finished=False)
    assert cut.total == 0
    assert reading.failure is Failure.TRUNCATED


@pytest.mark.parametrize("part", ["format", "skip", "choice"])
def test_parts_that_are_off_count_nothing(part):
    """Wrong here: an ablation of Table 10 still trains on the part it removes."""
    got, _ = reward_answer(answered("B"), Option.B, Task.SEQUENTIAL, RewardSettings(**{part: False}), finished=True)
    assert getattr(got, part) == 0
    assert got.total == 2


def test_gold_of_another_task_is_refused():
    with pytest.raises(ValueError, match="click task"):
        reward_answer(answered("A"), Option.C, Task.CLICK, ALL, finished=True)
