"""Decisions: what a threshold does, how it is chosen, how good a ranking is."""

import math

import pytest

from gubs.records import Option, Task
from gubs.serving.filter import Decision, auc, choose_threshold, judge
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


def test_the_threshold_has_the_best_balanced_accuracy_and_drops_least():
    chosen = choose_threshold([0.1, 0.2, 0.6, 0.7, 0.9], [False, False, True, False, True])
    assert chosen.value == pytest.approx(0.6)
    assert chosen.balanced_accuracy == pytest.approx((1 + 2 / 3) / 2)
    assert (chosen.kept, chosen.lost, chosen.n) == (pytest.approx(0.4), pytest.approx(1 / 3), 5)


def test_a_useless_score_drops_nothing():
    chosen = choose_threshold([0.5] * 6, [True, False] * 3)
    assert chosen.kept == 1.0
    assert chosen.balanced_accuracy == 0.5
    assert math.isfinite(chosen.value), "it is written as JSON"


@pytest.mark.parametrize("happened", [[True, True], [False, False], []])
def test_a_threshold_needs_both_kinds(happened):
    with pytest.raises(ValueError, match="skipped and targets that were not"):
        choose_threshold([0.5] * len(happened), happened)


def test_auc():
    assert auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == pytest.approx(0.75)
    assert auc([0.5, 0.5], [True, False]) == 0.5
    assert math.isnan(auc([0.5, 0.6], [True, True]))
