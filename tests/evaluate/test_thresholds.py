"""Thresholds: what each goal asks for, and how good a ranking is."""

import math

import numpy as np
import pytest

from gubs.evaluate.settings import DecisionSettings
from gubs.evaluate.thresholds import auc, choose_threshold

BALANCED = DecisionSettings(goal="balanced")


def test_the_threshold_has_the_best_balanced_accuracy_and_drops_least():
    chosen = choose_threshold([0.1, 0.2, 0.6, 0.7, 0.9], [False, False, True, False, True], BALANCED)
    assert chosen.value == pytest.approx(0.6)
    assert chosen.balanced_accuracy == pytest.approx((1 + 2 / 3) / 2)
    assert (chosen.kept, chosen.lost, chosen.n) == (pytest.approx(0.4), pytest.approx(1 / 3), 5)


def test_a_useless_score_drops_nothing():
    chosen = choose_threshold([0.5] * 6, [True, False] * 3, BALANCED)
    assert chosen.kept == 1.0
    assert chosen.balanced_accuracy == 0.5
    assert math.isfinite(chosen.value), "it is written as JSON"


@pytest.mark.parametrize("happened", [[True, True], [False, False], []])
def test_a_threshold_needs_both_kinds(happened):
    with pytest.raises(ValueError, match="skipped and targets that were not"):
        choose_threshold([0.5] * len(happened), happened, BALANCED)


def test_auc():
    assert auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == pytest.approx(0.75)
    assert auc([0.5, 0.5], [True, False]) == 0.5
    assert math.isnan(auc([0.5, 0.6], [True, True]))


def _world(n: int = 2000) -> tuple[list[float], list[bool]]:
    rng = np.random.default_rng(0)
    skip = rng.random(n)
    return skip.tolist(), (rng.random(n) < skip).tolist()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.5, 1.0])
def test_at_most_a_share_of_what_is_watched_is_lost_and_no_more_could_be_dropped(share):
    skip, skipped = _world()
    chosen = choose_threshold(skip, skipped, DecisionSettings(goal="lose", share=share))
    watched = sorted(s for s, gone in zip(skip, skipped, strict=True) if not gone)
    lost = [s for s in watched if s >= chosen.value]
    assert len(lost) / len(watched) == pytest.approx(chosen.lost)
    assert chosen.lost <= share
    assert len(lost) == int(share * len(watched)), "one more would be too many"
    assert chosen.kept == pytest.approx(np.mean(np.array(skip) < chosen.value))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_at_least_a_share_is_kept_and_the_most_probable_skips_go(share):
    skip, skipped = _world()
    chosen = choose_threshold(skip, skipped, DecisionSettings(goal="keep", share=share))
    kept = np.mean(np.array(skip) < chosen.value)
    assert kept == pytest.approx(chosen.kept)
    assert share <= kept < share + 2 / len(skip)


def test_a_goal_that_nothing_meets_drops_nothing():
    chosen = choose_threshold([0.9, 0.9], [True, False], DecisionSettings(goal="lose", share=0.1))
    assert (chosen.kept, chosen.lost) == (1.0, 0.0)
