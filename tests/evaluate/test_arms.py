"""Arms of an ablation: intervals over users and spreads over seeds are told apart; tests are paired, over all cells."""

import numpy as np
import pytest

from gubs.errors import ArtifactError
from gubs.evaluate.arms import AUC, MEASURES, REWARD, Asked, Pool, compare_arms, constant_answers, read_answers
from gubs.evaluate.judge import MODES
from gubs.evaluate.scores import auc
from gubs.records import Task

USERS, EACH = 40, 4
JUDGE = next(m for m in MEASURES if m.name == "judge_f1")
REWARDS, CURVE = MEASURES[0], next(m for m in MEASURES if m.name == AUC)


def rows(right: float, seed: int = 0, world: int = 0, users: int = USERS) -> list[dict]:
    """A policy that is right in this share of the answers, else says A (B if it is A)."""
    rng, answers = np.random.default_rng([seed, world]), []
    for n in range(users * EACH):
        gold = "AABCD"[(n // 3) % 5]
        option = gold if rng.random() < right else "B" if gold == "A" else "A"
        score = float(np.clip((0.3 if option == "A" else 0.7) + 0.1 * rng.standard_normal(), 0, 1))
        about = {"interaction_id": f"i{n}", "user_id": f"w{world}-u{n % users}", "task": "sequential", "gold": gold}
        for mode in MODES:
            judged = {"predicted": option, "skip": score, "reward": 3.0 if option == gold else 1.0}
            facts = {"natural": True, "balanced": n % 2 == 0, "clicked": None, "play_rate": 0.8 if gold == "A" else 0.1}
            answers.append({**about, **judged, **facts, "mode": mode})
    return answers


def arm(right: float, cells=((0, 0), (0, 1), (1, 0), (1, 1)), offset: int = 0) -> dict:
    return {(w, s): read_answers(rows(right, 10 * s + offset, w)) for w, s in cells}


def results(arms: dict, resamples: int = 200) -> dict:
    comparison = compare_arms(arms, {}, resamples=resamples, seed=0)
    return {(r.measure, r.arm): r for r in comparison.results} | {
        (d.measure, d.verdict.first): d for d in comparison.differences
    }


def test_a_better_arm_is_found_and_an_equal_one_is_not():
    comparison = compare_arms({"a": arm(0.6), "b": arm(0.9, offset=5), "same": arm(0.6)}, {}, resamples=300, seed=0)
    by_arm = {(d.measure.name, d.verdict.first): d for d in comparison.differences if d.measure.mix == "natural"}
    for name in (REWARD, "judge_f1", "judge_balanced_acc", AUC, "reason_f1", "total_play_rate"):
        assert by_arm[name, "b"].verdict.word == "better", name
        assert by_arm[name, "b"].agree == by_arm[name, "b"].cells == 4
        assert by_arm[name, "b"].verdict.effect > 0.2, name
        same = by_arm[name, "same"].verdict
        assert (same.difference, same.p, same.word) == (0, 1, "cannot tell")
    assert {d.verdict.second for d in comparison.differences} == {"a"}


def test_a_figure_pools_the_answers_of_all_trainings():
    cells = {(0, 0): read_answers(rows(1.0)), (0, 1): read_answers(rows(0.5, 1))}
    figure = results({"a": cells, "b": cells})[REWARDS, "a"]
    assert figure.value == pytest.approx(np.mean(list(figure.cells.values())))
    assert figure.cells[0, 0] == 3
    assert figure.low < figure.value < figure.high
    assert figure.users == USERS


def test_the_interval_is_over_users_and_the_spread_over_seeds():
    """Wrong here: three seeds of the same users look like three times as many users."""
    one, three = ({(0, s): read_answers(rows(0.7, 1)) for s in range(n)} for n in (1, 3))
    single, triple = (results({"a": c, "b": c})[REWARDS, "a"] for c in (one, three))
    assert (single.low, single.high) == pytest.approx((triple.low, triple.high))
    assert triple.seeds == 0
    assert np.isnan(single.seeds)
    assert np.isnan(single.worlds)
    far = {(0, 0): read_answers(rows(1.0)), (0, 1): read_answers(rows(0.4)), (1, 0): read_answers(rows(0.4, 0, 1))}
    spread = results({"a": far, "b": far})[REWARDS, "a"]
    assert spread.seeds == pytest.approx(abs(spread.cells[0, 0] - spread.cells[0, 1]) / np.sqrt(2))
    means = (spread.cells[0, 0] + spread.cells[0, 1]) / 2, spread.cells[1, 0]
    assert spread.worlds == pytest.approx(abs(means[0] - means[1]) / np.sqrt(2))


def test_the_order_of_rows_does_not_matter():
    straight = rows(0.7)
    turned = [straight[i] for i in np.random.default_rng(0).permutation(len(straight))]
    one, two = read_answers(straight)[JUDGE.part], read_answers(turned)[JUDGE.part]
    assert one.users == two.users
    assert all((one.sums[n] == two.sums[n]).all() for n in one.sums)
    assert (one.score == two.score).all()


def test_auc_is_the_mean_over_cells_and_exchanging_everybody_turns_the_sign():
    a, b = (Pool.of(CURVE, arm(r, ((0, 0), (1, 0)))) for r in (0.6, 0.9))
    first = next(iter(a.cells.values()))
    assert first.auc() == pytest.approx(auc(first.score, first.bad))
    whole = float(a.figure(np.ones(2 * USERS)) - b.figure(np.ones(2 * USERS)))
    assert a._exchanged(b, np.ones(2 * USERS, dtype=int)) == pytest.approx(-whole)
    assert a._exchanged(b, np.zeros(2 * USERS, dtype=int)) == pytest.approx(whole)


def test_arms_judged_on_other_targets_are_refused():
    with pytest.raises(ArtifactError, match="different targets"):
        compare_arms(
            {"a": arm(0.6), "b": {k: read_answers(rows(0.6, users=39)) for k in arm(0.6)}}, {}, resamples=10, seed=0
        )
    mixed = {(0, 0): read_answers(rows(0.6)), (0, 1): read_answers(rows(0.6, users=30))}
    with pytest.raises(ArtifactError, match="world 0: two policies were judged on different users"):
        compare_arms({"a": mixed}, {}, resamples=10, seed=0)


def test_constants_need_no_model_and_are_rewarded_like_answers():
    constants = constant_answers(rows(0.6))
    never, always = (
        {m: Asked.of(constants[n], Task.SEQUENTIAL) for m in MODES[:1]} for n in ("never skip", "always skip")
    )
    golds = [r["gold"] for r in constants["never skip"]]
    assert {r["reward"] for r in constants["never skip"] if r["gold"] == "A"} == {3.0}
    assert {r["reward"] for r in constants["never skip"] if r["gold"] != "A"} == {1.0}
    assert {r["reward"] for r in constants["always skip"]} == {1.0, 2.0, 3.0}
    assert golds.count("A") / len(golds) == pytest.approx(0.4, abs=0.05)
    assert len(never["greedy"].users) == len(always["greedy"].users) == USERS
    bars = {name: {(0, 0): read_answers(r)} for name, r in constants.items() if r}
    comparison = compare_arms({"a": arm(0.6)}, bars, resamples=0, seed=0)
    rows_of = [r for r in comparison.results if r.bar]
    assert {r.arm for r in rows_of} == {"never skip", "always skip"}
    assert AUC not in {r.measure.name for r in rows_of}
    assert not comparison.differences


def test_where_only_the_outcome_is_known_no_constant_earns_the_reward_of_a_reason():
    """Wrong here: "never skip" gets 3 for a watched video, and no policy more than 2."""
    log = [r | {"gold": r["gold"] if r["gold"] == "A" else None} for r in rows(0.6)]
    constants = constant_answers(log)
    for name, watched, skipped in (("never skip", 2.0, 1.0), ("always skip", 1.0, 2.0)):
        assert {(r["gold"], r["reward"]) for r in constants[name]} == {("A", watched), (None, skipped)}, name
