"""The page and the table about training, from artifacts that the test writes itself."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from artifact_helpers import put

from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.errors import ArtifactError
from gubs.evaluate.compare import compare, judged_policies, print_blocks
from gubs.evaluate.judge import MODES, PREDICTIONS, measure
from gubs.records import TASK_OPTIONS, Task
from gubs.report.training import _SECONDS, Curve, Panel, draw, render, smooth, write_page
from gubs.ufm.monitor import SAMPLES

SETTINGS = load_settings("tiny", ["evaluate.bootstrap=50"])
EVIL = "<think><script>alert(1)</script></think><answer>B</answer>"


def answers(right, task=Task.SEQUENTIAL, users=8, balanced=True):
    """One target an option and user; the first `right` of a user's answers are right, the next says A or nothing."""
    rows = []
    for u in range(users):
        for i, gold in enumerate(TASK_OPTIONS[task]):
            option = str(gold) if i < right else "A" if u % 2 else None
            rows += [
                {
                    "interaction_id": f"{task}{u}-{gold}",
                    "user_id": f"u{u}",
                    "task": str(task),
                    "mode": mode,
                    "natural": True,
                    "balanced": balanced,
                    "gold": str(gold),
                    "predicted": option,
                    "failure": None if option else "empty",
                    "skip": 0.5,
                    "reward": 3.0 if option == gold else float(option is not None),
                    "play_rate": (0.9 if gold == "A" else 0.1) if task == Task.SEQUENTIAL else None,
                    "clicked": gold == "A" if task == Task.CLICK else None,
                    "answer": "x",
                }
                for mode in MODES
            ]
    return rows


def put_judged(run, policy, rows):
    metrics = pa.Table.from_pylist(measure(rows, 50, 0))
    predictions = pa.Table.from_pylist(rows, schema=PREDICTIONS)
    put(run, f"eval-{policy}", {"predictions": predictions, "metrics": metrics}, settings=SETTINGS)


def put_training(run, stage, columns, info):
    steps = len(next(iter(columns.values())))
    table = pa.table({"step": list(range(steps)), **columns})
    put(run, stage, {"steps": table}, settings=SETTINGS, info={"steps": steps, **info})
    if stage == "grpo":
        sample = {
            "task": "sequential",
            "prompt": f"Playing. {EVIL}",
            "group": 0,
            "user": "u1",
            "video": "<b>v</b>",
            "gold": "B",
            "answer": EVIL,
            "option": "B",
        }
        rows = [
            {"step": s, "role": r, **sample, "failure": None, "reward": 3.0, "advantage": 0.5}
            for s in range(9)
            for r in "TSG"
        ]
        Path(run.path(stage, SAMPLES)).write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "r")
    put_judged(run, "sft_model", answers(1))
    put_judged(run, "grpo", answers(3))
    put_training(run, "sft_model", {"loss": [2.0, 1.0, 0.5], "seconds/train": [1.0, 1.0, 1.0]}, {"examples": 48})
    grpo = {"reward": [1.0, 2.0], "reward_raw/T": [1.0, 2.0], "unparsed/empty": [0.0, 0.0], "health/kl": [0.0, 0.1]}
    put_training(run, "grpo", grpo, {"tasks": ["sequential", "click"]})
    return run


def row(blocks, name, task="sequential", mix="natural"):
    block = next(b for b in blocks if (b.task, b.mix) == (task, mix))
    return next(r for r in block.rows if r.name == name)


def test_the_mean_reward_and_its_constants_are_those_counted_by_hand(run):
    reward = row(compare(run, ["sft_model", "grpo"]), "reward")
    # A of each user is right (3); of B, C, D half of the users say A (format only: 1), the others nothing (0)
    assert reward.figures["sft_model"]["greedy"].value == pytest.approx((3 + 3 * 0.5) / 4)
    assert reward.figures["grpo"]["greedy"].value == pytest.approx((3 * 3 + 0.5) / 4)
    # always the same skip: A 1, its own letter 3, the other two letters 2 each
    assert reward.constants["always skip"] == pytest.approx((1 + 3 + 2 + 2) / 4)
    assert reward.constants["never skip"] == pytest.approx((3 + 1 + 1 + 1) / 4)
    low, high = reward.figures["grpo"]["greedy"].low, reward.figures["grpo"]["greedy"].high
    assert low <= reward.figures["grpo"]["greedy"].value <= high


def test_every_metric_comes_with_n_base_rate_and_constants(run):
    for block in compare(run):
        for r in block.rows:
            assert r.constants
            assert all(set(modes) == set(MODES) for modes in r.figures.values())
            assert r.name == "reward" or r.base_rate is not None
    assert row(compare(run), "judge_acc").n == 32
    assert row(compare(run), "reason_f1").n == 24


def test_a_skip_of_unknown_reason_counts_for_the_judge_and_for_nothing_else(tmp_path):
    run, rows = Run(tmp_path / "r"), answers(3)
    unknown = [r | {"interaction_id": "x", "gold": None, "reward": None, "balanced": False} for r in rows[:2]]
    put_judged(run, "known", rows)
    put_judged(run, "grpo", [*rows, *(u | {"predicted": "C", "play_rate": 0.1} for u in unknown)])
    explained, both = compare(run, ["known"]), compare(run, ["grpo"])
    assert (row(explained, "judge_acc").n, row(both, "judge_acc").n) == (32, 33)
    assert (row(explained, "reason_f1").n, row(both, "reason_f1").n) == (24, 24)
    value = lambda blocks, policy: row(blocks, "reward").figures[policy]["greedy"].value  # noqa: E731
    assert value(explained, "known") == value(both, "grpo")
    assert row(explained, "reward").constants == row(both, "reward").constants


