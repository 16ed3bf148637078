"""Verdicts: right about differences that are there, silent about those that are not, and corrected for many."""

import time

import numpy as np
import pytest

from gubs.evaluate.metrics import Predictions, evaluate, statistic_of, user_sums
from gubs.evaluate.verdicts import Word, by_predictor, holm, paired, verdicts, with_holm
from gubs.records import Task


def predictor(right: float, users: int, seed: int, each: int = 20) -> Predictions:
    rng = np.random.default_rng(seed)
    gold = np.random.default_rng(0).random(users * each) < 0.5
    answers = np.where(rng.random(len(gold)) < right, gold, ~gold)
    letters = np.array(["B", "A"])
    user = [f"{u:05}" for u in np.repeat(np.arange(users), each)]
    return Predictions(user, letters[gold.astype(int)].tolist(), letters[answers.astype(int)].tolist(), Task.CLICK)


def test_a_clear_difference_is_better_and_its_mirror_worse():
    two = {"good": predictor(0.8, 200, 1), "poor": predictor(0.7, 200, 2)}
    better, worse = verdicts(two, [("good", "poor"), ("poor", "good")], "click_acc", resamples=400)
    assert (better.word, worse.word) == (Word.BETTER, Word.WORSE)
    assert better.low < 0.1 < better.high
    assert better.difference == -worse.difference
    assert better.p_holm < 0.02
    assert better.effect > 0.3


def test_users_of_one_class_count_too():
    two = {"a": predictor(0.8, 40, 1, each=1), "b": predictor(0.7, 40, 2, each=1)}
    (v,) = verdicts(two, [("a", "b")], "click_balanced_acc", resamples=20)
    assert v.users == 40, "alone, none of them has a balanced accuracy"


def test_targets_of_one_class_are_not_compared():
    user, clicks = [f"{u}" for u in range(30)], ["A"] * 30
    two = {"a": Predictions(user, clicks, clicks, Task.CLICK), "b": Predictions(user, clicks, ["B"] * 30, Task.CLICK)}
    assert verdicts(two, [("a", "b")], "click_balanced_acc", resamples=20) == []
    assert len(verdicts(two, [("a", "b")], "click_acc", resamples=20)) == 1


def test_below_what_can_be_detected_nobody_can_tell():
    """The .8 points between the literature's best rows, at 1,000 users x 20 items."""
    two = {"a": predictor(0.799, 1000, 1), "b": predictor(0.791, 1000, 2)}
    (v,) = verdicts(two, [("a", "b")], "click_acc", resamples=400)
    assert v.word is Word.UNKNOWN
    assert 0.009 < v.detectable < 0.013
    assert "cannot tell" in v.text


def test_what_is_plain_to_see_survives_the_correction_for_many_comparisons():
    """1,000 exchanges alone give no p below .001, and 66 comparisons then none below .066."""
    predictors = {"good": predictor(0.8, 120, 1)} | {f"bar {n}": predictor(0.6, 120, 2 + n) for n in range(66)}
    compared = verdicts(predictors, [("good", f"bar {n}") for n in range(66)], "click_acc", resamples=1000)
    assert {v.word for v in compared} == {Word.BETTER}
    assert all(v.p_holm < 0.01 for v in compared)
    (line,) = by_predictor(compared)
    assert line.startswith("good, click_acc: better than bar 0 (+0.")


def test_equal_predictors_have_no_difference():
    a = predictor(0.7, 50, 1)
    (v,) = verdicts({"a": a, "b": a}, [("a", "b")], "click_f1", resamples=100)
    assert (v.difference, v.low, v.high, v.p, v.word) == (0, 0, 0, 1, Word.UNKNOWN)


def test_p_values_are_uniform_without_a_difference():
    """A test whose p-values are too small would call noise a difference."""
    statistic = statistic_of("click_acc", Task.CLICK)
    p = [
        paired(user_sums(predictor(0.7, 60, s)), user_sums(predictor(0.7, 60, 1000 + s)), statistic, resamples=200).p
        for s in range(120)
    ]
    assert 0.005 < np.mean(np.array(p) < 0.1) < 0.2


def test_the_interval_is_paired():
    """Users differ much, predictors little: unpaired intervals would hide that one is always a bit better."""
    rng = np.random.default_rng(0)
    skill = rng.choice([0.2, 0.9], 300)
    items = np.full(300, 20.0)
    first = {"items": items, "right": np.round(20 * skill)}
    second = {"items": items, "right": first["right"] - (rng.random(300) < 0.5)}
    v = paired(first, second, lambda s: s["right"] / s["items"], resamples=500)
    (v,) = with_holm([v])
    assert v.word is Word.BETTER
    assert v.high - v.low < 0.01


def test_other_items_are_refused():
    with pytest.raises(ValueError, match="same items"):
        verdicts({"a": predictor(0.7, 50, 1), "b": predictor(0.7, 50, 1, each=10)}, [("a", "b")], "click_acc")
    with pytest.raises(ValueError, match="not a metric"):
        verdicts({"a": predictor(0.7, 5, 1), "b": predictor(0.7, 5, 1)}, [("a", "b")], "made_up")


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_thousand_resamples_of_twenty_thousand_items_take_seconds():
    a, b = predictor(0.8, 1000, 1), predictor(0.79, 1000, 2)
    began = time.process_time()
    evaluate(a, resamples=1000)
    verdicts({"a": a, "b": b}, [("a", "b")], "click_f1", resamples=1000)
    assert time.process_time() - began < 5
