"""The "10 + 10" candidates: drawn as they say, equal for equal seeds, and refused where they give something away."""

from dataclasses import replace

import numpy as np
import pytest
from evaluate_helpers import feedback_of

from gubs import stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.errors import InputError
from gubs.evaluate.protocols import (
    Contrast,
    HeldOut,
    Protocol,
    digest,
    draw,
    from_table,
    held_out,
    protocols_for,
    prove,
    to_table,
    training,
)
from gubs.evaluate.public import read_feedback

UNSEEN = Protocol(Contrast.UNSEEN, HeldOut.RANDOM, 3, 3, 2)
LAST = replace(UNSEEN, held_out=HeldOut.LAST)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    rows = []
    for user in range(30):
        chosen = rng.choice(60, 20, replace=False)
        rows += [(f"u{user:02}", f"i{i:02}", 100 * k + user, float(rng.integers(1, 6))) for k, i in enumerate(chosen)]
    return feedback_of(rows)


def names(feedback, c):
    return {(feedback.users[u], feedback.items[i], bool(p)) for u, i, p in zip(c.user, c.item, c.positive, strict=True)}


def test_repeated_pairs_count_once_and_times_order_a_user():
    f = feedback_of([("a", "x", 5, None), ("a", "y", 3, None), ("a", "x", 1, None), ("b", "x", 2, None)], ["z"])
    assert [f.items[i] for i in f.item] == ["x", "y", "x"]
    assert f.time.tolist() == [1, 3, 2]
    assert f.items == ("x", "y", "z")
    assert f.matrix().toarray().tolist() == [[1, 1, 0], [1, 0, 0]]


def test_of_a_user_with_and_without_times_only_the_timed_records_count():
    """Sorted to the front, they would be history; to the end, the last item. Users without times keep their order."""
    rows = [
        ("a", "x", None, None),
        ("a", "y", 2, None),
        ("a", "z", 1, None),
        ("b", "z", None, None),
        ("b", "x", None, None),
    ]
    f = feedback_of(rows)
    assert f.without_place == 1
    assert [f.items[i] for i in f.item] == ["z", "y", "z", "x"]


def test_users_whose_last_time_is_shared_are_counted():
    f = feedback_of([("a", "x", 1, None), ("a", "y", 1, None), ("b", "x", 1, None), ("b", "y", 2, None)])
    assert f.tied_users == 1


def test_candidates_are_what_they_say(world):
    c = draw(world, UNSEEN, 20, seed=1)
    assert c.facts["users"] == 20
    assert c.facts["candidates"] == len(c) == 120
    records = set(zip(world.user.tolist(), world.item.tolist(), strict=True))
    pairs = list(zip(c.user.tolist(), c.item.tolist(), strict=True))
    assert [pair in records for pair in pairs] == c.positive.tolist()
    rest = training(world, c)
    assert len(rest) == len(world) - 60
    assert not set(pairs) & set(zip(rest.user.tolist(), rest.item.tolist(), strict=True))
    first = c.positive.reshape(20, 6).argmax(axis=1)
    assert len(set(first.tolist())) > 1, "positives must not always come first"


def test_the_last_in_time_leaves_an_earlier_profile(world):
    c = draw(world, LAST, 0, seed=1)
    for user in np.unique(c.user):
        chosen = world.item[world.rows_of(user)]
        assert set(c.item[(c.user == user) & c.positive]) == set(chosen[-3:])


def test_negatives_existed_when_the_user_was_there():
    """u0 was there first, when nobody had chosen anything else: it cannot be asked. u1 can be asked about u0's only."""
    rows = [(f"u{u}", f"i{u}-{k}", 10 * u + k, None) for u in range(4) for k in range(6)]
    f = feedback_of(rows)
    c = draw(f, UNSEEN, 0, seed=1)
    assert c.facts["too_few_unseen"] == 1
    assert {f.users[u] for u in c.user} == {"u1", "u2", "u3"}
    assert {f.items[i][:2] for i in c.item[(c.user == 1) & ~c.positive]} == {"i0"}
    assert draw(f, replace(UNSEEN, available=False), 0, seed=1).facts["users"] == 4


