import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gubs.errors import GubsError
from gubs.ufm.sampling import BalancedSampler, Sampled, profile_sampling, sample_seed, shuffled

ABCD = "ABCD"


def golds(**counts):
    rng = np.random.default_rng(0)
    return rng.permutation([o for o, n in counts.items() for _ in range(n)]).tolist()


def test_a_batch_of_four_holds_one_of_each():
    """Wrong here: the model learns that one letter pays (the paper's reward hacking)."""
    gold = golds(A=50, B=3, C=10, D=7)
    sampler = BalancedSampler(gold, ABCD, 4, seed=1)
    for step in range(40):
        assert sorted(gold[i] for i in sampler.batch(step)) == list(ABCD)


def test_click_batches_are_two_and_two():
    gold = golds(A=5, B=90)
    sampler = BalancedSampler(gold, "AB", 4, seed=1)
    for step in range(40):
        assert Counter(gold[i] for i in sampler.batch(step)) == {"A": 2, "B": 2}


def test_every_record_of_an_option_comes_once_a_walk_in_a_new_order():
    """Wrong here: some records are never seen, or each pass repeats the last one's order."""
    gold = golds(A=12, B=5, C=12, D=12)
    sampler = BalancedSampler(gold, ABCD, 4, seed=3)
    b = [next(i for i in sampler.batch(step) if gold[i] == "B") for step in range(50)]
    walks = [tuple(b[i : i + 5]) for i in range(0, 50, 5)]
    assert all(set(w) == {i for i, g in enumerate(gold) if g == "B"} for w in walks)
    assert len(set(walks)) > 5


def test_a_step_is_a_function_of_its_number():
    """Wrong here: a resumed run sees other records than the uninterrupted one."""
    gold = golds(A=9, B=4, C=5, D=6)
    straight = [BalancedSampler(gold, ABCD, 4, seed=5).batch(s) for s in range(20)]
    backwards = BalancedSampler(gold, ABCD, 4, seed=5)
    assert [backwards.batch(s) for s in reversed(range(20))] == straight[::-1]
    assert [BalancedSampler(gold, ABCD, 4, seed=6).batch(s) for s in range(20)] != straight


def test_scarce_options_are_resampled_and_say_so():
    sampler = BalancedSampler(golds(A=100, B=2, C=100, D=100), ABCD, 4, seed=0)
    assert [sampler.resampled(s)["B"] for s in range(4)] == [0, 0, 1, 1]
    assert [sampler.resampled(s)["A"] for s in range(4)] == [0] * 4
    figures = sampler.figures(3)
    assert figures["passes/B"] == 2
    assert figures["passes/A"] == 0.04
    assert figures["balance/B"] == 0.25


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 11), st.integers(1, 4), st.integers(0, 30), st.integers(0, 2**40))
def test_the_remainder_rotates(batch, options, step, seed):
    """A batch is even up to one; over the run too. Wrong here: a batch of 6 always prefers A and B."""
    letters = ABCD[:options]
    gold = list(letters) * 3
    sampler = BalancedSampler(gold, letters, batch, seed)
    here = Counter(gold[i] for i in sampler.batch(step))
    assert sum(here.values()) == batch
    assert max(here.values()) - min(here[o] for o in letters) <= 1
    so_far = Counter(gold[i] for s in range(step + 1) for i in sampler.batch(s))
    assert max(so_far.values()) - min(so_far[o] for o in letters) <= 1
    for option in letters:
        assert sampler.figures(step)[f"passes/{option}"] == so_far[option] / 3


def test_missing_options_are_refused_by_name_or_left_out():
    gold = golds(A=5, C=5)
    with pytest.raises(GubsError, match="gold option B, D"):
        BalancedSampler(gold, ABCD, 4, seed=0)
    sampler = BalancedSampler(gold, ABCD, 4, seed=0, allow_missing=True)
    assert sampler.missing == ("B", "D")
    assert Counter(gold[i] for i in sampler.batch(0)) == {"A": 2, "C": 2}
    with pytest.raises(GubsError, match="gold option A, B, C, D"):
        BalancedSampler([], ABCD, 4, seed=0, allow_missing=True)
    with pytest.raises(GubsError, match="first record 1 with 'None'"):
        BalancedSampler(["A", None], "A", 4, seed=0)
    with pytest.raises(ValueError, match="below 0"):
        sampler.batch(-1)


