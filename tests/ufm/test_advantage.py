"""Golden values worked out by hand, for eps 0 unless said otherwise.

Six samples T T T T S G with w = .7 .7 .7 .7 .15 .15: sum w = 3.1, mean w = 31/60, w / mean w = 42/31 = 1.354839 for T
and 9/31 = .290323 for S and G, sum w^2 = 2.005, freedom of `weighted` = 3.1 - 2.005/3.1 = 2.453226.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gubs.ufm.advantage import MEASURED, RULES, SampleRole, advantages, contradicted
from gubs.ufm.settings import AdvantageSettings

ROLES = ["T", "T", "T", "T", "S", "G"]


def rule(name, eps=0.0, **rest):
    return AdvantageSettings(rule=name, eps=eps, **rest)


def one_group(raw, name, roles=ROLES, **rest):
    return advantages(raw, roles, ["g"] * len(raw), rule(name, **rest), right=np.asarray(raw) == 3).values


GOLDEN = {
    "paper": {
        # R W: 2.1 x4, .45 x2. mean 1.55, squares 4 x .55^2 + 2 x 1.1^2 = 3.63, std sqrt(3.63 / 5) = .852056
        (3, 3, 3, 3, 3, 3): (0.645497, 0.645497, 0.645497, 0.645497, -1.290994, -1.290994),
        (1, 1, 1, 1, 1, 1): (0.645497, 0.645497, 0.645497, 0.645497, -1.290994, -1.290994),
        (0, 0, 0, 0, 0, 0): (0, 0, 0, 0, 0, 0),
        # R W: 0 x4, .45 x2. mean .15, squares 4 x .0225 + 2 x .09 = .27, std sqrt(.054) = .232379
        (0, 0, 0, 0, 3, 3): (-0.645497, -0.645497, -0.645497, -0.645497, 1.290994, 1.290994),
        # R W: 2.1 .7 .7 0 .45 .15. mean 4.1/6 = .683333, squares 5.615 - 4.1^2/6 = 2.813333, std .750111
        # The two right answers (R 3) of T and S are treated unlike: S is pushed down.
        (3, 1, 1, 0, 3, 1): (1.888609, 0.022219, 0.022219, -0.910976, -0.311065, -0.711006),
    },
    "weighted": {
        (3, 3, 3, 3, 3, 3): (0, 0, 0, 0, 0, 0),
        (1, 1, 1, 1, 1, 1): (0, 0, 0, 0, 0, 0),
        # mean .9/3.1 = .290323; squares 2.8 x .290323^2 + .3 x 2.709677^2 = 2.438710; std sqrt(2.438710 / freedom)
        # = .997037; T -.290323 / .997037 x 1.354839 = -.394509; S, G 2.709677 / .997037 x .290323 = .789018
        (0, 0, 0, 0, 3, 3): (-0.394509, -0.394509, -0.394509, -0.394509, 0.789018, 0.789018),
        # mean (.7 x 5 + .15 x 4) / 3.1 = 4.1/3.1 = 1.322581; sum w R^2 = .7 x 11 + .15 x 10 = 9.2;
        # squares 9.2 - 4.1^2/3.1 = 3.777419; std sqrt(3.777419 / 2.453226) = 1.240877
        (3, 1, 1, 0, 3, 1): (1.831473, -0.352206, -0.352206, -1.444046, 0.392458, -0.075473),
    },
    "anchored": {
        (3, 3, 3, 3, 3, 3): (0, 0, 0, 0, 0, 0),
        # T: mean 1.25, squares 11 - 25/4 = 4.75, std sqrt(4.75/3) = 1.258306
        # T 1.75, -.25, -1.25 / 1.258306 x 1.354839; S 1.75, G -.25 / 1.258306 x .290323
        (3, 1, 1, 0, 3, 1): (1.884254, -0.269179, -0.269179, -1.345896, 0.403769, -0.057681),
        # T all equal: S and G against T's mean 0, on the deviation of all six: mean 1, squares 4 + 8 = 12,
        # std sqrt(12/5) = 1.549193; 3 / 1.549193 x .290323 = .562207
        (0, 0, 0, 0, 3, 3): (0, 0, 0, 0, 0.562207, 0.562207),
    },
}


@pytest.mark.parametrize(("name", "raw", "expected"), [(n, r, e) for n, of in GOLDEN.items() for r, e in of.items()])
def test_golden_values(name, raw, expected):
    """Wrong here: another algorithm than ga-grpo.md's is trained."""
    assert one_group(raw, name) == pytest.approx(expected, abs=1e-6)


