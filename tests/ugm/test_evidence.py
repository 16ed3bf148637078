"""The table that profiles are checked against counts what the records say, with n and intervals."""

import numpy as np
import pytest
from ugm_helpers import log_of, people, records_of

from gubs.prompts.people import Person
from gubs.records import User, Video
from gubs.ugm.evidence import (
    VIEWS_EACH,
    complaint_of,
    in_words,
    interval,
    length_of,
    odds,
    read_records,
)
from gubs.ugm.words import words


@pytest.fixture
def cooks(records):
    return {(f.section, f.item): f for f in records.findings([f"u{i}" for i in range(10)])}


def test_shares_of_a_group_stand_beside_those_of_everybody(cooks):
    f = cooks["interest", "cooking"]
    assert (f.value, f.overall, f.lift, f.n) == (1.0, 0.5, 2.0, 10)
    assert cooks["finished", "cooking"].value == 0.5
    assert cooks["skipped", "football"].value == 1.0
    assert cooks["skipped", "football"].above
    assert cooks["person", "gender: female"].value == 1.0
    assert cooks["person", "age: 20s"].value == 0.0
    assert cooks["person", "age: 20s"].below


def test_play_rate_by_length_and_activity(cooks):
    assert cooks["length", "under 15 s"].value == pytest.approx(0.95)
    assert cooks["length", "over 90 s"].value == pytest.approx(0.1)
    assert cooks["skipped by length", "15-30 s"].value == 1.0
    assert cooks["activity", VIEWS_EACH].value == 3.0
    assert cooks["activity", "fast skips"].value == pytest.approx(2 / 3)


def test_words_of_titles_and_complaints_in_dislikes(cooks):
    assert cooks["word", "shocking"].value == 1.0
    assert cooks["word", "shocking"].overall == 0.5
    assert ("word", "cooking") not in cooks, "a topic is no style of titles"
    assert cooks["complaint", "clickbait"].value == pytest.approx(1 / 3), "of all their views"
    assert cooks["complaint", "vulgar"].value == 0.0


def test_nothing_is_said_about_what_has_too_few_records(records):
    assert not [f for f in records.findings(["u0", "u1", "u2", "u3"]) if f.n < 3]


def test_the_interval_is_wilsons_for_shares_and_wide_for_few():
    low, high = interval(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert interval(3, 3)[0] < 0.5, "three of three is no certainty"
    low, high = interval(1.5, 3, 0.75)
    assert low < 0.5 < high, "three equal play rates are no certainty either"


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = [low <= 0.3 <= high for low, high in (interval(rng.binomial(40, 0.3), 40) for _ in range(2000))]
    assert 0.92 < np.mean(hits) < 0.98


def test_a_members_own_records_decide_whether_they_fit(records):
    group = [f"u{i}" for i in range(10)] + ["u15"]
    log_odds = odds(records, group)
    assert min(log_odds[u] for u in group[:10]) > 0
    assert log_odds["u15"] < -1, "a fan among cooks"
    assert odds(records_of([Person(User(f"x{i}", tags=["a"])) for i in range(4)]), ["x0", "x1"]) == {"x0": 0, "x1": 0}


def test_sources_without_play_rates_or_titles_have_evidence_too():
    crowd = [Person(User(f"u{i}", tags=["Drama"])) for i in range(4)]
    film = {"f": Video("f", None, None, tags=["Drama"])}
    rows = [{"user_id": f"u{i}", "video_id": "f", "rating": 5.0, "liked": True} for i in range(4)]
    values = {
        (f.section, f.item): f.value for f in read_records(crowd, log_of(*rows), film).findings(["u0", "u1", "u2"])
    }
    assert values["liked", "drama"] == 1.0
    assert not any(section in ("skipped", "length", "word") for section, _ in values)


def test_lines_for_prompts_show_only_what_differs(records):
    text = "\n".join(in_words(records.findings([f"u{i}" for i in range(10)])))
    assert "football 100% (all users 67%)" in text or "football 0% (all users 50%)" in text
    assert "records per member" not in text, "the same for all"


def test_lengths_and_complaints_have_classes():
    assert [length_of(Video("v", None, s)) for s in (0.0, 15.0, 89.9, 3600.0, None)] == [
        *("under 15 s", "15-30 s", "60-90 s", "over 90 s", None),
    ]
    assert complaint_of("Too vulgar for me") == "vulgar"
    assert complaint_of("标题党，内容不符") == "clickbait"
    assert complaint_of("Not good") is None
    assert complaint_of(None) is None


def test_texts_without_spaces_have_words():
    assert words("The 2 best kitchen tricks you'll see") == ["best", "kitchen", "tricks", "you'll", "see"]
    assert words("养生茶") == ["养生", "生茶"]
    assert set(words("广场舞教学")) & set(words("学跳广场舞")) == {"广场", "场舞"}
    assert words("看K线图") == ["看", "线图"]


def test_people_of_a_thousand_take_no_time():
    """Findings of 50 groups are sums over matrices, not loops over records."""
    import time

    crowd = people(1000)
    records = records_of(crowd)
    began = time.perf_counter()
    for g in range(50):
        records.findings([p.user.user_id for p in crowd[g * 10 : g * 10 + 60]])
    assert time.perf_counter() - began < 2
