"""The IF-VR table on a simulated app: baselines that stand beside, scores that cannot read labels, curves, files."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifact_helpers import put
from small_world import WORLD

from gubs import jobs, stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data.ifvr import IFVR
from gubs.errors import ArtifactError, InputError
from gubs.evaluate.bars import STORED, known_options
from gubs.evaluate.baselines.targets import Log, all_scored, chosen_by_reward, features, scores_of, sequences
from gubs.evaluate.judge import PREDICTIONS
from gubs.evaluate.metrics import Predictions
from gubs.evaluate.published import TABLE_2
from gubs.evaluate.table import ORIGINAL, Stored, auc, build, curve, tables
from gubs.records import Task
from gubs.teachers.reasons import LABELS
from gubs.teachers.script import GUESS

_KNOWN = {"videos_trained_on": 1.0}
SETTINGS = ("evaluate.bootstrap=50", "evaluate.sasrec.epochs=2", "evaluate.sasrec.width=8", "evaluate.sasrec.length=6")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("table") / "run")
    stages.make(["ifvr"], run, load_settings("tiny", [*WORLD, *SETTINGS]))
    return run


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr("gubs.evaluate.baselines.statistics.TREES", 10)


@pytest.fixture(scope="module")
def log(run):
    return Log(IFVR(run), Task.SEQUENTIAL)


def truth_of(n=400, seed=0):
    rng = np.random.default_rng(seed)
    rate = np.round(rng.random(n), 3)
    return pd.DataFrame(
        {
            "interaction_id": [f"x{k}" for k in range(n)],
            "user_id": [f"u{k % 20}" for k in range(n)],
            "play_rate": rate,
            "clicked": None,
            "gold": None,
        }
    )


def predictor(name, truth, dropped, score, kind="policy"):
    frame = truth[["interaction_id", "user_id"]].assign(predicted=np.where(dropped, "B", "A"), score=score)
    return Stored(name, frame.assign(reward=np.nan), False, kind)


def test_baselines_see_no_label_of_a_target(log):
    """Labels of test users' targets turned around change no score."""
    rows = np.flatnonzero(log.targets)
    test = log.test[rows]
    before = scores_of(log, rows)
    turned = Log.__new__(Log)
    vars(turned).update(vars(log))
    turned.bad = np.where(log.targets & log.test, ~log.bad, log.bad)
    turned.__dict__.pop("targets", None)
    for name, after in scores_of(turned, rows).items():
        assert (after[test] == before[name][test]).all(), name


def test_a_training_users_own_labels_do_not_reach_its_statistics(log):
    rows = np.flatnonzero(log.targets & log.train)
    user = log.user[rows[0]]
    own = log.user[rows] == user
    *_, before = features(log, rows)
    turned = Log.__new__(Log)
    vars(turned).update(vars(log))
    turned.bad = np.where(log.targets & (log.user == user), ~log.bad, log.bad)
    *_, after = features(turned, rows)
    assert (before["video_rate"][own] == after["video_rate"][own]).all()
    assert (before["video_rate"] != after["video_rate"]).any()


def test_sequences_hold_what_was_watched_in_the_history(log):
    sequence = sequences(log)
    for user in (0, 7):
        mask = (log.user == user) & log.history & ~log.bad
        assert sequence[user].tolist() == log.video[mask].tolist()


def test_rates_find_who_skips(log):
    scored, test = all_scored(log)
    assert test.num_rows == (log.targets & log.test).sum()
    bad = log.bad[np.flatnonzero(log.targets & log.test)]
    assert auc(scored["logistic, all"].score, bad) > 0.55
    for s in scored.values():
        assert s.dropped.tolist() == (s.score >= s.threshold).tolist()


def test_by_reward_a_learner_names_the_option_that_pays_most(log):
    """The reason of a skip follows from its length here, which prompts show. Test users' labels are never read."""
    ids = log.frame["interaction_id"].to_numpy()
    seconds = log.seconds[log.video]
    option = np.where(~log.bad, "A", np.where(seconds > np.median(seconds), "D", "C"))
    golds = dict(zip(ids[log.train].tolist(), option[log.train].tolist(), strict=True))
    test = np.flatnonzero(log.targets & log.test)
    for chosen in chosen_by_reward(log, golds):
        said, skipped = chosen.options, log.bad[test]
        assert set(said.tolist()) <= {"A", "C", "D"}
        named = (said != "A") & skipped
        assert (said[named] == option[test][named]).mean() > 0.8, chosen.method
    turned = chosen_by_reward(log, golds | dict.fromkeys(ids[test].tolist(), "B"))
    assert turned[0].options.tolist() == chosen_by_reward(log, golds)[0].options.tolist()
    outcome = chosen_by_reward(log, dict.fromkeys(golds, "A"))
    assert {o for c in outcome for o in c.options.tolist()} <= {"A", "B"}
    assert all(((c.score > 0.5) == (c.options == "B")).all() for c in outcome)


