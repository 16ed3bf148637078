"""Scores: AUC by brute force; what is kept at a share does not depend on ids or order; verdicts at one share."""

import numpy as np
import pytest

from gubs.evaluate.metrics import Predictions
from gubs.evaluate.scores import RANDOM, auc, curve, figures_at, kept_parts, verdicts_at, without_repeats
from gubs.evaluate.verdicts import Word
from gubs.records import Task


def truth_of(rate, users=None):
    return Predictions(
        users or [f"u{k}" for k in range(len(rate))], [None] * len(rate), ["A"] * len(rate), play_rate=rate
    )


def at(points, share):
    return next(p for p in points if p["share_kept"] == share)


def test_a_curve_keeps_the_lowest_scores_first():
    rate = np.array([0.1, 0.9, 0.2, 0.8])
    points = curve(1 - rate, truth_of(rate.tolist()))
    assert at(points, 0.5)["play_rate_above_30"] == 1
    assert at(points, 0.5)["total_play_rate"] == pytest.approx(0.85)
    assert at(points, 0.5)["lost"] == 0
    assert at(points, 0.25)["lost"] == 0.5


def test_equal_scores_are_kept_as_if_chance_chose():
    """Wrong here: a constant keeps the users with the first ids, who watch everything, and looks like an oracle."""
    truth = truth_of([0.9] * 5 + [0.1] * 5)
    for share in (0.1, 0.5, 0.7):
        point = at(curve(np.zeros(10), truth), share)
        assert point["total_play_rate"] == pytest.approx(0.5)
        assert point["play_rate_above_30"] == pytest.approx(0.5)
        assert point["lost"] == pytest.approx(1 - share)
    backwards = truth_of([0.1] * 5 + [0.9] * 5)
    score = np.array([0, 0, 1, 1, 1, 1, 1, 1, 2, 2.0])
    one, two = curve(score, truth), curve(score[::-1], backwards)
    assert [p["total_play_rate"] for p in one] == pytest.approx([p["total_play_rate"] for p in two])


def test_the_border_divides_equal_scores_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, share = rng.integers(0, 4, 30).astype(float), float(rng.random())
        part = kept_parts(score, share)
        assert part.sum() == pytest.approx(share * 30)
        assert len({(s, p) for s, p in zip(score, part, strict=True)}) == len(set(score)), "equal scores, equal parts"
        assert all(part[score < s].min(initial=1) >= part[score == s].max() for s in score)
    drawn = [np.lexsort((rng.random(30), score))[:15] for _ in range(4000)]
    happens = np.bincount(np.concatenate(drawn), minlength=30) / 4000
    assert np.abs(happens - kept_parts(score, 0.5)).max() < 0.05


def test_auc_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, bad = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
        pairs = [(a > b) + 0.5 * (a == b) for a in score[bad] for b in score[~bad]]
        weights = rng.integers(0, 3, (3, 40)).astype(float)
        assert auc(score, bad) == pytest.approx(np.mean(pairs))
        for w, value in zip(weights, auc(score, bad, weights), strict=True):
            rows = np.repeat(np.arange(40), w.astype(int))
            assert value == pytest.approx(float(auc(score[rows], bad[rows])))
    assert np.isnan(auc(np.ones(3), np.ones(3, bool)))


def world(users=60, each=10, seed=0):
    rng = np.random.default_rng(seed)
    rate = rng.random(users * each)
    truth = truth_of(rate.tolist(), [f"u{k:03}" for k in np.repeat(np.arange(users), each)])
    return truth, rate, rng


def test_figures_at_a_share_have_intervals_over_users():
    truth, rate, _ = world()
    figures = figures_at(1 - rate, truth, resamples=200, seed=0)
    point = at(curve(1 - rate, truth), 0.7)
    for name in ("total_play_rate", "play_rate_above_30", "lost"):
        assert figures[name]["value"] == pytest.approx(point[name])
    assert figures["total_play_rate"]["low"] < figures["total_play_rate"]["value"] < figures["total_play_rate"]["high"]
    random = figures_at(np.zeros(len(rate)), truth, resamples=200, seed=0)
    assert random["total_play_rate"]["value"] == pytest.approx(rate.mean())
    assert random["lost"] == pytest.approx({"value": 0.3, "low": 0.3, "high": 0.3})


def test_verdicts_at_a_share_tell_a_ranking_from_chance_and_equals_from_nothing():
    truth, rate, rng = world()
    scores = {"good": 1 - rate + 0.3 * rng.random(len(rate)), "noise": rng.random(len(rate)), "twin": np.zeros(1)}
    scores["twin"] = scores["good"] * 2
    pairs = [("good", RANDOM), ("noise", RANDOM), ("good", "twin"), ("noise", "good")]
    made = verdicts_at(scores, pairs, truth, resamples=200, seed=0)
    assert {v.metric for v in made} == {"play rate at 70 % kept", "watched videos kept at 70 % kept"}
    words = {(v.metric, v.first, v.second): v for v in made}
    for metric in {v.metric for v in made}:
        assert words[metric, "good", RANDOM].word is Word.BETTER
        assert words[metric, "noise", RANDOM].word is Word.UNKNOWN
        assert words[metric, "noise", "good"].word is Word.WORSE
        assert words[metric, "good", "twin"].difference == 0
    assert all(v.p_holm >= v.p for v in made)
    assert without_repeats(scores, ["noise", "good", "twin"]) == ["noise", "good"]


def test_clicks_at_a_share():
    clicked = [True] * 5 + [False] * 5
    truth = Predictions([f"u{k}" for k in range(10)], [None] * 10, ["A"] * 10, Task.CLICK, clicked=clicked)
    point = at(curve(np.arange(10.0), truth), 0.7)
    assert point["click_rate"] == pytest.approx(5 / 7)
    assert point["lost"] == 0
    (verdict,) = verdicts_at({"a": np.arange(10.0)}, [("a", RANDOM)], truth, resamples=20, seed=0)
    assert verdict.metric == "click rate at 70 % kept"
