"""User profiles rest on rated items of the history, never on what will be predicted."""

import pytest
from teach_helpers import EVIL, hand_made, prompt_of, scripted, view

from gubs.config import load_settings
from gubs.prompts.answers import TAGS
from gubs.teachers.desk import Desk
from gubs.teachers.profiles import profile_requests, profiles_stage, rated_users
from gubs.teachers.settings import TeacherSettings

GOOD = {"profile": "Likes slow films.", "tags": ["drama", "drama", " slow\nfilms "]}


def rated(key, video, stars, **rest):
    feeling = {"liked": stars >= 4, "disliked": stars <= 2}
    return view(key, video, task="click", clicked=True, rating=float(stars), **feeling, **rest)


def world(folder, **videos):
    return hand_made(
        folder,
        [
            rated("r1", "v1", 5),
            rated("r2", "v2", 1),
            rated("r3", "v3", 3),
            rated("r4", "v4", 5),
            rated("t1", "v5", 5, role="target"),
            rated("t2", "v4", 5, role="target"),
            view("r5", "v6", task="click", clicked=True, user_id="u2"),
            rated("s1", "v1", 4, user_id="u3", split="test"),
        ],
        **videos,
    )


def desk_of(run, **teachers):
    return Desk(run, load_settings("tiny"), TeacherSettings(**teachers))


def test_liked_and_disliked_history_without_items_of_the_targets(tmp_path):
    users, left_out = rated_users(world(tmp_path / "run").artifact("ifvr"), TeacherSettings(), 0)
    by_user = {u.user.user_id: u for u in users}
    assert list(by_user) == ["u3", "u1"], "test users first"
    assert by_user["u1"].evidence == ("r1", "r2"), "no 3 stars, no target, no item the targets show again"
    assert [len(by_user["u1"].liked), len(by_user["u1"].disliked)] == [1, 1]
    assert left_out == {"no_rated_items": 1, "over_limit": 0}


def test_prompt(tmp_path):
    desk = desk_of(world(tmp_path / "run"))
    prompts = {r.metadata["item"]: prompt_of(r) for r in profile_requests(desk)}
    liked, disliked = prompts["u1"].split("\nDisliked:")
    assert "Title v1" in liked
    assert "Title v2" in disliked
    for hidden in ("Title v3", "Title v4", "Title v5"):
        assert hidden not in prompts["u1"]
    assert "- nothing" in prompts["u3"], "nothing disliked"


def test_at_most_so_many_items_drawn_at_random(tmp_path):
    run = hand_made(tmp_path / "run", [rated(f"r{i:03}", f"v{i:03}", 5 if i % 2 else 1) for i in range(200)])

    def drawn(seed):
        users, _ = rated_users(run.artifact("ifvr"), TeacherSettings(), seed)
        return users[0].evidence

    assert len(drawn(0)) == 50
    assert drawn(0) == drawn(0) == tuple(sorted(drawn(0)))
    assert drawn(0) != drawn(1)


def test_limit_of_users_takes_test_users_first(tmp_path):
    users, left_out = rated_users(world(tmp_path / "run").artifact("ifvr"), TeacherSettings(profile_users=1), 0)
    assert [u.user.user_id for u in users] == ["u3"]
    assert left_out["over_limit"] == 1


@pytest.mark.parametrize("tags", [[EVIL], []])
def test_hostile_titles_stay_in_their_field(tmp_path, tags):
    evil = {"title": EVIL, "duration_s": None, "tags": tags}
    hostile = profile_requests(desk_of(world(tmp_path / "evil", v1=evil, v2=evil)))
    harmless = profile_requests(desk_of(world(tmp_path / "run")))
    for one, other in zip(hostile, harmless, strict=True):
        assert len(prompt_of(one).splitlines()) == len(prompt_of(other).splitlines())
        assert not any(tag in prompt_of(one) for tag in TAGS)


def test_stage(tmp_path, monkeypatch):
    desk = desk_of(world(tmp_path / "run"))

    def reply(request):
        return GOOD if request.metadata["item"] == "u1" else {"profile": "x", "tags": ["  "]}

    monkeypatch.setattr(desk, "ask", scripted(reply))
    artifact, fresh = profiles_stage(desk)
    assert fresh
    (row,) = artifact.table("profiles").to_pylist()
    assert row == {
        "user_id": "u1",
        "text": "Likes slow films.",
        "tags": ["drama", "slow films"],
        "evidence": ["r1", "r2"],
        "n": 2,
    }
    assert artifact.manifest.info["failures"] == {"no_tags": 1}
    assert artifact.table("failures")["item"].to_pylist() == ["u3"]
    assert profiles_stage(desk)[1] is False


def test_source_without_ratings(tmp_path):
    run = hand_made(tmp_path / "run", [view("h", "v", play_rate=0.5)])
    artifact, _ = profiles_stage(desk_of(run))
    assert artifact.table("profiles").num_rows == 0
    assert "no profiles" in artifact.manifest.info["notes"][0]


def test_over_http_and_ray(server, settings_for, tmp_path, ray_local):
    """Profiles and SFT examples through the real client, journal and actors; one unusable answer is asked again."""
    import json

    from gubs.teachers.sft import sft_stage

    run = hand_made(
        tmp_path / "run",
        [
            rated("r1", "v1", 5),
            rated("r2", "v2", 1),
            rated("t1", "v3", 5, role="target"),
            rated("t2", "v4", 1, role="target"),
            rated("s1", "v1", 4, user_id="u3", split="test"),
        ],
    )
    likes, minds = (
        {"think": f"The user {does} such films.", "answer": a} for does, a in (("likes", "A"), ("minds", "B"))
    )
    server.configure(
        rules=[
            {"match": '"answer" is A', "text": json.dumps(likes)},
            {"match": '"answer" is B', "text": json.dumps(minds)},
            {"match": '- {"title": "Title v2"', "nth": 1, "text": "Sure!"},
            {"match": "", "text": json.dumps(GOOD)},
        ]
    )
    settings = load_settings("tiny").model_copy(update={"llm": settings_for()})
    with Desk(run, settings, TeacherSettings()) as desk:
        profiles, _ = profiles_stage(desk)
        examples, _ = sft_stage(desk)
        assert desk.client.spent["annotator"].calls == 5, "two profiles, two examples, one re-ask"
    assert profiles.table("profiles")["user_id"].to_pylist() == ["u3", "u1"]
    rows = {r["interaction_id"]: r for r in examples.table("examples").to_pylist()}
    assert {k: (r["gold"], r["label_source"]) for k, r in rows.items()} == {"t1": ("A", "rule"), "t2": ("B", "rule")}
    assert rows["t2"]["response"] == "<think>The user minds such films.</think><answer>B</answer>"
    assert examples.manifest.info["golds"]["click"] == {"A": 1, "B": 1}
