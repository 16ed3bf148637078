"""The rule by which benchmarks/learning.py calls something learned: it decides what the README may say."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from learning import SFT, gain, summary


@pytest.mark.parametrize(
    ("figure", "before", "after", "least", "beyond"),
    [
        ("reward x", [2.0, 2.1, 2.2], [2.4, 2.5, 2.5], 0.3, True),
        ("reward x", [2.0, 2.1, 2.2], [2.4, 2.5, 2.25], 0.05, False),  # one seed gained less than the spread of 0.1
        ("reward x", [2.0, 2.0, 2.0], [2.1, 2.5, 2.9], 0.1, False),  # less than the spread after
        ("reward x", [2.4, 2.4], [2.0, 2.0], -0.4, False),
        ("share_watched_lost x", [0.8, 0.8], [0.4, 0.5], 0.3, True),  # less is better
        ("share_watched_lost x", [0.4, 0.4], [0.8, 0.8], -0.4, False),
        ("share_kept x", [0.4, 0.4], [0.8, 0.8], 0.0, False),  # neither way is better
        ("reward x", [2.0], [3.0], 1.0, False),  # one seed has no spread
    ],
)
def test_a_gain_is_one_in_every_seed_by_more_than_either_spread(figure, before, after, least, beyond):
    found = gain(figure, before, after)
    assert found["least_gain"] == pytest.approx(least)
    assert found["in_every_seed_beyond_the_spread"] is beyond


def test_the_table_has_mean_and_spread_of_every_policy():
    seeds = {s: {SFT: {"reward x": 2.0 + s / 10}, "weighted": {"reward x": 3.0 - s / 10}} for s in range(3)}
    row = summary(seeds)["reward x"]
    assert row["weighted"]["mean"] == pytest.approx(2.9)
    assert row["weighted"]["std"] == pytest.approx(0.1)
    assert row["weighted"]["least_gain"] == pytest.approx(0.6)
    assert row["weighted"]["in_every_seed_beyond_the_spread"]
    assert not row[SFT]["in_every_seed_beyond_the_spread"]
    assert math.isnan(summary({0: seeds[0]})["reward x"]["weighted"]["std"])
