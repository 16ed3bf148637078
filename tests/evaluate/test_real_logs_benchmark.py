"""The benchmark on real logs: figures with intervals that order cannot change, and files that the table takes."""

import importlib

import numpy as np
import pandas as pd
import pytest

from gubs.evaluate.predictors import read_file
from gubs.records import Option, Task
from gubs.ufm.questions import Item

real_logs = importlib.import_module("real_logs")

RATES = np.round(np.random.default_rng(0).random(80), 2)
ITEMS = [
    Item(f"i{k}", f"u{k % 20}", "v", Task.SEQUENTIAL, Option.A if r >= 0.3 else None, "rule", play_rate=float(r))
    for k, r in enumerate(RATES)
]


def test_figures_have_intervals_and_equal_scores_rank_nothing():
    constant = real_logs.Said([Option.A] * 80, [0.5] * 80)
    row = real_logs.figures(ITEMS, constant, resamples=100, seed=0)
    assert row["AUC"]["value"] == row["balanced accuracy"]["value"] == 0.5
    assert row["total_play_rate at 70 % kept"]["value"] == pytest.approx(RATES.mean())
    assert row["lost at 70 % kept"]["value"] == pytest.approx(0.3)
    assert row["total_play_rate at 70 % kept"]["low"] < RATES.mean() < row["total_play_rate at 70 % kept"]["high"]
    assert "AUC 0.500 ±0.000" in real_logs.in_words(row)


def test_what_was_said_is_stored_in_a_form_that_the_table_takes(tmp_path):
    answers = real_logs.Said([None, *[Option.B] * 79], [None, *(1 - RATES[1:]).tolist()])
    row = real_logs.figures(ITEMS, answers, resamples=20, seed=0)
    assert row["AUC"]["value"] > 0.9
    assert "unreadable 0.013" in real_logs.about(answers)
    real_logs.store(tmp_path / "new" / "sequential-x.parquet", ITEMS, answers)
    happened = pd.DataFrame({"interaction_id": [i.interaction_id for i in ITEMS]})
    frame = read_file(str(tmp_path / "new" / "sequential-x.parquet"), Task.SEQUENTIAL, happened)
    assert len(frame) == 80
    assert frame["predicted"].isna().sum() == 1
    assert frame["score"].iloc[0] == 0
