"""SASRec learns an order that can be learned, sees no later item, and gets every item in training."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from evaluate_helpers import feedback_of

from gubs.errors import InputError
from gubs.evaluate.baselines.collaborative import Popularity
from gubs.evaluate.baselines.sasrec import (
    Place,
    fit,
    from_bytes,
    model_class,
    next_scores,
    rows_of,
    shares,
    to_bytes,
    training,
    windows,
)
from gubs.evaluate.ranking import figures, last_rows, ranks_of, score_blocks, unseen_items
from gubs.evaluate.settings import SasrecSettings

TOY = SasrecSettings(length=8, width=16, blocks=1, heads=1, dropout=0.0, epochs=25, batch=32, lr=1e-2)


def circles(users=80, items=12, each=10):
    """Every user goes round: 3, 4, 5, ..., 11, 0, 1, ..."""
    return [(np.arange(each) + u) % items for u in range(users)]


def test_an_order_is_learned():
    *_, (model, loss) = training(circles(), 12, TOY, seed=0)
    assert loss < 0.3
    (scores,) = next_scores(model, [np.array([4, 5, 6]), np.array([10, 11]), np.array([], dtype=np.int64)], TOY)
    assert scores.argmax(axis=1)[:2].tolist() == [7, 0]
    assert not scores[2].any()
    (again,) = next_scores(from_bytes(to_bytes(model), 12, TOY), [np.array([4, 5, 6])], TOY)
    assert again[0] == pytest.approx(scores[0], abs=1e-5)


def test_users_with_one_item_each_teach_nothing_and_break_nothing():
    *_, (model, loss) = training([np.array([3]), np.array([], dtype=np.int64)], 12, TOY, seed=0)
    assert np.isnan(loss)
    (scores,) = next_scores(model, [np.array([3])], TOY)
    assert np.isfinite(scores).all()


UNEVEN = [np.arange(2 + (9 * (u % 2)) * (u % 5)) % 12 for u in range(23)]
"""Users with 2 to 38 items: alone, workers with half of them each would take different numbers of batches."""


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 4, 9, 33])
def test_all_workers_take_equally_many_batches_and_every_row_counts_once(workers, rows):
    """Wrong here: one worker waits for ever for a gradient that the others have no batch for."""
    plans = [list(shares(rows, 4, Place(k, workers), np.random.default_rng(7))) for k in range(workers)]
    assert {len(p) for p in plans} == {-(-rows // 4)}
    counted = [row for p in plans for _, own, counts in p for row in own if counts]
    assert sorted(counted) == list(range(rows))
    assert all(len(own) > 0 for p in plans for _, own, _ in p), "a worker without a row would have no gradient"
    for step in zip(*plans, strict=True):
        assert len({tuple(whole) for whole, _, _ in step}) == 1, "all know the whole batch"


class Averaged:
    """In place of DDP, in threads: gradients are averaged over the workers, who wait for each other."""

    def __init__(self, workers, start):
        self._start, self._gradients = start, [None] * workers
        self._barrier = threading.Barrier(workers, timeout=20)

    def wrap(self, rank, model):
        model.load_state_dict(self._start)  # threads share torch's seed
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: self._mean(rank, gradient))
        return model

    def _mean(self, rank, gradient):
        self._gradients[rank] = gradient
        self._barrier.wait()
        mean = torch.stack(self._gradients).mean(dim=0)
        self._barrier.wait()
        return mean


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_do_what_one_does(workers):
    """Over users with very different numbers of items. Wrong here: a worker has another number of batches, and the
    others wait in vain."""
    settings = TOY.model_copy(update={"epochs": 3, "batch": 8})
    torch.manual_seed(0)
    start = model_class()(12, settings).state_dict()

    def train(rank, group, workers):
        place = Place(rank, workers, lambda model: group.wrap(rank, model))
        *_, (model, _) = training(UNEVEN, 12, settings, 0, place)
        return np.concatenate(list(next_scores(model, UNEVEN, settings)))

    group = Averaged(workers, start)
    with ThreadPoolExecutor(workers) as pool:
        scores = list(pool.map(lambda rank: train(rank, group, workers), range(workers)))
    alone = train(0, Averaged(1, start), 1)
    assert np.ptp(alone) > 0.1
    assert all(np.allclose(alone, other, atol=1e-4) for other in scores)


def test_no_place_sees_a_later_item():
    torch.manual_seed(0)
    model = model_class()(12, TOY).eval()
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 9]])
    with torch.no_grad():
        assert torch.equal(model(one)[:, :3], model(other)[:, :3])
        assert not torch.allclose(model(one)[:, 3], model(other)[:, 3])


@pytest.mark.parametrize("n", [2, 5, 6, 7, 11, 23])
def test_every_item_but_the_first_is_predicted_once(n):
    for seed in range(10):
        rows = windows([np.arange(n)], 6, np.random.default_rng(seed))
        assert sorted(b for row in rows for a, b in itertools.pairwise(row) if a) == list(range(2, n + 1))


def test_the_latest_items_are_kept():
    assert rows_of([np.arange(5), np.arange(2)], 3).tolist() == [[3, 4, 5], [0, 1, 2]]


def test_ray_train_gives_the_same_model(ray_local):
    settings = TOY.model_copy(update={"epochs": 2})
    *_, (model, _) = training(circles(), 12, settings, seed=0)
    trained = fit(circles(), 12, settings, seed=0)
    # scores, not weights: the bias of the keys changes no score, so Adam follows the rounding of its gradient
    plain, trained_scores = (np.concatenate(list(next_scores(m, circles(), settings))) for m in (model, trained))
    assert np.allclose(plain, trained_scores, atol=1e-4)
    assert np.ptp(plain) > 0.1


def test_places_by_hand():
    """u0 has a and b, and then c; popularity is a 3, b 2, d 2, c 1 (without the last records)."""
    f = feedback_of(
        [
            *[("u0", i, t, None) for t, i in enumerate("abc")],
            *[("u1", i, t, None) for t, i in enumerate("adbc")],
            *[("u2", i, t, None) for t, i in enumerate("acde")],
        ]
    )
    last = last_rows(f)
    assert [f.items[i] for i in f.item[last]] == ["c", "c", "e"]
    train = f.without(np.isin(np.arange(len(f)), last))
    drawn = np.array([[3, 4]] * 3)
    places = ranks_of(score_blocks(Popularity(train), f.user[last]), f, last, drawn)
    assert places[0].tolist() == [1, 3, 1]  # d is better; a, b, d are; d is better, e is not
    assert places[2].tolist() == [1, 4, 1.5]  # e has none: b is better; all are; d is better, e itself equal


def test_ranks_become_rates():
    rows = figures(np.array([[0.0, 0, 0], [9.0, 9, 9], [10.0, 10, 10], [3.0, 3, 3]]), "m", 50, 0)
    rates = {r["name"]: r["value"] for r in rows if r["way"].startswith("100")}
    assert rates["HR@10"] == 0.75
    assert rates["NDCG@10"] == pytest.approx((1 + 1 / np.log2(11) + 1 / np.log2(5)) / 4)


def test_a_user_who_has_everything_is_refused():
    f = feedback_of([("u0", i, t, None) for t, i in enumerate("abc")])
    with pytest.raises(InputError, match="u0 chose every item"):
        unseen_items(f, np.array([0]), 0)
    with pytest.raises(InputError, match="three records"):
        last_rows(feedback_of([("u0", "a", 1, None)]))
