import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gubs.data.settings import SplitSettings
from gubs.data.splits import SplitResult, check_no_leak, split
from gubs.errors import InputError
from gubs.records import SCHEMAS


def log(counts, task="sequential", times=True, start=0):
    """One user per entry of `counts`, with that many records."""
    rows = [
        {
            "interaction_id": f"{task}-{u}-{k}",
            "user_id": f"u{u}",
            "video_id": f"v{k % 7}",
            "task": task,
            "timestamp": k if times else None,
        }
        for u, n in enumerate(counts, start)
        for k in range(n)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["interactions"])


def roles(result, user, task="sequential"):
    frame = result.interactions.to_pandas()
    return frame[(frame.user_id == user) & (frame.task == task)].role.tolist()


def test_first_half_is_history_second_half_targets():
    result = split(log([6, 7]), SplitSettings(test_users=1), seed=0)
    assert roles(result, "u0") == ["history"] * 3 + ["target"] * 3
    assert roles(result, "u1") == ["history"] * 3 + ["target"] * 4


def test_last_records_of_a_click_user_are_targets():
    result = split(log([12, 8], task="click"), SplitSettings(test_users=1, click_targets=6), seed=0)
    assert roles(result, "u0", "click") == ["history"] * 6 + ["target"] * 6
    assert roles(result, "u1", "click") == ["history"] * 2 + ["target"] * 6


def test_time_orders_the_records_and_file_order_where_there_is_no_time():
    shuffled = log([6]).take([3, 1, 5, 0, 2, 4])
    assert split(shuffled, SplitSettings(), 0).interactions["timestamp"].to_pylist() == [0, 1, 2, 3, 4, 5]
    untimed = log([6], times=False).take([3, 1, 5, 0, 2, 4])
    ids = split(untimed, SplitSettings(), 0).interactions["interaction_id"].to_pylist()
    assert ids == untimed["interaction_id"].to_pylist()


def test_timestamps_survive_exactly():
    exact = 1747612800123457
    times = [exact, exact + 1, exact + 2, exact + 3, None, None, None, None]
    rows = log([4, 4]).set_column(4, "timestamp", pa.array(times, pa.int64()))
    assert split(rows, SplitSettings(min_history=1), 0).interactions["timestamp"].to_pylist() == times


def test_records_without_a_time_are_set_aside_where_others_have_one():
    """Sorted first, as if they were the oldest, a user's last views became history and the first ones targets."""
    rows = log([6, 6])
    times = [10, 11, None, 13, None, 15, *[None] * 6]
    rows = rows.set_column(4, "timestamp", pa.array(times, pa.int64())).take([5, 3, 1, 0, 2, 4, 6, 7, 8, 9, 10, 11])
    result = split(rows, SplitSettings(test_users=1), 0)
    own = result.interactions.filter(pc.equal(result.interactions["user_id"], "u0"))
    assert own["timestamp"].to_pylist() == [10, 11, 13, 15]
    assert own["role"].to_pylist() == ["history", "history", "target", "target"]
    other = result.interactions.filter(pc.equal(result.interactions["user_id"], "u1"))
    assert other["interaction_id"].to_pylist() == [f"sequential-1-{k}" for k in range(6)], "the order of the log"
    assert result.report["set_aside"] == {"no_time": 2, "held_out_videos": 0}


def pages(sizes, user="u0", interleaved=False):
    """One click user's pages, one after the other; or with the last two in turns."""
    places = [page for page, n in enumerate(sizes) for _ in range(n)]
    if interleaved:
        tail = sizes[-1] + sizes[-2]
        places[-tail:] = [len(sizes) - 1 - k % 2 for k in range(tail)]
    rows = [
        {
            "interaction_id": f"{user}-{k}",
            "user_id": user,
            "video_id": f"v{k}",
            "task": "click",
            "timestamp": k,
            "page_id": f"p{page}",
            "clicked": k % 4 == 0,
        }
        for k, page in enumerate(places)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["interactions"])