MEMBERSHIPS = {"u": ["g1", "g2"], "v": ["g1"], "w": ["g2"], "alone": ["g3"]}
MEMBERS = {"g1": ["u", "v"], "g2": ["w", "u"], "g3": ["alone"]}


def test_profile_sampling_stays_in_the_users_groups():
    """Wrong here: the 'similar' user is the user, or a stranger (its answers are then noise)."""
    drawn = [profile_sampling("u", s, MEMBERSHIPS, MEMBERS) for s in range(200)]
    assert {d.similar for d in drawn} == {"v", "w"}, "others of both groups, never the user"
    assert {d.group for d in drawn} == {"g1", "g2"}
    assert len({(d.similar, d.group) for d in drawn}) == 4, "drawn apart from each other"


def test_profile_sampling_falls_back():
    assert profile_sampling("alone", 0, MEMBERSHIPS, MEMBERS) == Sampled(similar=None, group="g3")
    assert profile_sampling("nobody", 0, MEMBERSHIPS, MEMBERS) == Sampled(None, None)


def test_profile_sampling_is_a_function_of_the_seed():
    """Wrong here: the order in which a file lists groups changes the run."""
    turned = {u: g[::-1] for u, g in MEMBERSHIPS.items()}, {g: m[::-1] for g, m in MEMBERS.items()}
    for seed in range(30):
        assert profile_sampling("u", seed, MEMBERSHIPS, MEMBERS) == profile_sampling("u", seed, *turned)


def test_seeds_are_distinct_over_a_large_grid():
    """Wrong here: two samples of a group are the same answer, or two steps repeat each other."""
    grid = itertools.product((0, 1), range(50), range(40), "TSG", range(8))
    seeds = [sample_seed(*at) for at in grid]
    assert len(set(seeds)) == len(seeds) == 2 * 50 * 40 * 3 * 8
    assert all(0 <= s < 2**63 for s in seeds)
    high = np.array([s >> 62 for s in seeds]).mean()
    assert 0.48 < high < 0.52, "all 63 bits are used"


def test_parts_of_a_seed_do_not_run_into_each_other():
    assert sample_seed(1, 12, "3", "T", 0) != sample_seed(1, 1, "23", "T", 0)
    assert sample_seed(1, 1, 23, "T", 0) != sample_seed(1, 1, "23", "T", 0)
    assert sample_seed(np.int64(1), 1, np.int64(2), "T", 0) == sample_seed(1, 1, 2, "T", 0)


def test_seeds_are_the_same_in_every_process():
    """Wrong here: Python's salted hash is used, and no run can be repeated."""
    code = "from gubs.ufm.sampling import sample_seed; print(sample_seed(7, 3, 'record', 'S', 1))"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()}
    assert runs == {str(sample_seed(7, 3, "record", "S", 1))}


def test_anybody_may_be_the_similar_user():
    """The control: a stranger's answers instead of a similar user's. The group stays the user's own."""
    drawn = [profile_sampling("u", s, MEMBERSHIPS, MEMBERS, anybody=["u", "alone", "x"]) for s in range(100)]
    assert {d.similar for d in drawn} == {"alone", "x"}
    assert [d.group for d in drawn] == [profile_sampling("u", s, MEMBERSHIPS, MEMBERS).group for s in range(100)]


def test_somebody_with_a_record_of_the_video_is_drawn_where_there_is_one():
    rather = [profile_sampling("u", s, MEMBERSHIPS, MEMBERS, rather={"w", "alone", "u"}).similar for s in range(50)]
    assert set(rather) == {"w"}
    none = [profile_sampling("u", s, MEMBERSHIPS, MEMBERS, rather={"alone"}) for s in range(50)]
    assert none == [profile_sampling("u", s, MEMBERSHIPS, MEMBERS) for s in range(50)]


@pytest.mark.parametrize("count", [2, 3, 6, 40])
def test_shuffled_profiles_are_each_of_another_group(count):
    """Wrong here: a group keeps its own profile, or two show the same one, and "shuffled" says something after all."""
    names = [f"g{i}" for i in range(count)]
    for seed in range(20):
        shown = shuffled(names, seed)
        assert sorted(shown) == sorted(shown.values()) == sorted(names)
        assert all(a != b for a, b in shown.items())
        assert shown == shuffled(names[::-1], seed)
    assert len({tuple(shuffled(names, s).items()) for s in range(20)}) > 1
    assert shuffled(["g"], 0) == {"g": "g"}
    assert shuffled([], 0) == {}