def test_guesses_are_no_options_to_learn(tmp_path):
    run = Run(tmp_path / "run")
    facts = {"task": "sequential", "user_id": "u", "video_id": "v", "split": "train", "rounds": 0}
    rows = [{**facts, "interaction_id": n, "option": "C", "label_source": n} for n in (GUESS, "rule")]
    put(run, "labels", {"labels": pa.Table.from_pylist(rows, schema=LABELS)})
    assert known_options(run) == {"rule": "C"}


def test_rewards_of_policies_constants_and_learners():
    truth = truth_of()
    skipped = truth["play_rate"].to_numpy() < 0.3
    truth["gold"] = np.where(~skipped, "A", np.where(np.arange(400) % 3 > 0, "C", "D"))
    policy = predictor("policy", truth, skipped, skipped.astype(float))
    policy.frame["reward"] = 2.5
    bar = predictor("logistic", truth, skipped, skipped.astype(float), "baseline")
    learner = Stored("logistic, by reward", bar.frame.assign(predicted=np.where(skipped, "C", "A")), True, "baseline")
    table = build([bar, learner, policy], truth, Task.SEQUENTIAL, least_users=1, resamples=200, seed=0)
    rewards = {r.name: r.values["reward"]["value"] for r in table.rows if "reward" in r.values}
    watched, other = (~skipped).mean(), (truth["gold"] == "D").mean()
    assert rewards == pytest.approx(
        {
            "always skip": 1 + skipped.mean() + (truth["gold"] == "C").mean(),
            "never skip": 1 + 2 * watched,
            "logistic, by reward": 3 - other,
            "policy": 2.5,
        }
    )
    found = {v.second: v for v in table.verdicts if v.metric == "reward"}
    assert set(found) == {"always skip", "never skip", "logistic, by reward"}
    assert found["always skip"].word == "better"
    assert found["always skip"].difference == pytest.approx(2.5 - rewards["always skip"])


def test_the_table_by_hand():
    truth = truth_of()
    skipped = truth["play_rate"].to_numpy() < 0.3
    oracle = predictor("oracle", truth, skipped, skipped.astype(float))
    silent = predictor("silent", truth, np.zeros(400, bool), np.zeros(400))
    table = build([oracle, silent], truth, Task.SEQUENTIAL, least_users=100, resamples=50, seed=0)
    rows = {r.name: r for r in table.rows}
    assert rows["oracle"].values["judge_acc"]["value"] == 1
    assert rows["oracle"].values["auc"]["value"] == 1
    assert rows["silent"].values["auc"]["value"] == 0.5
    assert rows["oracle"].values["play_rate_above_30"]["value"] == 1
    assert rows["oracle"].values["share_kept"]["value"] == pytest.approx(1 - skipped.mean())
    assert rows["oracle"].random_drop["play_rate_above_30"] == pytest.approx(1 - skipped.mean())
    assert rows["oracle"].random_drop["share_watched_lost"] == pytest.approx(skipped.mean())
    assert rows[ORIGINAL].values["total_play_rate"]["value"] == pytest.approx(truth["play_rate"].mean())
    assert "judge_acc" not in rows[ORIGINAL].values
    assert "reason_f1" not in rows["oracle"].values
    assert any("only 20 test users" in note for note in table.notes)
    assert table.verdicts == ()
    assert rows["always skip"].values["judge_acc"]["value"] == pytest.approx(skipped.mean())
    assert rows["never skip"].values["judge_balanced_acc"]["value"] == 0.5
    assert "coin" in rows
    full = table.curves["oracle"][-1]
    assert (full["share_kept"], full["lost"]) == (1, 0)


def test_a_policy_is_compared_with_every_baseline_on_common_targets():
    truth = truth_of()
    skipped = truth["play_rate"].to_numpy() < 0.3
    policy = predictor("policy", truth, skipped, skipped.astype(float))
    policy = Stored("policy", policy.frame.iloc[:300], False, "policy")
    bars = [predictor(f"bar{k}", truth, np.arange(400) % 2 == k, np.zeros(400), "baseline") for k in range(2)]
    table = build([*bars, policy], truth, Task.SEQUENTIAL, least_users=1, resamples=50, seed=0)
    assert table.items == 300
    assert [(v.first, v.second) for v in table.verdicts] == [("policy", "bar0"), ("policy", "bar1")], (
        "no reward is known"
    )
    assert "300 of 400 targets: those that every predictor answered" in table.notes
    other = Stored("other", policy.frame.assign(interaction_id="none"), False, "file")
    with pytest.raises(ArtifactError, match="no target was answered by all of bar0, bar1, other"):
        build([*bars, other], truth, Task.SEQUENTIAL, least_users=1, resamples=0, seed=0)


