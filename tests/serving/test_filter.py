"""Decisions: what a threshold does."""

import pytest

from gubs.records import Option, Task
from gubs.serving.filter import Decision, judge
from gubs.ufm.labels import OptionProbabilities


def options(**shares: float) -> OptionProbabilities:
    return OptionProbabilities({Option(name): share for name, share in shares.items()}, 1.0)


def test_the_threshold_decides_and_not_the_letter():
    asked = options(A=0.6, B=0.1, C=0.2, D=0.1)
    text = "<think>too long</think><answer>A</answer>"
    kept = judge(Task.SEQUENTIAL, asked, 0.5, text=text)
    assert (kept.decision, kept.option, kept.reason) == (Decision.KEEP, Option.A, "too long")
    assert judge(Task.SEQUENTIAL, asked, 0.4, text=text).decision is Decision.DROP, "P(skip) = 0.4 is enough"
    assert kept.skip_probability == pytest.approx(0.4)


def test_without_a_text_the_most_probable_option_counts():
    assert judge(Task.CLICK, options(A=0.3, B=0.7), 0.5).option == Option.B
