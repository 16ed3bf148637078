"""What the verdict says of blocks that tell less than others."""

from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
from artifact_helpers import put

from gubs import jobs, stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.evaluate.compare import DROP, Block, Figure, Row, verdict_on
from gubs.evaluate.judge import FILTER, MIXES
from gubs.records import Task

SHOWN = ("share_kept", "play_rate_above_30", "share_watched_lost", "judge_balanced_acc", "reason_f1")


def row(name: str) -> Row:
    figure = Figure(0.5, 0.4, 0.6, 100)
    return Row(name, name, 100, 0.4, {"always skip": 0.25, DROP: 0.3}, {"grpo": {FILTER: figure}})


BLOCK = Block(
    "sequential", "natural", ("grpo",), 100, 50, {"A": 40, "B": 10, "C": 20, "D": 30}, {}, tuple(map(row, SHOWN))
)


def test_keeps_loses_and_is_right():
    assert verdict_on(BLOCK) == [
        "  sequential: keeps 50 % of 100 videos; 50 % of these are not skipped (unfiltered 40 %)",
        "    drops 50 % of the watched videos (random drop 30 %)",
        "    right about the skip: balanced accuracy 50 % (constants 50 %); reason F1 50 % (always the commonest 25 %)",
    ]


def test_a_log_without_reasons_has_no_figure_about_reasons():
    assert "reason" not in "".join(verdict_on(replace(BLOCK, golds={"A": 40, "B": 0, "C": 0, "D": 0})))


def test_targets_of_one_kind_tell_nothing():
    click = replace(BLOCK, task="click", items=10, rows=())
    assert verdict_on(replace(click, golds={"A": 0, "B": 10})) == [
        "  click: cannot be judged: none of 10 videos was clicked"
    ]
    assert verdict_on(replace(click, golds={"A": 10, "B": 0})) == [
        "  click: cannot be judged: all of 10 videos were clicked"
    ]


CLICK = replace(
    BLOCK,
    task="click",
    golds={"A": 40, "B": 60},
    rows=tuple(map(row, ("share_kept", "click_rate", "share_clicked_lost", "click_balanced_acc"))),
)


def test_the_main_job_ends_with_at_most_eight_lines(tmp_path, monkeypatch, capsys):
    """The demo's last words about the policy, with all that there can be: both tasks on both mixes."""
    blocks = [replace(block, mix=mix) for block in (BLOCK, CLICK) for mix in MIXES]
    monkeypatch.setattr(stages, "make", lambda *_, **__: None)
    monkeypatch.setattr("gubs.evaluate.compare.compare", lambda *_: blocks)
    monkeypatch.setattr("gubs.report.training.write_page", lambda *_: "page.html")
    monkeypatch.setattr("gubs.report.policy.report", lambda *_: None)
    monkeypatch.setattr("gubs.report.policy.write_page", lambda *_: "report.html")
    names = [f"{p}, calibrated" for p in ("sft_model", "plain", "grpo")]
    names += ["logistic, by reward", "boosting, by reward", "never skip"]
    rows = [SimpleNamespace(name=name, values={"reward": {"value": 2.0 + n / 10}}) for n, name in enumerate(names)]
    beside = [SimpleNamespace(task=task, rows=rows) for task in Task]
    monkeypatch.setattr("gubs.evaluate.table.tables", lambda *_, **__: beside)
    jobs.main_job(Run(tmp_path), load_settings("tiny", []))
    page, report, *verdict = "".join(capsys.readouterr()).splitlines()
    assert page.startswith("[page]")
    assert report.startswith("[page]")
    assert len(verdict) <= 8
    rewards = "sft_model 2.00, plain 2.10, grpo 2.20, logistic 2.30, boosting 2.40, never skip 2.50"
    assert verdict[-1] == f"    mean reward (0-3), calibrated: {rewards}"
    assert max(map(len, verdict)) <= 120
    assert verdict[0] == "grpo as a filter, on the targets of 50 test users as they come:"
    for part in ("  sequential: keeps", "  click: keeps", "random drop 30 %", "constants 50 %"):
        assert part in "\n".join(verdict)


def test_baselines_of_other_data_are_made_anew_and_do_not_end_a_job_after_its_training(tmp_path, monkeypatch):
    run, settings, forced = Run(tmp_path), load_settings("tiny", []), []
    monkeypatch.setattr(stages, "make", lambda targets, *_, force: forced.append((*targets, force)))
    put(run, "ifvr", {"users": pa.table({"user_id": ["u"]})}, settings=settings)
    jobs._make_bars(run, settings, force=False)
    put(run, "bars", {"predictions": pa.table({"x": [1]})}, settings=settings)
    jobs._make_bars(run, settings, force=False)
    assert forced == [("bars", False), ("bars", True)]
