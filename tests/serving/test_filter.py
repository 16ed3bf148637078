"""Decisions: what a threshold does."""

import pytest

from gubs.records import Option, Task
from gubs.serving.filter import Decision, decide
from gubs.ufm.labels import OptionProbabilities, mean_options


def options(**shares: float) -> OptionProbabilities:
    return OptionProbabilities({Option(name): share for name, share in shares.items()}, 1.0)


def test_the_threshold_decides_and_not_the_letter():
    asked = options(A=0.6, B=0.1, C=0.2, D=0.1)
    text = "<think>too long</think><answer>A</answer>"
    kept = decide(Task.SEQUENTIAL, asked, 0.5, [(text, True)])
    assert (kept.decision, kept.option, kept.reason) == (Decision.KEEP, Option.A, "too long")
    assert decide(Task.SEQUENTIAL, asked, 0.4, [(text, True)]).decision is Decision.DROP, "P(skip) = 0.4 is enough"
    assert kept.skip_probability == pytest.approx(0.4)


def test_the_reason_that_is_shown_is_one_for_the_decision():
    texts = [(f"<think>{t}</think><answer>{o}</answer>", True) for t, o in (("?", "X"), ("fits", "A"), ("dull", "C"))]
    mixed = options(A=0.6, B=0.1, C=0.2, D=0.1)
    kept, dropped = decide(Task.SEQUENTIAL, mixed, 0.5, texts), decide(Task.SEQUENTIAL, mixed, 0.3, texts)
    assert (kept.option, kept.reason) == (Option.A, "fits")
    assert (dropped.option, dropped.reason) == (Option.C, "dull")
    assert decide(Task.SEQUENTIAL, mixed, 0.3, texts[:2]).reason == "fits", "none agrees"
    assert decide(Task.SEQUENTIAL, mixed, 0.3, texts[:1]).option == Option.A, "none names an option: the most probable"


def test_several_answers_count_by_their_mean():
    sure, unsure = options(A=1.0, B=0.0), options(A=0.5, B=0.5)
    assert mean_options([sure, None, unsure]) == options(A=0.75, B=0.25)
    assert mean_options([None]) is None


def test_without_a_text_the_most_probable_option_counts():
    assert decide(Task.CLICK, options(A=0.3, B=0.7), 0.5).option == Option.B
