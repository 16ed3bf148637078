"""Profiles of users who list no tags: they rest on rated items of the history, never on what will be predicted, and
they get into the prompts about these users."""

import json

import pytest
from teach_helpers import EVIL, answering, hand_made, make_answered, prompt_of, view, with_teachers

from gubs.data.ifvr import IFVR
from gubs.errors import MissingArtifactError
from gubs.prompts.answers import TAGS
from gubs.records import Task
from gubs.stages import Graph, make_stage
from gubs.teachers import profiles, reasons, sft
from gubs.teachers.profiles import rated_users
from gubs.teachers.settings import TeacherSettings
from gubs.ufm.questions import Questions

SETTINGS = with_teachers(profiles=True)
GOOD = {"profile": "Likes slow films.", "tags": ["drama", "drama", " slow\nfilms "]}
NO_TAGS = {f"u{n}": {"age": 30, "tags": []} for n in range(5)}


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
        NO_TAGS,
        **videos,
    )


def requests_of(run):
    return profiles.requests(run, TeacherSettings(), 0, "movielens")


def test_liked_and_disliked_history_without_items_of_the_targets(tmp_path):
    users, left_out = rated_users(IFVR(world(tmp_path / "run")), TeacherSettings(), 0)
    by_user = {u.user.user_id: u for u in users}
    assert list(by_user) == ["u3", "u1"], "test users first"
    assert by_user["u1"].evidence == ("r1", "r2"), "no 3 stars, no target, no item the targets show again"
    assert [len(by_user["u1"].liked), len(by_user["u1"].disliked)] == [1, 1]
    assert left_out == {"has_tags": 0, "no_rated_items": 1, "over_limit": 0}


def test_users_with_tags_are_not_asked_about(tmp_path):
    rows = [rated(f"r{n}", "v1", 5, user_id=f"u{n}") for n in range(3)]
    run = hand_made(tmp_path / "run", rows, {"u1": {"tags": ["pets"]}, "u0": {"tags": []}, "u2": {"tags": None}})
    asked = []
    artifact = make_answered("profiles", run, SETTINGS, lambda r: GOOD, asked)
    assert [r.metadata["item"] for r in asked] == ["u0", "u2"]
    assert artifact.table("profiles")["user_id"].to_pylist() == ["u0", "u2"]
    assert artifact.manifest.info["left_out"]["has_tags"] == 1


def test_prompt(tmp_path):
    prompts = {r.metadata["item"]: prompt_of(r) for r in requests_of(world(tmp_path / "run"))}
    liked, disliked = prompts["u1"].split("\nDisliked:")
    assert "Title v1" in liked
    assert "Title v2" in disliked
    for hidden in ("Title v3", "Title v4", "Title v5"):
        assert hidden not in prompts["u1"]
    assert "- nothing" in prompts["u3"], "nothing disliked"


def test_at_most_so_many_items_drawn_at_random(tmp_path):
    rows = [rated(f"r{i:03}", f"v{i:03}", 5 if i % 2 else 1) for i in range(200)]
    run = hand_made(tmp_path / "run", rows, NO_TAGS)

    def drawn(seed):
        users, _ = rated_users(IFVR(run), TeacherSettings(), seed)
        return users[0].evidence

    assert len(drawn(0)) == 50
    assert drawn(0) == drawn(0) == tuple(sorted(drawn(0)))
    assert drawn(0) != drawn(1)


def test_limit_of_users_takes_test_users_first(tmp_path):
    users, left_out = rated_users(IFVR(world(tmp_path / "run")), TeacherSettings(profile_users=1), 0)
    assert [u.user.user_id for u in users] == ["u3"]
    assert left_out["over_limit"] == 1


@pytest.mark.parametrize("tags", [[EVIL], []])
def test_hostile_titles_stay_in_their_field(tmp_path, tags):
    evil = {"title": EVIL, "duration_s": None, "tags": tags}
    hostile = requests_of(world(tmp_path / "evil", v1=evil, v2=evil))
    harmless = requests_of(world(tmp_path / "run"))
    for one, other in zip(hostile, harmless, strict=True):
        assert len(prompt_of(one).splitlines()) == len(prompt_of(other).splitlines())
        assert not any(tag in prompt_of(one) for tag in TAGS)


def test_stage(tmp_path):
    def reply(request):
        return GOOD if request.metadata["item"] == "u1" else {"profile": "x", "tags": ["  "]}

    artifact = make_answered("profiles", world(tmp_path / "run"), SETTINGS, reply)
    (row,) = artifact.table("profiles").to_pylist()
    assert row == {
        "user_id": "u1",
        "text": "Likes slow films.",
        "tags": ["drama", "slow films"],
        "evidence": ["r1", "r2"],
        "n": 2,
        "until": 1000,
    }
    assert artifact.manifest.info["failures"] == {"no_tags": 1}
    assert artifact.table("failures")["item"].to_pylist() == ["u3"]


def test_source_without_ratings(tmp_path):
    run = hand_made(tmp_path / "run", [view("h", "v", play_rate=0.5)], NO_TAGS)
    artifact = make_answered("profiles", run, SETTINGS, lambda r: GOOD)
    assert artifact.table("profiles").num_rows == 0
    assert "no profiles" in artifact.manifest.info["notes"][0]


