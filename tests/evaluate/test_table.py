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
from gubs.evaluate.baselines.targets import Log, all_scored, chosen_by_reward, features, scores_of
from gubs.evaluate.baselines.watched import asked_rows, feedback_of, judged, learned_rows, scored_by_others, sequences
from gubs.evaluate.judge import PREDICTIONS
from gubs.evaluate.predictors import Stored, read_file
from gubs.evaluate.published import TABLE_2
from gubs.evaluate.scores import RANDOM, auc
from gubs.evaluate.sheets import gains, ifvr_sheet, ifvr_sheets, share_sheet
from gubs.evaluate.table import COLUMNS, ORIGINAL, build, tables
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


def test_recommenders_learn_from_histories_and_training_targets_and_keep_a_fifth_for_the_threshold(log):
    sequence, learned = sequences(log), learned_rows(log)
    for user in (0, 7):
        assert sequence[user].tolist() == log.video[(log.user == user) & learned].tolist()
    assert (learned & log.history).sum() == (log.history & ~log.bad).sum()
    assert (learned & log.targets & log.train).any(), "training targets count"
    assert not (learned & log.targets & log.test).any()
    rows = asked_rows(log)
    assert not learned[rows].any(), "what is asked about is never learned from"
    assert log.train[rows].any()
    assert set(rows[log.test[rows]]) == set(np.flatnonzero(log.targets & log.test))


def test_recommenders_see_no_label_of_a_test_target(log):
    before = scored_by_others(log)
    assert list(before) == ["popularity", "item kNN", "user kNN", "iALS", "sequential kNN"]
    turned = Log.__new__(Log)
    vars(turned).update(vars(log))
    turned.bad = np.where(log.targets & log.test, ~log.bad, log.bad)
    after = scored_by_others(turned)
    for name in before:
        assert (before[name].score == after[name].score).all(), name
        assert before[name].threshold == after[name].threshold, name
    relearned = Log.__new__(Log)
    vars(relearned).update(vars(log))
    relearned.bad = np.where(learned_rows(log) & log.targets, True, log.bad)
    assert (scored_by_others(relearned)["popularity"].score != before["popularity"].score).any()


def test_popularity_is_how_many_users_watched_the_video(log):
    feedback, rows = feedback_of(log), asked_rows(log)
    assert len(set(zip(feedback.user.tolist(), feedback.item.tolist(), strict=True))) == len(feedback)
    test = rows[log.test[rows]]
    viewers = [len(set(log.user[learned_rows(log) & (log.video == v)].tolist())) for v in log.video[test]]
    score = scored_by_others(log)["popularity"].score
    assert [-n for n in viewers if n] == score[np.array(viewers) > 0].tolist()


def test_of_whom_nothing_is_known_the_score_is_neutral(log):
    """Wrong here: a user without a history looks as if everything were to be skipped."""
    rows = asked_rows(log)
    user = log.user[rows][log.test[rows]][0]
    cold = Log.__new__(Log)
    vars(cold).update(vars(log))
    cold.bad = np.where((log.user == user) & log.history, True, log.bad)
    score = np.where(log.user[rows] == user, 99.0, np.arange(len(rows)))
    of_user = (log.user[rows] == user)[log.test[rows]]
    neutral = judged("item kNN", cold, score).score[of_user]
    assert neutral == pytest.approx(np.median(score[score != 99.0]), abs=2)
    assert judged("popularity", cold, score, personal=False).score[of_user].tolist() == [99.0] * of_user.sum()


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
        options, skipped = chosen.options, log.bad[test]
        assert set(options.tolist()) <= {"A", "C", "D"}
        named = (options != "A") & skipped
        assert (options[named] == option[test][named]).mean() > 0.8, chosen.method
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
    against = {v.second: v for v in table.verdicts if v.metric == "reward"}
    assert set(against) == {"always skip", "never skip", "logistic, by reward"}
    assert against["always skip"].word == "better"
    assert against["always skip"].difference == pytest.approx(2.5 - rewards["always skip"])


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
    assert {(v.first, v.second) for v in table.verdicts} == {("oracle", RANDOM), ("silent", RANDOM)}
    assert rows["oracle"].values["judge_mcc"]["value"] == 1
    assert rows["silent"].values["users_without_video"]["value"] == 0
    assert rows["always skip"].values["users_without_video"]["value"] == 20
    assert rows["always skip"].values["judge_acc"]["value"] == pytest.approx(skipped.mean())
    assert rows["never skip"].values["judge_balanced_acc"]["value"] == 0.5
    assert "coin" in rows
    assert "20" in ifvr_sheet(table).rows[1].cells[-1], "a number of users, no share"
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
    judged = [(v.first, v.second) for v in table.verdicts if not v.metric.endswith("kept")]
    assert judged == [("policy", "bar0"), ("policy", "bar1")], "no reward is known"
    assert "300 of 400 targets: those that every predictor answered" in table.notes
    other = Stored("other", policy.frame.assign(interaction_id="none"), False, "file")
    with pytest.raises(ArtifactError, match="no target was answered by all of bar0, bar1, other"):
        build([*bars, other], truth, Task.SEQUENTIAL, least_users=1, resamples=0, seed=0)


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
    length_rows = stored[stored["method"] == "length"][["interaction_id", "predicted"]]
    file = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pandas(length_rows, preserve_index=False), file)
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


