"""Baselines against brute force on small matrices, and what they must and must not find."""

import numpy as np
import pytest
from evaluate_helpers import feedback_of, two_tastes

from gubs.evaluate.baselines.choices import all_answers, top_half
from gubs.evaluate.baselines.collaborative import (
    SCORERS,
    Factors,
    ItemNeighbours,
    Popularity,
    SequentialNeighbours,
    UserNeighbours,
    nearest,
    tuned_factors,
)
from gubs.evaluate.baselines.statistics import (
    LEARNERS,
    best_threshold,
    cross_fitted,
    cross_thresholds,
    folds_of_users,
    rate,
)
from gubs.evaluate.protocols import Contrast, HeldOut, Protocol, draw, training
from gubs.records import Video

UNSEEN = Protocol(Contrast.UNSEEN, HeldOut.RANDOM, 4, 4, 3)


@pytest.fixture(scope="module")
def world():
    return feedback_of(two_tastes())


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def test_popularity_counts_users(world):
    users = np.array([0, 3])
    assert (Popularity(world).scores(users) == world.matrix().toarray().sum(axis=0)).all()


def test_item_neighbours_by_brute_force(world):
    r, k = world.matrix().toarray(), 5
    expected = np.zeros((2, r.shape[1]))
    for i in range(r.shape[1]):
        near = np.array([0.0 if i == j else cosine(r[:, i], r[:, j]) for j in range(r.shape[1])])
        near[near < np.sort(near)[-k]] = 0.0
        expected[:, i] = r[[1, 4]] @ near
    assert ItemNeighbours(world, k).scores(np.array([1, 4])) == pytest.approx(expected)


def test_user_neighbours_by_brute_force(world):
    r, k, user = world.matrix().toarray(), 6, 7
    near = np.array([0.0 if v == user else cosine(r[user], r[v]) for v in range(len(r))])
    near[near < np.sort(near)[-k]] = 0.0
    assert UserNeighbours(world, k).scores(np.array([user]))[0] == pytest.approx(near @ r)


def test_sequential_neighbours_by_brute_force():
    f = feedback_of([(f"u{u}", item, t, None) for u in range(4) for t, item in enumerate("abcd"[u % 2 :])])
    n, near = len(f.items), np.zeros((4, 4))
    for u in range(4):
        own = f.item[f.rows_of(u)]
        for x, i in enumerate(own):
            for y, j in enumerate(own):
                if x != y:
                    near[i, j] += 0.8 ** (abs(y - x) - 1) * (1.0 if y > x else 0.5)
    root = 1 / np.sqrt(5 + np.bincount(f.item, minlength=n))
    own = f.item[f.rows_of(0)]
    expected = sum(0.8 ** (len(own) - 1 - k) * (root[i] * near[i] * root) for k, i in enumerate(own))
    assert SequentialNeighbours(f).scores(np.array([0]))[0] == pytest.approx(expected)


def test_factors_are_at_a_minimum(world):
    """No other factors of a user fit better, the items' given; rows of any length are solved alike."""
    uneven = world.without((world.user == 3) & (world.item > 5))
    m = Factors(uneven, rank=4, sweeps=3)
    r, penalty, unobserved = uneven.matrix().toarray(), 0.01, 0.1

    def loss(user, x):
        scores = m._items @ x
        weight = penalty * (r[user].sum() + unobserved * r.shape[1])
        return ((1 - scores) ** 2 * r[user]).sum() + unobserved * (scores**2).sum() + weight * x @ x

    rng = np.random.default_rng(0)
    for user in (0, 3, 11):
        best = loss(user, m._users[user])
        assert all(loss(user, m._users[user] + 1e-2 * rng.normal(size=4)) > best for _ in range(20))


def test_factors_are_tuned_on_training_records(world, monkeypatch):
    """Of two weights, one of which forgets everything, the other is taken."""
    monkeypatch.setattr("gubs.evaluate.baselines.collaborative._WEIGHTS", ((0.1, 1e6), (0.1, 0.02)))
    users = np.array([0, 5])
    expected = Factors(world, unobserved=0.1, penalty=0.02).scores(users)
    assert tuned_factors(world).scores(users) == pytest.approx(expected)


def test_factors_without_records_are_zero(world):
    assert not Factors(world.without(world.user == 2), sweeps=1).scores(np.array([2])).any()


def test_nearest_rows_do_not_depend_on_blocks(world, monkeypatch):
    unit = world.matrix()
    whole = nearest(unit, 3).toarray()
    monkeypatch.setattr("gubs.evaluate.baselines.collaborative._BLOCK", 7)
    assert (nearest(unit, 3).toarray() == whole).all()


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr("gubs.evaluate.baselines.statistics.TREES", 15)


