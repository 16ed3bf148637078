"""Users as prompts show them: what is known at a time, and nothing later."""

import dataclasses
import json

import pytest

from gubs.prompts.people import DERIVED_TAGS, Person, Taste, View
from gubs.records import User, Video


def view(time, *tags, play_rate=0.9, title=None, **more):
    return View(Video(f"v{time}", title, tags=list(tags)), f"i{time}", time, play_rate, **more)


HISTORY = (
    view(1, "cats"),
    view(2, "news", play_rate=0.1),
    view(3, "cats", "dogs"),
    view(5, "chess"),
    view(6, "chess"),
    view(7, "chess"),
)
WRITTEN = Taste("Looks for quiet games, avoids noise.", ("board games", "puzzles"), until=5)


def shown(person):
    """Everything that prompts show of a person."""
    return person.profile() + "".join(person.views())


def test_interests_in_the_history_come_from_liked_videos_most_frequent_first():
    person = Person(User("u"), HISTORY).latest(2)
    assert person.tags == ["chess", "cats", "dogs"]
    assert person.with_tags == User("u", tags=["chess", "cats", "dogs"])
    assert '"interests seen in the history"' in person.profile()
    assert len(person.views()) == 2, "views shown are the latest; interests are of all of them"


def test_later_likes_are_unknown_at_a_time():
    """Otherwise a prompt about a time would show what the user came to like afterwards."""
    then = Person(User("u"), HISTORY).before(5)
    assert then.tags == ["cats", "dogs"]
    assert len(then.views()) == 3
    assert "chess" not in shown(then)
    assert then.before(1).tags == []
    assert then.before(1).profile() == Person(User("u")).profile()


def test_the_latest_views_before_a_time_are_shown_with_all_interests_before_it():
    then = Person(User("u"), HISTORY).before(5).latest(2)
    assert [v.timestamp for v in then.history] == [2, 3], (
        "the latest two before it, not those of the latest two overall"
    )
    assert then.tags == ["cats", "dogs"], "the view at 1 counts although it is not shown; those from 5 on do not"
    assert "chess" not in shown(then)
    assert then.latest(1).tags == ["cats", "dogs"], "even if cut twice"


@pytest.mark.parametrize("items", [0, 6, 100])
def test_a_short_history_is_not_cut(items):
    person = Person(User("u"), HISTORY)
    assert person.latest(items) == person


def test_a_users_own_tags_are_known_at_any_time():
    person = Person(User("u", tags=["chess"]), HISTORY)
    assert person.before(1).tags == ["chess"]
    assert '"interest tags"' in person.profile()
    assert '"interest tags"' in person.before(1).profile()


def test_without_times_nothing_is_later():
    person = Person(User("u"), tuple(dataclasses.replace(v, timestamp=None) for v in HISTORY))
    assert person.before(1) == person
    assert Person(User("u"), HISTORY).before(None).tags[0] == "chess"


def test_the_number_of_derived_tags_is_limited():
    assert len(Person(User("u"), tuple(view(i, f"t{i}") for i in range(20))).tags) == DERIVED_TAGS


@pytest.mark.parametrize(
    ("example", "enjoyed"),
    [
        (view(1, "x", liked=True, play_rate=0.0), True),
        (view(1, "x", liked=False), False),
        (view(1, "x", play_rate=0.5), False),
        (view(1, "x", play_rate=None, clicked=True), True),
        (view(1, "x", play_rate=None), False),
    ],
)
def test_what_counts_as_enjoyed(example, enjoyed):
    assert example.enjoyed is enjoyed
    assert bool(Person(User("u"), (example,)).tags) is enjoyed


# --- tastes: what a language model wrote about users without tags ---


def test_a_taste_is_shown_for_a_user_without_tags():
    person = Person(User("u"), HISTORY, WRITTEN)
    assert person.tags == ["board games", "puzzles"]
    assert person.with_tags.tags == ["board games", "puzzles"], "groups are based on them too"
    assert json.loads(person.profile()) == {
        "interests by ratings": ["board games", "puzzles"],
        "taste": "Looks for quiet games, avoids noise.",
    }


def test_a_users_own_tags_win_over_a_taste():
    own = User("u", tags=["chess"])
    assert Person(own, HISTORY, WRITTEN).tags == ["chess"]
    assert Person(own, HISTORY, WRITTEN).profile() == Person(own, HISTORY).profile()


@pytest.mark.parametrize(("time", "known"), [(4, False), (5, False), (6, True), (None, True)])
def test_a_taste_from_later_ratings_is_not_known_yet(time, known):
    """Its latest rating is from time 5, so it may be used only after that."""
    then = Person(User("u"), HISTORY, WRITTEN).before(time)
    assert (then.taste == WRITTEN) is known
    assert ("quiet games" in then.profile()) is known
    if not known:
        assert then.tags == ["cats", "dogs"], "those seen in the history until then replace them"


def test_a_taste_without_times_is_known_at_any_time():
    timeless = dataclasses.replace(WRITTEN, until=None)
    assert Person(User("u"), HISTORY, timeless).before(1).taste == timeless


def test_a_taste_may_be_longer_than_a_field_but_is_limited():
    long = Taste("word " * 1000, ("x" * 1000,))
    fields = json.loads(Person(User("u"), (), long).profile(limit=40))
    assert 700 < len(fields["taste"]) <= 800
    assert [len(tag) for tag in fields["interests by ratings"]] == [40]


# --- single views ---


@pytest.mark.parametrize(
    ("example", "line"),
    [
        (
            View(Video("v", "Soup", 61.4, tags=["food"]), play_rate=0.25),
            {"title": "Soup", "length": "61 s", "played": "25%"},
        ),
        (View(Video("v", None, tags=["food"]), clicked=False), {"tags": ["food"], "clicked": "no"}),
        (View(Video("v", "Film"), rating=4.5, clicked=True), {"title": "Film", "rating": "4.5 of 5"}),
        (View(Video("v", "Film"), rating=4.0, play_rate=1.0), {"title": "Film", "rating": "4 of 5"}),
        (View(Video("v")), {}),
    ],
)
def test_a_view_shows_the_video_and_what_the_user_did(example, line):
    assert json.loads(example.line()) == line


def test_fields_of_views_are_cut():
    (line,) = Person(User("u"), (view(1, title="x" * 1000),)).views(limit=30)
    assert len(json.loads(line)["title"]) == 30
