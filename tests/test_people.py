"""Users as prompts show them: what is known of them at a time, and nothing that came later."""

import pytest

from gubs.people import DERIVED_TAGS, Person, _person
from gubs.records import User


def view(time, *tags, play_rate=0.9, **more):
    empty = {"title": None, "duration_s": None, "rating": None, "clicked": None, "liked": None}
    return {**empty, "timestamp": time, "play_rate": play_rate, "tags": list(tags), **more}


HISTORY = [
    view(1, "cats"),
    view(2, "news", play_rate=0.1),
    view(3, "cats", "dogs"),
    view(5, "chess"),
    view(6, "chess"),
    view(7, "chess"),
]


def test_interests_seen_in_the_history_are_those_of_liked_videos_the_most_frequent_first():
    person = _person(User("u"), HISTORY, 2, 200)
    assert person.user.tags == ["chess", "cats", "dogs"]
    assert person.tags_derived
    assert '"interests seen in the history"' in person.profile()
    assert len(person.views) == 2, "views shown are the latest; interests are of all of them"


def test_what_was_liked_later_tells_nothing_at_a_time():
    """Else a prompt about a moment would show what the user came to like after it."""
    then = _person(User("u"), HISTORY, 0, 200).before(5)
    assert then.user.tags == ["cats", "dogs"]
    assert len(then.views) == 3
    assert "chess" not in then.profile() + "".join(then.views)
    nobody = then.before(1)
    assert nobody.user.tags == []
    assert nobody.profile() == Person(User("u"), ()).profile()


def test_a_users_own_tags_are_known_at_any_time():
    person = _person(User("u", tags=["chess"]), HISTORY, 0, 200)
    assert not person.tags_derived
    assert person.before(1).user.tags == ["chess"]
    assert '"interest tags"' in person.before(1).profile()


def test_where_there_are_no_times_nothing_is_later():
    history = [{**row, "timestamp": None} for row in HISTORY]
    person = _person(User("u"), history, 0, 200)
    assert person.before(1) == person
    assert _person(User("u"), HISTORY, 0, 200).before(None).user.tags[0] == "chess"


def test_no_more_tags_than_a_prompt_has_room_for():
    assert len(_person(User("u"), [view(i, f"t{i}") for i in range(20)], 0, 200).user.tags) == DERIVED_TAGS


@pytest.mark.parametrize(
    ("row", "liked"),
    [
        (view(1, "x", liked=True, play_rate=0.0), True),
        (view(1, "x", liked=False), False),
        (view(1, "x", play_rate=0.5), False),
        (view(1, "x", play_rate=None, clicked=True), True),
        (view(1, "x", play_rate=None), False),
    ],
)
def test_what_counts_as_liked(row, liked):
    assert bool(_person(User("u"), [row], 0, 200).user.tags) is liked