@pytest.mark.parametrize(
    ("sizes", "wanted", "history"),
    [
        ([8, 8, 8], 8, 16),
        ([8, 8, 8], 10, 16),
        ([8, 8, 8], 12, 8),
        ([8, 8, 8], 13, 8),
        ([3, 20], 4, 3),
        ([1, 4, 4], 8, 5),
        ([1, 12], 6, 0),
        ([12], 6, 0),
    ],
)
def test_a_page_is_never_divided(sizes, wanted, history):
    """A page's clicks in the history would tell about the rest of it: a page often has one click."""
    result = split(pages(sizes), SplitSettings(test_users=1, click_targets=wanted, min_history=2), 0)
    assert roles(result, "u0", "click") == (
        ["history"] * history + ["target"] * (sum(sizes) - history) if history else []
    )


def test_pages_that_overlap_in_time_go_together():
    result = split(pages([6, 5, 5], interleaved=True), SplitSettings(test_users=1, click_targets=5, min_history=2), 0)
    assert roles(result, "u0", "click") == ["history"] * 6 + ["target"] * 10


def test_users_with_too_short_a_record_are_left_out_and_counted():
    result = split(log([3, 10]), SplitSettings(min_history=2), seed=0)
    assert result.users["user_id"].to_pylist() == ["u1"]
    assert result.report["too_short"] == {"sequential": {"users": 1, "interactions": 3}}


def test_number_of_test_users():
    def tested(n, wanted):
        return split(log([6] * n), SplitSettings(test_users=wanted), 0).report["users"].get("sequential/test", 0)

    assert tested(50, 10) == 10
    assert tested(50, 40) == 25, "at least half stay training users"


def test_a_user_of_both_tasks_is_never_test_here_and_train_there():
    both = pa.concat_tables([log([20] * 30), log([20] * 30, task="click")])
    result = split(both, SplitSettings(test_users=5), seed=1)
    assert result.report["users"] == {"click/test": 5, "click/train": 25, "sequential/test": 5, "sequential/train": 25}
    mixed = pa.concat_tables([log([20] * 30), log([20] * 4, task="click")])
    result = split(mixed, SplitSettings(test_users=15), seed=1)
    assert result.report["users"]["sequential/test"] == 15
    assert result.report["users"]["click/test"] == 2


def test_the_draw_depends_on_the_seed_not_on_the_order_of_rows():
    rows = log([6] * 40)

    def test_users(table, seed):
        users = split(table, SplitSettings(test_users=10), seed).users
        return set(users.filter(pc.equal(users["split"], "test"))["user_id"].to_pylist())

    assert test_users(rows, 1) == test_users(rows.take(list(range(rows.num_rows))[::-1]), 1)
    assert test_users(rows, 1) != test_users(rows, 2)


def test_a_lot_is_of_the_seed_and_the_id_alone():
    """Users who are not drawn may come and go: those who are drawn stay drawn."""
    rows, wanted = log([6] * 60), SplitSettings(test_users=10, ugm_users=12)

    def drawn(table):
        users = split(table, wanted, 5).users
        test = users.filter(pc.equal(users["split"], "test"))["user_id"].to_pylist()
        return set(test), set(users.filter(users["ugm"])["user_id"].to_pylist())

    test, ugm = drawn(rows)
    assert (len(test), len(ugm)) == (10, 12)
    others = [u for u in rows["user_id"].unique().to_pylist() if u not in test | ugm]
    fewer = rows.filter(pc.invert(pc.is_in(rows["user_id"], value_set=pa.array(others[:25]))))
    assert drawn(fewer) == (test, ugm)
    assert not test & ugm


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda f: pd.concat([f, f[f.role == "target"].assign(role="history")]), "are in a history too"),
        (lambda f: f.assign(role=f.role.map({"history": "target", "target": "history"})), "before a history record"),
        (lambda f: f.assign(page_id="p1"), "pages have both history and targets, for example page p1 of user u0"),
    ],
)
def test_the_check_finds_leaks_in_records(tamper, message):
    good = split(log([8] * 4), SplitSettings(test_users=1), 0)
    frame = tamper(good.interactions.to_pandas())
    bad = SplitResult(pa.Table.from_pandas(frame, schema=SCHEMAS["ifvr"], preserve_index=False), good.users)
    with pytest.raises(InputError, match=message):
        check_no_leak(bad)