FACTS = [
    {"interaction_id": f"x{k}", "user_id": f"u{k % 10}", "play_rate": r}
    for k, r in enumerate(np.round(np.random.default_rng(3).random(60), 2).tolist())
]


def put_bar(run):
    bar = [{**f, "method": "logistic, all", "task": "sequential", "predicted": "A", "score": 0.5} for f in FACTS]
    put(run, "bars", {"predictions": pa.Table.from_pylist(bar, schema=STORED)}, info={"sequential": _KNOWN})


def put_policy(run, name, right, golds=lambda k, rate: "A" if rate >= 0.3 else "B", failure=None):
    """A policy that says what happened in this share of its answers; every twentieth cannot be read."""
    rows = []
    for mode in ("greedy", "sampled", "calibrated", "filter"):
        for k, f in enumerate(FACTS):
            skipped = (f["play_rate"] < 0.3) == (k % 20 < 20 * right)
            answer = {"predicted": "B" if skipped else "A", "skip": 0.5 + (0.4 if skipped else -0.4), "reward": 2.0}
            if failure and k % 20 == 19:
                answer = {"predicted": None, "skip": None, "reward": 0.0, "failure": failure}
            gold = golds(k, f["play_rate"])
            rows.append({**f, **answer, "task": "sequential", "mode": mode, "natural": True, "gold": gold})
    put(run, f"eval-{name}", {"predictions": pa.Table.from_pylist(rows, schema=PREDICTIONS)})


def test_policies_that_were_judged_with_other_golds_do_not_stand_beside_each_other(tmp_path):
    """Wrong here: rewards of one policy are compared with those that another was given for other truths."""
    run = Run(tmp_path / "run")
    put_bar(run)
    put_policy(run, "grpo", 0.9)
    put_policy(run, "sft_model", 0.7)
    assert len(tables(run, {}, least_users=1, resamples=0, seed=0)) == 1
    put_policy(run, "late", 0.7, golds=lambda k, rate: "A" if rate >= 0.3 else "C" if k == 5 or k > 40 else "B")
    with pytest.raises(ArtifactError, match=r"late and grpo were judged with different gold options .*gubs judge grpo"):
        tables(run, {}, least_users=1, resamples=0, seed=0)


def test_what_ga_grpo_gained_is_told_beside_what_it_started_from(tmp_path):
    run, steps = Run(tmp_path / "run"), {"steps": pa.table({"step": [0]})}
    put_bar(run)
    put(run, "sft_model", steps)
    put(run, "plain", steps, inputs=["sft_model"], kind="grpo")
    put(run, "grpo", steps, inputs=["sft_model"], kind="grpo")
    for name, right in (("base", 0.4), ("sft_model", 0.5), ("plain", 0.8), ("grpo", 1.0)):
        put_policy(run, name, right)
    (table,) = tables(run, {}, least_users=1, resamples=100, seed=0)
    beside = {(v.first, v.second): v for v in table.verdicts if v.second in table.policies and "acc" in v.metric}
    greedy = {pair for pair in beside if "," not in pair[0]}
    assert greedy == {("grpo", "sft_model"), ("grpo", "plain"), ("plain", "sft_model")}
    assert ("grpo, filter", "sft_model, filter") in beside
    assert beside["grpo", "sft_model"].word == "better"
    lines = [line for line in gains(table) if line.startswith("grpo against sft_model: ")]
    assert "judge_balanced_acc +0.5" in lines[0]
    assert "reward +0.000, cannot tell" in lines[0]
    assert "play rate at 70 % kept" in lines[0]
    assert lines[0] in ifvr_sheet(table).notes