def test_every_baseline_stands_beside_and_those_that_can_find_the_tastes_do(world):
    c = draw(world, UNSEEN, 0, seed=0)
    videos = {i: Video(i, f"T (19{50 + 40 * (i >= 'i20')})", tags=["x" if i < "i20" else "y"]) for i in world.items}
    answers = all_answers(world, c, videos, seed=0)
    right = {name: float((a.yes == c.positive).mean()) for name, a in answers.items()}
    assert {"always yes", "always no", "coin"} <= right.keys()
    assert {f"{m}, {rule}" for m in SCORERS for rule in ("top half", "threshold")} <= right.keys()
    for name in ("item kNN", "user kNN", "iALS", "logistic, all", "boosting, all", "logistic, content"):
        assert right[f"{name}, top half"] > 0.65, name
    assert right["always yes"] == right["always no"] == 0.5
    assert {"user's rate, top half", "user's rate, threshold"} <= right.keys()
    rates = answers["user's rate, top half"].score.reshape(-1, 8)
    assert (rates == rates[:, :1]).all(), "one value for a user's whole list"
    liked = {u: world.liked[world.rows_of(u)] for u in (0, 1)}
    assert (rates[0, 0] > rates[1, 0]) == (liked[0].mean() > liked[1].mean())
    assert right["popularity, top half"] < 0.65


def test_liked_is_told_from_disliked_by_stars():
    rows = [(u, i, t, 5.0 if int(u[1:]) % 2 == (i >= "i20") else 1.0) for u, i, t, _ in two_tastes(each=20)]
    world = feedback_of(rows)
    c = draw(world, Protocol(Contrast.LIKED, HeldOut.RANDOM, 1, 1, 3), 0, seed=0)
    answers = all_answers(world, c, {}, seed=0)
    assert float((answers["rated kNN, top half"].yes == c.positive).mean()) > 0.8


def test_scores_come_from_training_records_alone(world):
    """Labels turned around: whatever learns from them may change, what learns from records may not."""
    c = draw(world, UNSEEN, 0, seed=0)
    train = training(world, c)
    for name, make in SCORERS.items():
        before = make(train).scores(np.unique(c.user))
        after = make(training(world, draw(world, UNSEEN, 0, seed=0))).scores(np.unique(c.user))
        assert (before == after).all(), name


def test_the_top_half_of_equal_scores_is_the_lists_own_order(world):
    c = draw(world, UNSEEN, 0, seed=0)
    yes = top_half(np.zeros(len(c)), c).reshape(-1, 8)
    assert yes[:, :4].all()
    assert not yes[:, 4:].any()


@pytest.mark.parametrize("learner", LEARNERS)
def test_labels_that_nothing_predicts_stay_unpredicted(learner):
    """A feature that is the user's number: with rows of one user on both sides it would give the label away."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(80), 10)
    labels = np.repeat(rng.random(80) < 0.5, 10)
    features = np.stack([user, rng.random(800)], axis=1).astype(float)
    fold = folds_of_users(user, seed=0)
    assert all(len(set(fold[user == u])) == 1 for u in range(80))
    out = cross_fitted(features, labels, fold, LEARNERS[learner])
    assert abs(float(((out > 0.5) == labels).mean()) - 0.5) < 0.2
    inside = LEARNERS[learner](features, labels).predict_proba(features)[:, 1]
    assert learner == "logistic" or ((inside > 0.5) == labels).mean() > 0.7


def test_a_threshold_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(50):
        score, labels = rng.integers(0, 6, 30).astype(float), rng.random(30) < 0.4
        accuracy = ((score >= best_threshold(score, labels)) == labels).mean()
        assert accuracy == max(((score >= t) == labels).mean() for t in [*score, np.inf])
    assert best_threshold(np.zeros(4), np.zeros(4, bool)) == np.inf


def test_thresholds_come_from_other_folds():
    score, labels = np.array([1.0, 2.0, 1.0, 2.0]), np.array([False, True, True, False])
    yes = cross_thresholds(score, labels, np.array([0, 0, 1, 1]))
    assert yes.tolist() == [False, False, False, True]  # fold 0 by "never", fold 1 by "from 2 on"


def test_a_rate_without_records_is_the_prior():
    assert rate(np.array([0.0, 10.0]), np.array([0.0, 10.0]), prior=0.2) == pytest.approx([0.2, 11 / 15])