@pytest.mark.parametrize(
    ("change", "message"), [({"ugm": True}, "UGM"), ({"split": "train", "task": "click"}, "train")]
)
def test_the_check_finds_leaks_of_users(change, message):
    good = split(log([8] * 4), SplitSettings(test_users=1), 0)
    users = good.users.to_pandas()
    tested = users[users.split == "test"]
    users = pd.concat([users, tested.assign(**change)])
    with pytest.raises(InputError, match=message):
        check_no_leak(SplitResult(good.interactions, pa.Table.from_pandas(users, preserve_index=False)))


logs = st.lists(
    st.tuples(
        st.sampled_from([f"u{i}" for i in range(8)]),
        st.sampled_from(["sequential", "click"]),
        st.none() | st.integers(0, 50),
        st.none() | st.integers(0, 6),
    ),
    max_size=120,
).map(
    lambda rows: pa.Table.from_pylist(
        [
            {
                "interaction_id": f"i{k}",
                "user_id": u,
                "video_id": f"v{k % 5}",
                "task": t,
                "timestamp": time,
                "page_id": f"p{page}" if t == "click" and page is not None else None,
            }
            for k, (u, t, time, page) in enumerate(rows)
        ],
        schema=SCHEMAS["interactions"],
    )
)
sizes = st.builds(
    SplitSettings,
    test_users=st.integers(1, 5),
    ugm_users=st.integers(1, 5),
    click_targets=st.integers(1, 6),
    min_history=st.integers(1, 4),
    held_out_videos=st.sampled_from([0.0, 0.4]),
)


def test_held_out_videos_are_in_test_targets_and_nowhere_else():
    whole = log([40] * 60)
    whole = whole.set_column(2, "video_id", pa.array([f"v{(7 * i) % 101}" for i in range(whole.num_rows)]))
    wanted = SplitSettings(test_users=20, ugm_users=5, held_out_videos=0.3)
    result = split(whole, wanted, 0)
    rows = result.interactions.to_pandas()
    tested = (rows.split == "test") & (rows.role == "target")
    new, others = set(rows.video_id[tested]), set(rows.video_id[~tested])
    assert 15 < len(new) < 45, "about three in ten of 101"
    assert not new & others
    assert result.report["users"] == {"sequential/test": 20, "sequential/train": 40}
    assert result.report["set_aside"]["held_out_videos"] == whole.num_rows - len(rows) > 0
    users = result.users.to_pandas().set_index("user_id")
    assert users.n_target.to_dict() == rows[rows.role == "target"].groupby("user_id").size().to_dict()
    assert users.n_history.to_dict() == rows[rows.role == "history"].groupby("user_id").size().to_dict()
    again = split(whole.take(np.random.default_rng(0).permutation(whole.num_rows)), wanted, 0)
    assert set(again.interactions["video_id"].to_pylist()) == new | others, "whatever the order of rows"


@given(logs, sizes, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_splits_hold_their_rules_for_any_log(rows, wanted, seed):
    result = split(rows, wanted, seed)
    check_no_leak(result)
    frame, users = result.interactions.to_pandas(), result.users.to_pandas()
    assert frame.interaction_id.is_unique
    assert set(frame.interaction_id) <= set(rows["interaction_id"].to_pylist())
    lost = sum(t["interactions"] for t in result.report["too_short"].values()) + sum(
        result.report["set_aside"].values()
    )
    assert len(frame) + lost == rows.num_rows, "every record is kept or counted"
    for (_, task), own in frame.groupby(["user_id", "task"]):
        history, target = (own.role == "history").sum(), (own.role == "target").sum()
        assert history >= wanted.min_history
        assert target > 0
        if task == "sequential" and not wanted.held_out_videos:
            assert target == len(own) - len(own) // 2
        if (
            task == "click"
            and not wanted.held_out_videos
            and own.page_id.isna().all()
            and len(own) > wanted.click_targets + wanted.min_history
        ):
            assert target == wanted.click_targets
        assert own.role.tolist() == ["history"] * history + ["target"] * target, "history comes first"
    assert (users.groupby("task").split.apply(lambda s: (s == "test").sum()) <= wanted.test_users).all()
    assert result.report["ugm_users"] <= wanted.ugm_users
