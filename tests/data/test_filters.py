import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gubs.data import build
from gubs.data.filters import apply_filters, is_view, shrinkage, task_shrinkage
from gubs.data.settings import FilterSettings
from gubs.errors import InputError
from gubs.records import SCHEMAS, conform

LOOSE = {"min_video_views": 0, "min_user_exposures": 0}


def view(i, **fields):
    base = {"interaction_id": f"i{i}", "user_id": "u", "video_id": "v", "task": "sequential", "play_rate": 0.1}
    return {**base, "prev_op_gap_s": 5.0, "next_op_gap_s": 5.0, "exited_app": False, **fields}


def table(*rows):
    return pa.Table.from_pylist(list(rows), schema=SCHEMAS["interactions"])


def kept_ids(rows, **fields):
    kept, _ = apply_filters(table(*rows), FilterSettings(**{**LOOSE, **fields}))
    return kept["interaction_id"].to_pylist()


def test_each_noise_criterion_removes_its_own_case():
    rows = [
        view(0),
        view(1, prev_op_gap_s=None),
        view(2, next_op_gap_s=None),
        view(3, prev_op_gap_s=70.0, next_op_gap_s=51.0),
        view(4, prev_op_gap_s=70.0, next_op_gap_s=50.0),
        view(5, exited_app=True),
    ]
    assert kept_ids(rows) == ["i0", "i4"], "a gap of exactly two minutes passes"
    _, steps = apply_filters(table(*rows), FilterSettings(**LOOSE))
    assert [s.removed for s in steps][:4] == [0, 2, 1, 1]


def test_scope_skips_keeps_watched_videos():
    rows = [
        view(0),
        view(1, play_rate=0.8, prev_op_gap_s=None),
        view(2, play_rate=0.3, exited_app=True),
        view(3, play_rate=None, exited_app=True),
    ]
    assert kept_ids(rows) == ["i0", "i1", "i2", "i3"]
    assert kept_ids(rows, noise_scope="all") == ["i0"]
    assert kept_ids(rows, noise_scope="all", noise=False) == ["i0", "i1", "i2", "i3"]


def test_the_noise_criteria_do_not_apply_to_exposures():
    rows = [view(0), view(1, task="click", play_rate=None, prev_op_gap_s=None, exited_app=True, clicked=False)]
    assert kept_ids(rows, noise_scope="all") == ["i0", "i1"]


def test_criteria_without_columns_are_reported_and_not_applied():
    rows = [view(i, prev_op_gap_s=None, exited_app=None) for i in range(3)]
    kept, steps = apply_filters(table(*rows), FilterSettings(**LOOSE))
    assert kept.num_rows == 3
    assert [s.applied for s in steps] == [True, False, False, False, True, True]
    assert "the source has no prev_op_gap_s" in steps[1].note
    assert "exited_app" in steps[3].note


def test_an_exposure_without_a_click_is_no_view():
    rows = [
        view(0),
        view(1, task="click", clicked=True),
        view(2, task="click", clicked=False),
        view(3, task="click", clicked=None),
    ]
    assert is_view(table(*rows)).tolist() == [True, True, False, False]


def test_fixed_point_and_single_pass_differ_as_documented():
    # v1 has 2 views only thanks to user a; user a is removed (1 exposure without v2), then v1
    rows = [
        view(0, task="click", user_id="a", video_id="v1", clicked=True),
        view(1, task="click", user_id="a", video_id="v2", clicked=True),
        view(2, task="sequential", user_id="b", video_id="v1"),
    ]
    limits = {"min_video_views": 2, "min_user_exposures": 2}
    assert kept_ids(rows, **limits, fixed_point=False) == ["i2"]
    assert kept_ids(rows, **limits) == []


interactions = st.lists(
    st.builds(
        dict,
        user_id=st.sampled_from("abcdef"),
        video_id=st.sampled_from("uvwxyz"),
        task=st.sampled_from(["sequential", "click"]),
        play_rate=st.none() | st.floats(0, 1),
        clicked=st.none() | st.booleans(),
        prev_op_gap_s=st.none() | st.floats(0, 300),
        next_op_gap_s=st.none() | st.floats(0, 300),
        exited_app=st.none() | st.booleans(),
    ),
    max_size=60,
).map(
    lambda rows: conform(
        pa.Table.from_pylist(
            [{**r, "interaction_id": f"i{k}"} for k, r in enumerate(rows)], schema=SCHEMAS["interactions"]
        ),
        "interactions",
    )
)