def test_a_curve_keeps_the_lowest_scores_first():
    rate = np.array([0.1, 0.9, 0.2, 0.8])
    truth = Predictions(["a", "a", "b", "b"], [None] * 4, ["A"] * 4, play_rate=rate.tolist())
    points = {p["share_kept"]: p for p in curve(1 - rate, truth)}
    assert points[0.5]["play_rate_above_30"] == 1
    assert points[0.5]["total_play_rate"] == pytest.approx(0.85)
    assert points[0.5]["lost"] == 0
    assert points[0.25]["lost"] == 0.5


def test_auc_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, bad = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
        pairs = [(a > b) + 0.5 * (a == b) for a in score[bad] for b in score[~bad]]
        weights = rng.integers(0, 3, (3, 40)).astype(float)
        assert auc(score, bad) == pytest.approx(np.mean(pairs))
        for w, found in zip(weights, auc(score, bad, weights), strict=True):
            drawn = np.repeat(np.arange(40), w.astype(int))
            assert found == pytest.approx(float(auc(score[drawn], bad[drawn])))
    assert np.isnan(auc(np.ones(3), np.ones(3, bool)))


def test_published_figures_hold_together():
    """Play rate > 30 % of the original recommendation is the share that is not skipped: Acc of "never skips"."""
    assert TABLE_2["Original recommendation"]["play_rate_above_30"] == 0.763
    assert len(TABLE_2) == 12


def test_the_command_makes_the_table_and_takes_files(run, ray_local, tmp_path, capsys):
    settings = load_settings("tiny", [*WORLD, *SETTINGS])
    jobs.evaluate_ifvr(run, settings, {})
    text = capsys.readouterr().out
    shown = (ORIGINAL, "SASRec", "boosting, as shown", "G-UBS (published)", "video's rate")
    for name in (*shown, "only 8 test users", "of the test targets are"):
        assert name in text, name
    stored = run.artifact("bars").table("predictions").to_pandas()
    mine = stored[stored["method"] == "length"][["interaction_id", "predicted"]]
    file = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pandas(mine, preserve_index=False), file)
    (sequential, _) = tables(run, {"mine": str(file)}, least_users=1, resamples=20, seed=0)
    rows = {r.name: r.values for r in sequential.rows}
    assert rows["mine"]["judge_acc"] == rows["length"]["judge_acc"]
    assert {v.first for v in sequential.verdicts} == {"mine"}
    pq.write_table(pa.table({"interaction_id": ["none"], "predicted": ["A"]}), file)
    with pytest.raises(InputError, match="no row is about a sequential target"):
        tables(run, {"mine": str(file)}, least_users=1, resamples=20, seed=0)
    pq.write_table(pa.table({"interaction_id": ["none"]}), file)
    with pytest.raises(InputError, match="no column predicted"):
        tables(run, {"mine": str(file)}, least_users=1, resamples=20, seed=0)


def test_a_judged_policy_takes_a_row_as_it_answers_as_calibrated_and_as_served(tmp_path):
    """Two targets are skipped. Greedy the policy drops one of them, as served both; one answer cannot be read: it is
    kept, and its score is the lowest."""
    run, rates = Run(tmp_path / "run"), [0.1, 0.2, 0.9, 0.8]
    facts = [{"interaction_id": f"x{k}", "user_id": f"u{k % 2}", "play_rate": r} for k, r in enumerate(rates)]
    bar = [{**f, "method": "bar", "task": "sequential", "predicted": "A", "score": 0.5} for f in facts]
    put(run, "bars", {"predictions": pa.Table.from_pylist(bar, schema=STORED)}, info={"sequential": _KNOWN})
    said = {"greedy": "BAA", "sampled": "AAA", "calibrated": "BBB", "filter": "BBA"}
    judged = [
        {
            **f,
            "task": "sequential",
            "mode": mode,
            "natural": True,
            "predicted": letter,
            "skip": skip,
            "gold": gold,
            "reward": 2.0,
        }
        for mode, letters in said.items()
        for f, letter, skip, gold in zip(facts, [*letters, None], [0.9, 0.6, 0.3, None], "BCAA", strict=True)
    ]
    put(run, "eval-grpo", {"predictions": pa.Table.from_pylist(judged, schema=PREDICTIONS)})
    (table,) = tables(run, {}, least_users=1, resamples=0, seed=0)
    rows = {r.name: r.values for r in table.rows if r.kind == "policy"}
    shares = {name: v["share_kept"]["value"] for name, v in rows.items()}
    assert shares == {"grpo": 0.75, "grpo, calibrated": 0.25, "grpo, filter": 0.5}
    assert rows["grpo, filter"]["auc"]["value"] == rows["grpo"]["auc"]["value"] == 1
    assert rows["grpo, filter"]["play_rate_above_30"]["value"] == 1
    assert rows["grpo"]["reward"]["value"] == 2, "as it was judged"