def test_eps_is_added_to_the_deviation():
    got = one_group([3, 3, 3, 3, 3, 3], "paper", eps=0.1)
    assert got[0] == pytest.approx(0.55 / (0.852056 + 0.1), abs=1e-6), "not to the variance"


def test_plain_grpo_is_t_alone():
    """R 3 1 0 0: mean 1, squares 4 + 0 + 1 + 1 = 6, std sqrt(2). Wrong here: the plain GRPO row is not GRPO."""
    expected = np.array([2, 0, -1, -1]) / np.sqrt(2)
    for name in RULES:
        assert one_group([3, 1, 0, 0], name, ["T"] * 4) == pytest.approx(expected), name
        assert (one_group([3, 3, 3, 3], name, ["T"] * 4) == 0).all(), name
        assert (one_group([1.1] * 7, name, ["T"] * 7) == 0).all(), "a sum's rounding is not a variance"


def test_incomplete_groups_use_who_is_left():
    """T T S with R 3 0 3. Wrong here: a dropped sample counts as a reward of 0, or its weight is still divided by."""
    # paper: 2.1 0 .45: mean .85, squares 1.5625 + .7225 + .16 = 2.445, std sqrt(1.2225) = 1.105667
    assert one_group([3, 0, 3], "paper", ["T", "T", "S"]) == pytest.approx([1.130539, -0.768766, -0.361772], abs=1e-6)
    # weighted: sum w 1.55, w / mean w = 1.354839, .290323; mean 2.55/1.55 = 1.645161, squares 7.65 - 2.55^2/1.55 =
    # 3.454839; freedom 1.55 - 1.0025/1.55 = .903226; std sqrt(3.825) = 1.955761
    assert one_group([3, 0, 3], "weighted", ["T", "T", "S"]) == pytest.approx([0.938554, -1.139673, 0.201119], abs=1e-6)
    # anchored: mean 1.5, std 1.5 sqrt(2) = 2.121320; 1.5 / 2.121320 = .707107
    expected = [0.958016, -0.958016, 0.205289]
    assert one_group([3, 0, 3], "anchored", ["T", "T", "S"]) == pytest.approx(expected, abs=1e-6)


def test_anchored_with_one_t_or_none():
    # T 3, S 0, G 3: one T has no deviation, so that of all three, sqrt(3); w / mean w = 2.1, .45, .45;
    # S -3 / sqrt(3) x .45
    assert one_group([3, 0, 3], "anchored", ["T", "S", "G"]) == pytest.approx([0, -0.779423, 0], abs=1e-6)
    assert (one_group([0, 3], "anchored", ["S", "G"]) == 0).all(), "nothing to measure against"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("role", SampleRole)
def test_one_sample_left_gives_0(name, role):
    """Wrong here: a lone sample is trained on its raw reward, or 0/0 spoils the batch."""
    for eps in (0.0, 1e-4):
        assert one_group([3], name, [role], eps=eps).tolist() == [0]


def test_weights_that_make_unequal_rewards_equal():
    """.6 x 1 and .2 x 3 differ by an ulp. Wrong here: with a small eps that ulp becomes an advantage of about 1."""
    settings = rule("paper", weight_user=0.6, weight_similar=0.2, weight_group=0.2)
    got = advantages([1, 1, 1, 1, 3, 3], ROLES, [0] * 6, settings, right=[False] * 6)
    assert got.values.tolist() == [0] * 6
    assert got.frac_zero_variance == 0, "decided on raw rewards"