limits = st.builds(
    FilterSettings,
    noise=st.booleans(),
    noise_scope=st.sampled_from(["skips", "all"]),
    max_gap_s=st.floats(1, 300),
    min_video_views=st.integers(0, 6),
    min_user_exposures=st.integers(0, 6),
)


@given(interactions, limits)
@settings(max_examples=150, deadline=None)
def test_filters_keep_order_account_for_every_row_and_are_idempotent(rows, wanted):
    kept, steps = apply_filters(rows, wanted)
    ids = rows["interaction_id"].to_pylist()
    remaining = kept["interaction_id"].to_pylist()
    assert remaining == [i for i in ids if i in set(remaining)], "a subset, in the same order"
    assert steps[0].interactions == len(ids)
    assert steps[-1].interactions == len(remaining)
    for before, after in itertools.pairwise(steps):
        assert before.interactions - after.removed == after.interactions
    again, _ = apply_filters(kept, wanted)
    if all(s.applied for s in steps):
        assert again.equals(kept), "a fixed point: filtering again changes nothing"


@given(interactions, limits)
@settings(max_examples=150, deadline=None)
def test_the_result_meets_the_limits(rows, wanted):
    kept, steps = apply_filters(rows, wanted)
    frame = kept.to_pandas()
    if len(frame):
        frame["view"] = is_view(kept)
        assert frame.groupby("video_id").view.sum().min() >= wanted.min_video_views
        click = frame[frame.task == "click"]
        assert not len(click) or click.groupby("user_id").size().min() >= wanted.min_user_exposures
    if wanted.noise and steps[2].applied:
        skips = kept.filter(
            pc.and_(pc.equal(kept["task"], "sequential"), pc.fill_null(pc.less(kept["play_rate"], 0.3), False))
        )
        gap = pc.add(skips["prev_op_gap_s"], skips["next_op_gap_s"])
        assert gap.null_count == 0
        assert np.all(gap.to_numpy() <= wanted.max_gap_s)


@given(interactions, limits)
@settings(max_examples=100, deadline=None)
def test_the_fixed_point_is_the_largest_valid_set(rows, wanted):
    """Removing one offender at a time, the textbook way, gives the same set."""
    kept, _ = apply_filters(rows, wanted)
    base, _ = apply_filters(rows, wanted.model_copy(update={"min_video_views": 0, "min_user_exposures": 0}))
    survivors = base.to_pandas().assign(view=is_view(base))
    while True:
        views = survivors.groupby("video_id").view.sum()
        exposures = survivors[survivors.task == "click"].groupby("user_id").size()
        bad = [("video_id", v) for v in views.index[views < wanted.min_video_views]] + [
            ("user_id", u) for u in exposures.index[exposures < wanted.min_user_exposures]
        ]
        if not bad:
            break
        column, value = bad[-1]
        removed = (survivors[column] == value) & ((column == "video_id") | (survivors.task == "click"))
        survivors = survivors[~removed]
    assert kept["interaction_id"].to_pylist() == survivors.interaction_id.tolist()


@pytest.mark.parametrize("rows", [0, 1])
def test_tiny_tables(rows):
    kept, _ = apply_filters(table(*[view(i) for i in range(rows)]), FilterSettings())
    assert kept.num_rows == 0


def test_a_nearly_empty_result_names_the_filter_and_its_setting():
    rows = [view(0, user_id="fan", video_id="hit", exited_app=None)]
    rows += [view(i, user_id=f"u{i}", video_id=f"v{i}", task="click", clicked=True) for i in range(1, 41)]
    wanted = FilterSettings(min_video_views=1, min_user_exposures=30)
    users, videos = shrinkage(apply_filters(table(*rows), wanted)[1], wanted)
    assert users == (
        "Only 1 of 41 users are left after the filters. 'click users with at least 30 exposures' removed 40 of them; "
        "its setting is filters.min_user_exposures=30."
    )
    assert "1 of 41 videos" in videos
    rare = FilterSettings(min_video_views=2, min_user_exposures=0)
    assert "filters.min_video_views=2" in shrinkage(apply_filters(table(*rows), rare)[1], rare)[0]
    noisy = FilterSettings(min_video_views=0, min_user_exposures=0)
    skips = [view(i, user_id=f"u{i}", exited_app=i > 0) for i in range(40)]
    [warning] = shrinkage(apply_filters(table(*skips), noisy)[1], noisy)
    assert "'no app exit' removed 39 of them; its setting is filters.noise=true" in warning