def test_popular_negatives_are_popular():
    rows = [(f"u{u}", f"common{k}", 1, None) for u in range(40) for k in range(4) if u % 4 != k]
    rows += [(f"u{u}", f"own{u}", 1, None) for u in range(40)]
    f = feedback_of(rows)
    both = {}
    for contrast in (Contrast.UNSEEN, Contrast.POPULAR):
        c = draw(f, Protocol(contrast, HeldOut.RANDOM, 1, 1, 1), 0, seed=0)
        negatives = [f.items[i] for i in c.item[~c.positive]]
        both[contrast] = np.mean([n.startswith("common") for n in negatives])
    assert both[Contrast.POPULAR] > 0.25 > both[Contrast.UNSEEN]


def test_liked_against_disliked(world):
    c = draw(world, Protocol(Contrast.LIKED, HeldOut.RANDOM, 3, 3, 2), 0, seed=1)
    stars = {(u, i): r for u, i, r in zip(world.user, world.item, world.rating, strict=True)}
    ratings = [stars[pair] for pair in zip(c.user, c.item, strict=True)]
    assert all(r >= 4 if p else r <= 2 for r, p in zip(ratings, c.positive, strict=True))


def test_a_published_division_is_kept():
    rows = [(f"u{u}", f"i{(u + 3 * k) % 40:02}", None, None) for u in range(20) for k in range(12)]
    f = feedback_of(rows, parts=(["train"] * 4 + ["valid"] * 4 + ["test"] * 4) * 20)
    protocol = protocols_for(f, 3, 2)[0]
    assert protocol.held_out is HeldOut.PUBLISHED
    c = draw(f, protocol, 0, seed=0)
    train = set(zip(*(a[f.part == "train"].tolist() for a in (f.user, f.item)), strict=True))
    assert set(zip(*(a.tolist() for a in (training(f, c).user, training(f, c).item)), strict=True)) == train
    assert not train & set(zip(c.user.tolist(), c.item.tolist(), strict=True))


LIKED_LAST = Protocol(Contrast.LIKED, HeldOut.LAST, 2, 2, 3)


def test_dislikes_that_are_last_in_time_leave_an_earlier_profile_too():
    """Ann disliked two films in the middle and liked the last two: what came between is later than a candidate."""
    stars = [4, 3, 4, 2, 1, 3, 5, 4, 5, 4]
    rows = [("ann", f"i{k}", 10 * k, float(s)) for k, s in enumerate(stars)]
    rows += [("bob", f"i{k}", 10 * k, float(s)) for k, s in enumerate([1, 2, 5, 4, 3, 5, 4, 3])]  # nothing is earlier
    feedback = feedback_of(rows)
    c = draw(feedback, LIKED_LAST, 0, seed=0)
    assert names(feedback, c) == {("ann", "i8", True), ("ann", "i9", True), ("ann", "i3", False), ("ann", "i4", False)}
    rest = training(feedback, c)
    own = [feedback.items[i] for i in rest.item[rest.rows_of(0)]]
    assert own == ["i0", "i1", "i2"], "the profile ends before the first candidate of either kind"
    assert c.facts["profile_records"] == 3
    assert len(rest.item[rest.rows_of(1)]) == 8, "of users who are not asked all is known"


def test_the_proof_refuses_dislikes_that_are_not_the_last():
    stars = [1, 3, 4, 2, 2, 4, 5, 4]
    feedback = feedback_of([("ann", f"i{k}", 10 * k, float(s)) for k, s in enumerate(stars)])
    c = draw(feedback, replace(LIKED_LAST, negatives=2, least_profile=1), 0, seed=0)
    early = replace(c, item=np.where(c.item == feedback.items.index("i4"), feedback.items.index("i0"), c.item))
    with pytest.raises(InputError, match="one of its kind is later than a candidate"):
        prove(feedback, early)
    with pytest.raises(InputError, match="fewer than 5 records"):
        prove(feedback, replace(c, protocol=replace(c.protocol, least_profile=5)))


def test_the_proof_refuses_training_data_that_go_on_after_a_candidate(world, monkeypatch):
    c = draw(world, replace(LIKED_LAST, least_profile=1), 0, seed=0)
    monkeypatch.setattr("gubs.evaluate.protocols.training", lambda f, c: f.without(held_out(f, c)))
    with pytest.raises(InputError, match="the profile is later than a candidate"):
        prove(world, c)


