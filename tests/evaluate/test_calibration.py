"""Calibration: what was too sure becomes true, on users that it was not fitted on."""

import numpy as np
import pytest

from gubs.evaluate import calibration
from gubs.evaluate.calibration import Calibration, Curve, best_answer, cross_fitted, fit, reliability
from gubs.records import Option
from gubs.ufm.labels import OptionProbabilities

USERS = [f"u{i % 60}" for i in range(1200)]


def _logit(p):
    return np.log(p / (1 - p))


def overconfident(truth_of, seed=0):
    """P(skip) as an overconfident policy with the wrong prior says it, and what happened."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, len(USERS))
    skipped = rng.random(len(USERS)) < 1 / (1 + np.exp(-truth_of(logits)))
    return 1 / (1 + np.exp(-logits)), skipped


def test_platt_finds_slope_and_share_of_skips():
    raw, skipped = overconfident(lambda x: 0.5 * x - 1.2)
    fitted = fit(raw, skipped, USERS)
    assert fitted.method == "platt"
    (x0, x1), (y0, y1) = fitted.curve.raw, fitted.curve.calibrated
    assert (y1 - y0) / (x1 - x0) == pytest.approx(0.5, abs=0.12)
    assert _logit(fitted.curve(0.5)) == pytest.approx(-1.2, abs=0.2)
    assert fitted.brier < fitted.brier_raw - 0.02
    assert fitted.brier < fitted.brier_constant


def test_a_curve_that_is_no_line_is_isotonic_and_keeps_the_order():
    raw, skipped = overconfident(lambda x: np.where(x > 0.3, 2.5, -2.5))
    fitted = fit(raw, skipped, USERS)
    assert fitted.method == "isotonic"
    values = fitted.curve(np.linspace(0, 1, 101))
    assert (np.diff(values) >= 0).all()
    assert 0 < values.min() < 0.15 < 0.85 < values.max() < 1


def test_what_is_calibrated_already_is_left_alone():
    rng = np.random.default_rng(1)
    raw = np.clip(rng.random(len(USERS)), 0.02, 0.98)
    fitted = fit(raw, rng.random(len(USERS)) < raw, USERS)
    assert fitted.brier <= fitted.brier_raw
    assert np.abs(fitted.curve(raw) - raw).max() < 0.08


def test_noise_is_told_by_the_constant():
    """A score that says nothing must not look better than the share of skips: folds divide no user's fit."""
    rng = np.random.default_rng(2)
    fitted = fit(rng.random(len(USERS)), rng.random(len(USERS)) < 0.3, USERS)
    assert fitted.brier == pytest.approx(fitted.brier_constant, abs=0.01)
    assert fitted.brier < fitted.brier_raw


def test_folds_never_divide_a_user(monkeypatch):
    """Each user's targets have a P(skip) of their own, so that a fit shows whom it saw."""
    shared = []

    def fitted(raw, truth):
        def curve(asked):
            shared.append(set(raw) & set(asked))
            return np.zeros(len(asked))

        return curve

    raw = np.array([int(u[1:]) / 100 for u in USERS])
    monkeypatch.setitem(calibration._METHODS, "noted", fitted)
    cross_fitted("noted", raw, raw < 0.3, USERS)
    assert shared == [set()] * 5


def test_the_reliability_curve_has_all_targets():
    raw, skipped = overconfident(lambda x: x)
    bins = reliability(raw, skipped)
    assert sum(b.n for b in bins) == len(USERS)
    assert [b.predicted for b in bins] == sorted(b.predicted for b in bins)
    assert max(abs(b.predicted - b.happened) for b in bins) < 0.15


def test_reasons_get_the_shares_that_skips_have():
    """The policy gives each reason a third; three quarters of the held-out skips are B."""
    raw = OptionProbabilities(dict.fromkeys(Option, 0.25), 1.0)
    golds = [Option.B, Option.B, Option.B, Option.C] * 50
    rng = np.random.default_rng(4)
    fitted = fit([0.75] * 200, rng.random(200) < 0.6, USERS[:200], [raw] * 200, golds)
    options = fitted.options(raw).options
    assert sum(options.values()) == pytest.approx(1.0)
    assert 1 - options[Option.A] == pytest.approx(float(fitted.curve(0.75)))
    assert options[Option.B] / (1 - options[Option.A]) == pytest.approx(0.74, abs=0.02)
    assert options[Option.C] / options[Option.B] == pytest.approx(1 / 3, abs=0.02)
    assert options[Option.D] < 0.02


def test_in_the_click_task_there_is_one_other_option():
    line = Calibration("platt", Curve((-9.0, 9.0), (-10.0, 8.0)), {}, 0, 0, 0, (), 1)
    calibrated = line.options(OptionProbabilities({Option.A: 0.5, Option.B: 0.5}, 1.0))
    assert calibrated.options[Option.B] == pytest.approx(1 / (1 + np.e))
    assert calibrated.mass == 1.0


@pytest.mark.parametrize(
    ("shares", "option"),
    [
        ((0.45, 0.2, 0.2, 0.15), Option.A),  # .90 against .75: the letters of a skip share one judgement
        ((0.39, 0.21, 0.2, 0.2), Option.B),  # .78 against .82
        ((0.3, 0.1, 0.5, 0.1), Option.C),
    ],
)
def test_the_best_answer_has_the_highest_expected_reward(shares, option):
    """Checked against every letter's mean reward over the letters that may be right."""
    options = OptionProbabilities(dict(zip(Option, shares, strict=True)), 1.0)
    rewards = {
        letter: sum(p * (((letter == "A") == (gold == "A")) + (letter == gold)) for gold, p in options.options.items())
        for letter in Option
    }
    assert best_answer(options) == option == max(rewards, key=lambda o: rewards[o])


@pytest.mark.parametrize(
    ("skipped", "users"), [([True, True], ["a", "b"]), ([False, False], ["a", "b"]), ([True, False], ["a", "a"])]
)
def test_what_cannot_be_calibrated_is_said(skipped, users):
    with pytest.raises(ValueError, match="several users, some skipped and some not"):
        fit([0.2, 0.4], skipped, users)
