"""The benchmark that pools the policies of an ablation: its figures are those of what is stored."""

import shutil
from statistics import fmean

import judged_run
import pooled
import pytest

from gubs.artifacts import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ablation with one arm, one world, and two trainings that are the same."""
    folder = tmp_path_factory.mktemp("ablation")
    run = judged_run.make_run(folder)
    judged_run.put_judged(run)
    judged_run.put_bars(run, ("popularity", *pooled.SHOWN, *pooled.BY_REWARD), by_reward=pooled.BY_REWARD)
    for seed in (0, 1):
        shutil.copytree(run.root, folder / "cells" / "rule" / f"weighted-w7-s{seed}")
    return folder


def lines(folder, seeds, monkeypatch, capsys):
    arguments = ["pooled", "--run", str(folder), "--worlds", "7", "--seeds", seeds, "--arms", "weighted"]
    monkeypatch.setattr("sys.argv", arguments)
    pooled.main()
    return capsys.readouterr().out.splitlines()


def test_figures_are_those_of_the_run_and_trainings_are_averaged(folder, monkeypatch, capsys):
    printed = lines(folder, "0", monkeypatch, capsys)
    (own,) = (line for line in printed if line.startswith("weighted "))
    rows = Run(folder / "cells" / "rule" / "weighted-w7-s0").artifact("eval-grpo").table("predictions").to_pylist()
    rewards = [r["reward"] for r in rows if (r["task"], r["mode"]) == ("sequential", "calibrated") and r["natural"]]
    assert own.endswith(f"reward {fmean(rewards):.3f}")
    (drop,) = (line for line in printed if line.startswith("random drop "))
    assert "watched videos kept at 70 % kept 0.700" in drop
    assert sum(line.startswith("reward: weighted, ") for line in printed) == 3
    assert sum(line.startswith("play rate at 70 % kept: weighted, ") for line in printed) == 5
    assert lines(folder, "0,1", monkeypatch, capsys) == printed, "the mean of two that are equal"


def test_what_is_missing_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pooled", "--run", str(folder), "--worlds", "8", "--arms", "weighted"])
    with pytest.raises(SystemExit, match="no finished cell of world 8 with baselines"):
        pooled.main()