def test_what_the_filter_keeps_stands_beside_random_drops_and_what_is_lost(run, capsys):
    """A filter that drops at random raises no rate, but whoever reads the rate alone cannot know that."""
    blocks = compare(run, ["sft_model", "grpo"])
    for name in ("share_kept", "share_watched_lost", "total_play_rate", "finish_rate", "users_without_video"):
        assert row(blocks, name).constants["random drop"] is not None
    assert "random drop" not in row(blocks, "judge_f1").constants
    kept = row(blocks, "share_kept")
    assert kept.constants["random drop"] == pytest.approx(kept.figures["grpo"]["greedy"].value)
    print_blocks(blocks)
    printed = capsys.readouterr().out
    assert "Watched videos lost" in printed
    assert "12 sft_model, greedy" in printed, "answers that cannot be read are counted under the table"


def test_policies_stand_in_the_order_of_their_training(run):
    put_judged(run, "base", answers(0))
    manifest = Path(run.path("grpo", "manifest.json"))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "created": "2999-01-01T00:00:00+00:00"}))
    assert judged_policies(run) == ["base", "sft_model", "grpo"]


def test_policies_judged_on_other_targets_are_not_compared(run):
    put_judged(run, "other", answers(2, users=7))
    with pytest.raises(ArtifactError, match="different targets"):
        compare(run, ["sft_model", "other"])


def test_a_run_without_judged_policies_says_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match="gubs judge"):
        compare(Run(tmp_path / "empty"))


def test_the_page_is_whole_and_shows_what_models_said_as_text(run):
    blocks = compare(run, ["sft_model", "grpo"])
    page = Path(write_page(run, blocks)).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>v</b>" not in page
    assert "sequential task, user u1" in page
    assert "Playing. &lt;think&gt;" in page
    assert "src=" not in page
    assert page.count("<svg") == 4  # loss, seconds; reward by role, KL: curves without a value are left out
    assert "Judge F1" in page
    assert "never skip" in page
    assert [f"Step {n}" in page for n in (1, 2, 5, 9)] == [True, False, True, True]


def test_the_page_stands_without_judged_policies(run):
    assert "Before and after" not in render(run)
    assert "Raw reward by role" in render(run)


def test_the_table_names_both_policies_and_the_mix(run, capsys):
    print_blocks(compare(run, ["sft_model", "grpo"]))
    printed = capsys.readouterr().out
    assert "Sequential task, natural mix: 32 targets of 8 users (8 A, 8 B, 8 C, 8 D)" in printed
    assert "grpo" in printed
    assert "Reason F1 of B" in printed


def test_click_blocks_have_click_metrics(tmp_path):
    run = Run(tmp_path / "c")
    put_judged(run, "grpo", answers(1, Task.CLICK, balanced=False))
    blocks = compare(run)
    assert [(b.task, b.mix) for b in blocks] == [("click", "natural")]
    assert row(blocks, "click_f1", "click").constants["always click"] == pytest.approx(2 / 3)


def test_smoothing_keeps_the_mean_of_a_constant_and_the_ends():
    assert smooth(np.full(7, 2.0), 3).tolist() == [2.0] * 7
    assert smooth(np.array([0.0, 3.0]), 1).tolist() == [0.0, 3.0]
    assert smooth(np.array([1.0, 3.0]), 4).tolist() == [1.0, 2.0], "fewer steps than a window"


def test_curves_are_means_over_whole_rounds_of_the_tasks():
    columns = {"step": np.arange(8.0), "reward_raw/T": np.tile([3.0, 1.0], 4)}
    panel = Panel("r", "", (Curve("reward_raw/T", "T"),))

    def heights(turns):
        lines = str(draw(panel, columns, turns)).split('id="line2d_')
        curve = next(part for part in lines[::-1] if "stroke-width: 1.8" in part)
        return {point.split()[2] for point in curve.split('d="')[1].split('"')[0].splitlines()[1:-1]}

    assert len(heights(1)) == 2, "each task at its own height"
    assert len(heights(2)) == 1, "one mean for both"


def test_the_whole_step_is_a_line_over_its_phases():
    columns = {"step": np.arange(4.0), "seconds/train": np.ones(4), "seconds/step": np.full(4, 2.0)}
    assert ">step<" in str(draw(_SECONDS, columns)).split("seconds")[-1]


def test_the_page_says_what_was_measured_of_the_papers_rule(run):
    """Preset `paper` stays the replica; whoever reads its curves reads this beside them."""
    assert "one third of the right answers" not in render(run)
    paper = load_settings("tiny", ["ufm.grpo.advantage.rule=paper"])
    table = pa.table({"step": [0, 1], "reward": [1.0, 2.0]})
    put(run, "by-paper", {"steps": table}, settings=paper, info={"steps": 2, "tasks": ["click"]})
    assert "(measured: one third of the right answers get a negative advantage" in render(run)
    plain = load_settings("tiny", ["ufm.grpo.advantage.rule=paper", "ufm.grpo.groups=false"])
    put(run, "by-paper", {"steps": table}, settings=plain, info={"steps": 2, "tasks": ["click"]})
    assert "one third of the right answers" not in render(run), "without S and G it punishes nothing"