def test_a_result_of_some_size_is_no_warning():
    rows = [view(i, user_id=f"u{i}", video_id=f"v{i % 2}") for i in range(20)]
    assert shrinkage(apply_filters(table(*rows), FilterSettings(**LOOSE))[1], FilterSettings(**LOOSE)) == []
    assert shrinkage(apply_filters(table(), FilterSettings())[1], FilterSettings()) == []


def both_tasks(users: int, exposures: int = 1) -> pa.Table:
    """Users with one view each, and so many exposures."""
    rows = [view(i, user_id=f"u{i}", video_id=f"v{i % 2}") for i in range(users)]
    rows += [
        view(f"{i}-{n}", user_id=f"u{i}", video_id=f"v{n % 2}", task="click", clicked=True)
        for i in range(users)
        for n in range(exposures)
    ]
    return table(*rows)


def test_a_task_that_vanishes_is_named_though_its_users_stay():
    """All users stay for the other task, so that counts of users say nothing."""
    wanted = FilterSettings(min_video_views=0, min_user_exposures=5)
    kept, steps = apply_filters(both_tasks(20, 4), wanted)
    assert set(kept["task"].to_pylist()) == {"sequential"}
    assert shrinkage(steps, wanted) == []
    assert task_shrinkage(steps, wanted) == [
        "The click task is gone: none of its 20 users is left after the filters. 'click users with at least 5 "
        "exposures' removed 20 of them; its setting is filters.min_user_exposures=5."
    ]
    one = pa.concat_tables([both_tasks(30, 4), table(*(view(f"x{n}", user_id="u3", task="click") for n in range(3)))])
    [warning] = task_shrinkage(apply_filters(one, wanted)[1], wanted)
    assert warning.startswith("Only 1 of 30 users of the click task are left after the filters. 'click users with")


def test_views_that_vanish_are_named_with_the_noise_criterion():
    rows = both_tasks(20, 5).to_pylist()
    noisy = table(*({**r, "exited_app": r["task"] == "sequential"} for r in rows))
    wanted = FilterSettings(min_video_views=0, min_user_exposures=5)
    [warning] = task_shrinkage(apply_filters(noisy, wanted)[1], wanted)
    assert warning.startswith("The sequential task is gone: none of its 20 users")
    assert "'no app exit' removed 20 of them; its setting is filters.noise=true" in warning


def test_a_log_of_one_task_misses_no_task():
    wanted = FilterSettings(min_video_views=0, min_user_exposures=5)
    assert task_shrinkage(apply_filters(table(*[view(i) for i in range(3)]), wanted)[1], wanted) == []
    assert task_shrinkage(apply_filters(both_tasks(20, 5), wanted)[1], wanted) == []


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (
            [view(i, exited_app=i > 0) for i in range(20)],
            {"min_video_views": 2, "min_user_exposures": 0},
            "'no app exit' removed 19 of them ('videos with at least 2 views' 1); its setting is filters.noise=true.",
        ),
        (
            [view(i, next_op_gap_s=90.0) for i in range(20)],
            {**LOOSE, "max_gap_s": 60},
            "'at most 60 s between them' removed 20 of them; its setting is filters.max_gap_s=60.",
        ),
        (
            [view(i, task="click", clicked=True) for i in range(20)],
            {"min_video_views": 0, "min_user_exposures": 30},
            "'click users with at least 30 exposures' removed 20 of them; its setting is filters.min_user_exposures",
        ),
    ],
    ids=["noise", "gap", "exposures"],
)
def test_a_data_set_with_nothing_left_is_refused_with_the_filter_that_did_it(rows, fields, message):
    wanted = FilterSettings(**fields)
    _, steps = apply_filters(table(*rows), wanted)
    assert steps[-1].interactions == 0
    with pytest.raises(InputError) as caught:
        build._refuse(steps, wanted)
    assert message in str(caught.value)