def untagged(folder):
    """A user without tags who has rated films, disliked one video and skipped another; one with tags beside them."""
    return hand_made(
        folder,
        [
            rated("r1", "v1", 5),
            rated("r2", "v2", 1, user_id="u2"),
            view("h1", "v3", play_rate=0.9),
            view("minded", "v4", role="target", play_rate=0.5, disliked=True, dislike_reason="no reason given"),
            view("skipped", "v5", role="target", play_rate=0.1),
            view("skipped2", "v5", role="target", play_rate=0.1, user_id="u2"),
        ],
        {"u1": {"age": 30, "tags": []}, "u2": {"age": 40, "tags": ["pets"]}},
    )


def answer(request):
    if request.label.startswith("profile"):
        return GOOD
    if request.label.startswith("sft"):
        return {"think": "A long thought.", "answer": "B"}
    if request.label.startswith("label"):
        return {"rationale": "r", "option": "B"}
    return {"criticism": "none", "valid": "yes"}


def asked_about(run, settings):
    """The prompts of every stage that asks about users, and the UFM's own; by what is asked."""
    log, order = [], Graph(["sft", "labels"], run, settings).order
    with answering(answer, log):
        for stage in order[order.index("ifvr") + 1 :]:
            make_stage(stage, run, settings)
    prompts = {r.label: prompt_of(r) for r in log}
    questions = Questions(run, settings.ufm.inputs, tastes=settings.teachers.profiles)
    prompts["ufm"] = questions.about_user(Task.SEQUENTIAL, "u1", "v5").text
    return prompts


ABOUT_THEM = ["sft/minded", "label1/skipped", "verdict1/skipped", "ufm"]


def test_a_taste_gets_into_every_prompt_about_its_user(tmp_path):
    prompts = asked_about(untagged(tmp_path / "run"), SETTINGS)
    assert "profile/u1" in prompts
    for label in ABOUT_THEM:
        assert "Likes slow films." in prompts[label], label
        assert '"drama", "slow films"' in prompts[label], label
    other = prompts["label1/skipped2"]
    assert "pets" in other
    assert "slow films" not in other, "the taste of somebody else"


def test_switched_off_nobody_is_asked_and_no_prompt_shows_a_taste(tmp_path):
    """Also where an earlier job left tastes: they are not used because they are there."""
    run, off = untagged(tmp_path / "run"), with_teachers(profiles=False)
    for _ in range(2):
        prompts = asked_about(run, off)
        assert not [label for label in prompts if label.startswith("profile")]
        for label in ABOUT_THEM:
            assert "slow films" not in prompts[label], label
        assert "profiles" not in run.artifact("sft").manifest.recipe.inputs
        for stage in ("sft", "labels"):
            run.fs.rm(run.path(stage), recursive=True)
        make_answered("profiles", run, SETTINGS, answer)


@pytest.mark.parametrize("on", [True, False])
def test_estimates_are_of_the_requests_that_are_made(tmp_path, on):
    """An estimate that shows a taste where the job shows none would not find the job's answers in the journal."""
    run = untagged(tmp_path / "run")
    make_answered("profiles", run, SETTINGS, answer)
    settings = with_teachers(profiles=on)
    log = []
    for stage in ("sft", "labels"):
        make_answered(stage, run, settings, answer, log)
    made = {r.label: r.messages for r in log}
    estimated = [*sft.requests(run, settings.teachers, 0), *reasons.requests(run, settings.teachers, 0)]
    first_asked = [r for r in estimated if not r.label.startswith("verdict")]  # a verdict's prompt has the rationale
    assert (len(estimated), len(first_asked)) == (5, 3)
    assert all(r.label in made for r in estimated)
    assert all(made[r.label] == r.messages for r in first_asked)


def test_without_its_profiles_a_stage_that_wants_them_is_not_made(tmp_path):
    with pytest.raises(MissingArtifactError, match="profiles"):
        make_answered("sft", untagged(tmp_path / "run"), SETTINGS, answer)


def test_over_http_and_ray(server, settings_for, tmp_path, ray_local):
    """Profiles and SFT examples through the real client, journal and actors; one unusable answer is asked again."""
    run = hand_made(
        tmp_path / "run",
        [
            rated("r1", "v1", 5),
            rated("r2", "v2", 1),
            rated("t1", "v3", 5, role="target"),
            rated("t2", "v4", 1, role="target"),
            rated("s1", "v1", 4, user_id="u3", split="test"),
        ],
        NO_TAGS,
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
    settings = SETTINGS.model_copy(update={"llm": settings_for()})
    profiles, examples = make_stage("profiles", run, settings), make_stage("sft", run, settings)
    assert server.stats()["total"] == 5, "two profiles, two examples, one re-ask"
    assert profiles.table("profiles")["user_id"].to_pylist() == ["u3", "u1"]
    rows = {r["interaction_id"]: r for r in examples.table("examples").to_pylist()}
    assert {k: (r["gold"], r["label_source"]) for k, r in rows.items()} == {"t1": ("A", "rule"), "t2": ("B", "rule")}
    assert rows["t2"]["response"] == "<think>The user minds such films.</think><answer>B</answer>"
    assert examples.manifest.info["golds"]["click"] == {"A": 1, "B": 1}