def test_unreadable_answers_are_counted_by_cause_and_columns_say_what_they_mean(tmp_path):
    run = Run(tmp_path / "run")
    put_bar(run)
    put_policy(run, "grpo", 0.9, failure="no_option")
    put_policy(run, "sft_model", 0.9)
    (table,) = tables(run, {}, least_users=1, resamples=20, seed=0)
    assert "without a readable answer, grpo: no_option 3" in table.notes
    assert "without a readable answer, sft_model: none" in table.notes
    assert [c["name"] for c in table.contracts] == list(COLUMNS[Task.SEQUENTIAL])
    notes = ifvr_sheet(table).notes
    rate = 100 * np.mean([f["play_rate"] < 0.3 for f in FACTS])
    zero = next(n for n in notes if n.startswith("0/0 = 0, no answer counts as wrong: "))
    assert f"judge F1 (positive: fast skip, pooled, base rate {rate:.1f} %); MCC (positive: fast skip, pooled" in zero
    kept = next(
        n for n in notes if n.endswith("users with none (positive: user with no video kept, count, base rate 0)")
    )
    assert "person play (positive: play rate, capped at 1, per user" in kept


def test_at_the_same_share_policies_stand_beside_chance_and_learned_baselines(tmp_path):
    run = Run(tmp_path / "run")
    put_bar(run)
    put_policy(run, "grpo", 1.0)
    (table,) = tables(run, {}, least_users=1, resamples=100, seed=0)
    at_share = [v for v in table.verdicts if v.metric.endswith("at 70 % kept")]
    assert {(v.first, v.second) for v in at_share} == {("grpo", RANDOM), ("grpo", "logistic, all")}, "no mode twice"
    main, beside = ifvr_sheets(table)
    assert [r.name for r in beside.rows][:2] == [RANDOM, "logistic, all"]
    assert beside.rows[0].cells == beside.rows[1].cells, "a constant is a random drop"
    assert any(n.startswith("grpo, play rate at 70 % kept: better than random drop (+0.") for n in beside.notes)
    assert not any("at 70 % kept" in n for n in main.notes)
    assert share_sheet(table) == beside


def test_a_file_of_predictions_that_cannot_be_what_it_says_is_refused(tmp_path):
    happened, path = pd.DataFrame(FACTS).assign(clicked=None, gold=None), tmp_path / "f.parquet"
    ids = happened["interaction_id"].tolist()

    def refused(**columns):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(InputError) as error:
            read_file(str(path), Task.SEQUENTIAL, happened)
        assert str(path) in str(error.value)
        return str(error.value)

    twice = {"interaction_id": [*ids, *ids], "predicted": ["A"] * 120, "mode": ["greedy"] * 60 + ["filter"] * 60}
    assert "60 targets have several rows, first x0; keep one row per target, of one mode (filter, greedy)" in refused(
        **twice
    )
    assert "'E' (1 rows), no option of the sequential task; write A, B, C, D" in refused(
        interaction_id=ids, predicted=["E", *"A" * 59]
    )
    assert "score has values that are no numbers" in refused(
        interaction_id=ids, predicted=["A"] * 60, score=["high"] * 60
    )
    path.write_text("no Parquet")
    with pytest.raises(InputError, match=r"f\.parquet: cannot be read"):
        read_file(str(path), Task.SEQUENTIAL, happened)
    pq.write_table(pa.table({"interaction_id": ids[:2], "predicted": ["A", None]}), path)
    assert len(read_file(str(path), Task.SEQUENTIAL, happened)) == 2


def test_a_judged_policy_takes_a_row_as_it_answers_as_calibrated_and_as_served(tmp_path):
    """Two targets are skipped. Greedy the policy drops one of them, as served both; one answer cannot be read: it is
    kept, and its score is the lowest."""
    run, rates = Run(tmp_path / "run"), [0.1, 0.2, 0.9, 0.8]
    facts = [{"interaction_id": f"x{k}", "user_id": f"u{k % 2}", "play_rate": r} for k, r in enumerate(rates)]
    bar = [{**f, "method": "bar", "task": "sequential", "predicted": "A", "score": 0.5} for f in facts]
    put(run, "bars", {"predictions": pa.Table.from_pylist(bar, schema=STORED)}, info={"sequential": _KNOWN})
    letters_by_mode = {"greedy": "BAA", "sampled": "AAA", "calibrated": "BBB", "filter": "BBA"}
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
        for mode, letters in letters_by_mode.items()
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