def test_a_log_in_the_order_of_time_needs_no_times_for_the_last():
    """As reading sequences have it: the source says that the order is that of time."""
    rows = [(f"u{u}", f"i{(7 * u + k) % 12:02}", None, None) for u in range(6) for k in range(8)]
    ordered = replace(feedback_of(rows), ordered=True)
    protocol = next(p for p in protocols_for(ordered, 2, 3) if p.held_out is HeldOut.LAST)
    c = draw(ordered, protocol, 0, seed=0)
    for user in range(6):
        own = ordered.item[ordered.rows_of(user)]
        assert sorted(c.item[(c.user == user) & c.positive]) == sorted(own[-2:])
    assert c.facts["users_cut_inside_a_tie"] == 0


def test_reading_sequences_say_that_they_are_in_order(tmp_path):
    data = tmp_path / "books"
    data.mkdir()
    windows = ['1,"[5, 3, 9]",900547200', '1,"[3, 9, 2]",929923200', '2,"[9, 2]",949622400']
    (data / "train.csv").write_text("\n".join(["user_id,item_ids,timestamp", *windows]) + "\n")
    (data / "id2name4Rec.json").write_text('{"2": "B", "3": "C", "5": "E", "9": "I"}')
    run = Run(tmp_path / "run")
    stages.make(["raw"], run, load_settings("tiny", ["source.kind=amazon", f"source.path={data}"]))
    feedback = read_feedback(run.artifact("raw"))
    assert feedback.ordered
    assert not feedback.timed
    assert [feedback.items[i] for i in feedback.item[feedback.rows_of(0)]] == ["5", "3", "9", "2"]


def test_what_data_lack_is_not_offered(world):
    assert len(protocols_for(world, 3, 2)) == 6
    untimed = replace(world, time=np.full(len(world), -1))
    assert {p.held_out for p in protocols_for(untimed, 3, 2)} == {HeldOut.RANDOM}
    assert {p.held_out for p in protocols_for(replace(untimed, ordered=True), 3, 2)} == {HeldOut.RANDOM, HeldOut.LAST}
    unrated = replace(world, liked=np.zeros(len(world), bool))
    assert Contrast.LIKED not in {p.contrast for p in protocols_for(unrated, 3, 2)}


def test_equal_seeds_give_equal_hashes_and_other_users_change_nothing(world):
    one, two, other = (draw(world, UNSEEN, 0, seed=s) for s in (1, 1, 2))
    assert digest([one], world) == digest([two], world) != digest([other], world)
    few = draw(world, UNSEEN, 10, seed=1)
    assert names(world, few) <= names(world, one)


def test_a_stored_manifest_reads_back(world):
    drawn = [draw(world, p, 0, seed=1) for p in protocols_for(world.without(world.user < 2), 3, 2, available=False)]
    table = to_table(drawn, world)
    for c in drawn:
        again = from_table(table, world, c.protocol)
        assert digest([again], world) == digest([c], world)


def changed(c, **columns):
    return replace(c, **columns)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda c, f: changed(c, item=np.where(np.arange(len(c)) == 1, c.item[0], c.item)), "twice"),
        (lambda c, f: changed(c, positive=~c.positive), "never chosen"),
        (lambda c, f: changed(c, positive=np.ones(len(c), bool)), "never chosen"),
        (lambda c, f: changed(c, user=c.user[1:], item=c.item[1:], positive=c.positive[1:]), "another size"),
    ],
)
def test_the_proof_refuses(world, fault, message):
    c = draw(world, UNSEEN, 10, seed=1)
    with pytest.raises(InputError, match=message):
        prove(world, fault(c, world))


def test_the_proof_refuses_a_later_profile(world):
    c = draw(world, replace(LAST, available=False), 10, seed=1)
    early = draw(world, replace(UNSEEN, available=False), 10, seed=1)
    with pytest.raises(InputError, match="later than a candidate"):
        prove(world, replace(early, protocol=c.protocol))


def test_the_edge_of_the_data_is_measured():
    """Every user's held-out item is chosen by nobody else, every negative by many: one look tells them apart."""
    rows = [(f"u{u}", f"own{u}", 9, None) for u in range(10)]
    rows += [(f"u{u}", f"c{(u + k) % 10}", 1 + k, None) for u in range(10) for k in range(3)]
    c = draw(feedback_of(rows), Protocol(Contrast.UNSEEN, HeldOut.LAST, 1, 1, 1), 0, seed=0)
    assert c.facts["positives_nobody_else_chose"] == 10
    assert c.facts["unknown_item_rule"] < 0.5