@pytest.mark.parametrize("name", RULES)
def test_weights_of_0_leave_plain_grpo_for_t(name):
    zero = {"weight_similar": 0.0, "weight_group": 0.0}
    raw = [3, 1, 0, 0, 3, 0]
    if name != "paper":  # the paper's S and G still stand in the mean, with a reward of 0
        alone = one_group(raw[:4], name, ROLES[:4])
        relative = 6 / 4  # w / mean w
        assert one_group(raw, name, **zero) == pytest.approx([*(alone * relative), 0, 0])
        for same in (2, 1.1, 0.1, 0.7):
            assert (one_group([same] * 4 + [3, 0], name, **zero) == 0).all() or name == "anchored"
    assert np.isfinite(one_group([1, 2], name, ["S", "G"], **zero)).all(), "everybody weighs 0"


def test_groups_do_not_touch_each_other():
    """Wrong here: samples are grouped by position."""
    a, b = [3, 1, 1, 0, 3, 1], [0, 0, 0, 0, 3, 3]
    ids = ["b", "a"] * 6
    raw = [x for pair in zip(b, a, strict=True) for x in pair]
    for name in RULES:
        got = advantages(raw, [r for r in ROLES for _ in "ab"], ids, rule(name), right=[False] * 12).values
        assert got[1::2] == pytest.approx(one_group(a, name))
        assert got[::2] == pytest.approx(one_group(b, name))


def test_figures_of_a_batch():
    """Wrong here: the log hides that a rule punishes right answers."""
    raw = [3, 3, 3, 3, 3, 3, *[1, 0]]
    ids = [7] * 6 + [-2] * 2
    got = advantages(raw, [*ROLES, "T", "T"], ids, rule("paper"), right=[True] * 6 + [False] * 2)
    f = got.figures()
    assert f["reward_raw/T"] == pytest.approx(13 / 6)
    assert f["reward_raw/S"] == f["reward_raw/G"] == 3
    assert f["reward_weighted/T"] == pytest.approx(0.7 * 13 / 6)
    assert f["reward_weighted/S"] == pytest.approx(0.45)
    assert f["advantage/G"] == pytest.approx(-1.290994, abs=1e-6)
    assert f["advantage/T"] == pytest.approx((4 * 0.645497 + 0) / 6, abs=1e-6)
    assert f["frac_zero_variance"] == 0.5
    assert f["frac_right_pushed_down"] == pytest.approx(2 / 6)
    assert f["frac_wrong_pushed_up"] == 0.5
    assert len(f) == 12
    repaired = advantages(raw, [*ROLES, "T", "T"], ids, rule("weighted"), right=[True] * 6 + [False] * 2).figures()
    assert repaired["frac_right_pushed_down"] == 0


def test_roles_without_samples_and_empty_batches_have_no_figures():
    assert "advantage/S" not in advantages([1, 2], "TT", [0, 0], rule("paper"), right=[True, False]).figures()
    nothing = advantages([], [], [], rule("paper"), right=[])
    assert len(nothing.values) == 0
    assert nothing.figures()["frac_zero_variance"] == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="one length"):
        advantages([1, 2], ["T"], [0, 0], rule("paper"), right=[True, True])
    with pytest.raises(ValueError, match=r"rewards \[1\] are not finite"):
        advantages([1, np.nan], ["T", "T"], [0, 0], rule("paper"), right=[True, True])
    with pytest.raises(ValueError, match="X"):
        advantages([1, 2], ["T", "X"], [0, 0], rule("paper"), right=[True, True])


@st.composite
def batches(draw):
    n = draw(st.integers(1, 30))
    raw = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=n, max_size=n))
    roles = draw(st.lists(st.sampled_from("TTTTSG"), min_size=n, max_size=n))
    ids = draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    return np.array(raw), np.array(roles), np.array(ids)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(sorted(RULES)), st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter(batch, name, random):
    """To the last bit. Wrong here: load balancing or another number of ranks changes the weights."""
    raw, roles, ids = batch
    order = np.array(random.sample(range(len(raw)), len(raw)))
    straight = advantages(raw, roles, ids, rule(name, 1e-4), right=raw == 3).values
    shuffled = advantages(raw[order], roles[order], ids[order], rule(name, 1e-4), right=raw[order] == 3).values
    assert (straight[order] == shuffled).all()
    names = np.array([f"record {i}" for i in ids])
    assert (advantages(raw, roles, names, rule(name, 1e-4), right=raw == 3).values == straight).all(), "ids are names"


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(sorted(RULES)))
def test_advantages_are_finite_and_balanced(batch, name):
    """Wrong here: a group pushes all its answers one way, or one group moves the model a thousandfold."""
    raw, roles, ids = batch
    got = advantages(raw, roles, ids, rule(name), right=raw == 3)
    assert np.isfinite(got.values).all()
    assert np.abs(got.values).max() < 10
    if name != "anchored":
        assert np.bincount(ids + 3, got.values) == pytest.approx(0, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from(["weighted", "anchored"]))
def test_repaired_rules_never_reorder_answers(batch, name):
    """In a group a higher raw reward never has the lower sign; equal rewards give exactly 0. The paper's rule fails."""
    raw, roles, ids = batch
    got = advantages(raw, roles, ids, rule(name, 1e-4), right=raw == 3).values
    for g in set(ids.tolist()):
        own, values = raw[ids == g], got[ids == g]
        if len(set(own.tolist())) == 1:
            assert (values == 0).all()
        pushed_up, pushed_down = own[values > 1e-9], own[values < -1e-9]
        assert not len(pushed_up) or not len(pushed_down) or pushed_up.min() > pushed_down.max()


@settings(max_examples=60, deadline=None)
@given(batches(), st.floats(0.5, 4), st.floats(-2, 2))
def test_repaired_rules_ignore_scale_and_offset(batch, scale, offset):
    raw, roles, ids = batch
    assume(len(set(raw.tolist())) > 1)
    for name in ("weighted", "anchored"):
        one = advantages(raw, roles, ids, rule(name), right=raw == 3).values
        two = advantages(raw * scale + offset, roles, ids, rule(name), right=raw == 3).values
        assert two == pytest.approx(one, abs=1e-8), name


@pytest.mark.parametrize("accuracy", [0.3, 0.5, 0.7, 0.9])
def test_what_was_measured_of_the_papers_rule_can_be_measured_again(accuracy):
    """A third of the right answers is pushed down at any accuracy: S and G weigh less, whatever they say. It is written
    beside every training that uses the rule. Wrong answers here are in the right form, half of them skips as well."""
    rng, groups = np.random.default_rng(7), 2000
    right = rng.random(6 * groups) < accuracy
    raw = np.where(right, 3, rng.integers(1, 3, 6 * groups))
    roles, ids = ROLES * groups, np.repeat(np.arange(groups), 6)
    down = {n: advantages(raw, roles, ids, rule(n, 1e-4), right=right).frac_right_pushed_down for n in RULES}
    assert down["paper"] == pytest.approx(1 / 3, abs=0.02)
    assert down["weighted"] == down["anchored"] == 0
    assert "one third" in MEASURED["paper"]
    assert set(MEASURED) == {"paper"}


def test_a_label_is_doubted_if_enough_answers_say_the_opposite():
    """Six samples each, of which 6, 5, 4 and 0 contradict the label."""
    ids = np.repeat([7, 3, 5, 9], 6)
    opposite = np.concatenate([np.arange(6) < n for n in (6, 5, 4, 0)])
    assert contradicted(opposite, ids, 0.8).tolist() == [True] * 12 + [False] * 12
    assert contradicted(opposite, ids, 4 / 6).tolist() == [True] * 18 + [False] * 6
    assert not contradicted(opposite, ids, 0.0).any(), "off: a group of unanimous answers is trusted"
    assert contradicted([], [], 0.8).tolist() == []
