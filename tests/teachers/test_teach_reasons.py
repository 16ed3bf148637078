"""Reasons of skips: rounds, queue, rules, and the truth that only the score may see."""

import json
from pathlib import Path

import pytest
from teach_helpers import EVIL, copy_run, hand_made, prompt_of, scripted, synthetic_settings, view, with_teachers

from gubs.artifacts import Run
from gubs.data.ifvr import IFVR
from gubs.llm.settings import LLMSettings
from gubs.prompts.answers import TAGS
from gubs.records import Task
from gubs.stages import make_stage
from gubs.teachers import reasons
from gubs.teachers.annotator import Annotator
from gubs.teachers.reasons import QUEUE, label, open_skips, queue_table, requests, rule_labels
from gubs.teachers.score import score
from gubs.teachers.settings import TeacherSettings

SETTINGS = TeacherSettings()


def world(folder, **videos):
    return hand_made(
        folder,
        [
            view("h1", "v1", play_rate=0.9),
            view("h2", "v2", play_rate=0.1),
            view("skip", "v3", role="target", play_rate=0.12),
            view("watched", "v4", role="target", play_rate=0.3),
            view("unknown", "v5", role="target"),
        ],
        **videos,
    )


def skips_of(run, settings=SETTINGS):
    return open_skips(IFVR(run), settings, 0)


def verdicts(*outcomes):
    """An annotator that labels C, and finds its n-th rationale (not) sound."""

    def reply(request):
        kind, number = request.label.split("/")[0][:-1], int(request.label.split("/")[0][-1])
        if kind == "label":
            return {"rationale": f"rationale {number}", "option": "C"}
        return {"criticism": f"criticism {number}", "valid": outcomes[number - 1]}

    return reply


@pytest.mark.parametrize(
    ("outcomes", "rounds", "sound"),
    [(["yes"], 1, True), (["no", "yes"], 2, True), (["no", "no", "yes"], 3, True), (["no", "no", "no"], 3, False)],
)
def test_labels_again_until_it_finds_its_rationale_sound_three_times_at_most(tmp_path, outcomes, rounds, sound):
    asked = []
    skips = skips_of(world(tmp_path / "run"))
    label(skips, scripted(verdicts(*outcomes), asked), SETTINGS)
    assert len(skips) == 1
    assert len(skips[0].attempts) == rounds
    assert bool(skips[0].sound) is sound
    assert len(asked) == 2 * rounds, "one label and one verdict a round, and nothing after a sound one"
    assert queue_table(skips)["cause"].to_pylist() == ([] if sound else ["invalid"])


def test_a_new_round_shows_what_was_said_and_why_it_was_found_wanting(tmp_path):
    asked = []
    label(skips_of(world(tmp_path / "run")), scripted(verdicts("no", "no", "yes"), asked), SETTINGS)
    labels = [prompt_of(r) for r in asked if r.label.startswith("label")]
    judged = [prompt_of(r) for r in asked if r.label.startswith("verdict")]
    assert "rationale 1" not in labels[0]
    assert "rationale 1" in labels[1]
    assert "criticism 1" in labels[1]
    assert all(f"{what} {n}" in labels[2] for what in ("rationale", "criticism") for n in (1, 2))
    assert "rationale 2" in judged[1]
    assert "criticism 1" not in judged[1], "a verdict is given afresh"


def test_number_of_rounds_is_a_setting(tmp_path):
    skips = skips_of(world(tmp_path / "run"))
    label(skips, scripted(verdicts("no", "yes")), TeacherSettings(rounds=1))
    assert not skips[0].sound


@pytest.mark.parametrize(
    ("step", "bad_answer", "cause", "attempts"),
    [
        ("label1", "The user was bored.", "not_json", 0),
        ("label1", {"rationale": "r", "option": "A"}, "schema", 0),
        ("label1", {"rationale": " \u200b", "option": "B"}, "no_rationale", 0),
        ("verdict1", {"criticism": "c", "valid": "perhaps"}, "schema", 1),
        ("label2", "", "empty", 1),
    ],
)
def test_unusable_answers_go_to_the_queue_by_cause(tmp_path, step, bad_answer, cause, attempts):
    def reply(request):
        return bad_answer if request.label.startswith(step) else verdicts("no", "no", "no")(request)

    skips = skips_of(world(tmp_path / "run"))
    label(skips, scripted(reply), SETTINGS)
    assert skips[0].failed.failure == cause
    row = queue_table(skips).to_pylist()[0]
    assert row["cause"] == cause
    assert len(row["attempts"]) == attempts


def test_rules(tmp_path):
    run = hand_made(
        tmp_path / "run",
        [
            view("h1", "v1", play_rate=0.9),
            view("skip", "v3", role="target", play_rate=0.2999),
            view("watched", "v4", role="target", play_rate=0.3),
            view("test", "v4", role="target", play_rate=1.0, split="test", user_id="u2"),
            view("held out", "v4", role="target", play_rate=1.0, split=None, user_id="u3"),
            view("unknown", "v5", role="target"),
            view("yes", "v1", task="click", role="target", clicked=True),
            view("no", "v1", task="click", role="target", clicked=False),
            view("liked", "v1", task="click", role="target", clicked=True, rating=4.0, liked=True, disliked=False),
            view("disliked", "v1", task="click", role="target", clicked=True, rating=1.0, liked=False, disliked=True),
            view("so so", "v1", task="click", role="target", clicked=True, rating=3.0, liked=False, disliked=False),
        ],
    )
    table, unknown = rule_labels(IFVR(run))
    options = dict(zip(table["interaction_id"].to_pylist(), table["option"].to_pylist(), strict=True))
    assert options == {"watched": "A", "test": "A", "yes": "A", "no": "B", "liked": "A", "disliked": "B"}
    assert unknown == 2, "unknown and so so"
    assert set(table["label_source"].to_pylist()) == {"rule"}


def test_limits_draw_train_and_test_apart_and_repeatably(simulated):
    def drawn(seed, **limits):
        skips = open_skips(IFVR(simulated), TeacherSettings(**limits), seed)
        return [(s.case.target.interaction_id, s.case.split) for s in skips]

    every = drawn(0)
    some = drawn(0, train_skips=7, test_skips=5)
    assert [s for _, s in some] == ["train"] * 7 + ["test"] * 5
    assert set(some) < set(every)
    assert some == drawn(0, train_skips=7, test_skips=5)
    assert some != drawn(1, train_skips=7, test_skips=5)


def test_prompts_show_history_video_skip_and_nothing_else(tmp_path):
    run = world(tmp_path / "run")
    (skip,) = skips_of(run)
    prompt = reasons.label_request(skip, SETTINGS).messages[0]["content"]
    assert "Title v1" in prompt
    assert "90%" in prompt
    assert "Title v3" in prompt
    assert "12%" in prompt, "how far it was played is known"
    assert "Title v4" not in prompt
    assert "Title v5" not in prompt
    assert [v.interaction_id for v in skip.case.person.history] == ["h1", "h2"]


def test_history_of_the_other_task_is_not_shown(tmp_path):
    run = hand_made(
        tmp_path / "run",
        [
            view("h1", "v1", play_rate=0.9),
            view("skip", "v3", role="target", play_rate=0.12),
            view("later", "v7", task="click", clicked=True),
        ],
    )
    (skip,) = skips_of(run)
    assert "Title v7" not in reasons.label_request(skip, SETTINGS).messages[0]["content"], "it is later than the target"


def test_truth_changes_no_prompt(simulated, tmp_path):
    def prompts(run):
        return [r.messages for r in requests(run, SETTINGS, 0)]

    blind = copy_run(simulated, tmp_path / "blind")
    blind.fs.rm(blind.path("truth"), recursive=True)
    assert prompts(blind) == prompts(simulated)
    assert len(prompts(blind)) > 20


@pytest.mark.parametrize("tags", [[EVIL], [], None])
def test_hostile_titles_tags_and_rationales_stay_in_their_field(tmp_path, tags):
    run = world(
        tmp_path / "run",
        v3={"title": EVIL, "duration_s": 9.0, "tags": tags},
        v1={"title": EVIL, "duration_s": 9.0, "tags": tags},
    )
    plain = skips_of(world(tmp_path / "plain"))
    skips = skips_of(run)
    asked, asked_plain = [], []

    def reply(request):
        if request.label.startswith("label"):
            return {"rationale": EVIL, "option": "C"}
        return {"criticism": EVIL, "valid": "no"}

    label(skips, scripted(reply, asked), SETTINGS)
    label(plain, scripted(verdicts("no", "no", "no"), asked_plain), SETTINGS)
    assert len(asked) == len(asked_plain) == 6
    for evil, harmless in zip(asked, asked_plain, strict=True):
        assert len(prompt_of(evil).splitlines()) == len(prompt_of(harmless).splitlines())
        assert not any(tag in prompt_of(evil) for tag in TAGS)
        assert "<|im_end|>" not in prompt_of(evil)
        assert "49" not in prompt_of(evil)
        assert not any(line.startswith("B: obey") for line in prompt_of(evil).splitlines())


def test_score():
    truth = {"1": "B", "2": "B", "3": "C", "4": "D"}
    result = score({"1": "B", "2": "C", "3": "C", "9": "D"}, truth)
    assert result["judged"] == 3
    assert result["unknown"] == 1
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["most_frequent"] == pytest.approx(2 / 3)
    assert result["confusion"] == {"B": {"B": 1, "C": 1}, "C": {"C": 1}}
    assert result["per_cause"] == {"B": {"n": 2, "accuracy": 0.5}, "C": {"n": 1, "accuracy": 1.0}}
    assert score({"9": "D"}, truth) is None
    assert score({}, {}) is None


def test_end_to_end_over_http_and_ray(server, settings_for, simulated, tmp_path, ray_local):
    """A finished label, one that needs two rounds, one for the queue, one failure; then the same without a server."""
    run = copy_run(simulated, tmp_path / "run")
    llm = settings_for(retries={"attempts": 2}, rest={"contract": {"unusable": 0.1}})
    settings = with_teachers(synthetic_settings(), train_skips=6, test_skips=4).model_copy(update={"llm": llm})
    teachers = settings.teachers
    skips = open_skips(IFVR(run), teachers, settings.seed)
    marks = []  # what only this skip's prompt has: how far it was played, and the video
    for s in skips:
        line = prompt_of(reasons.label_request(s, teachers)).split("Playing now: ")[1].split(" Which")[0]
        marks.append(line)
    assert len(set(marks)) == len(marks)
    chosen = {"twice": marks[0], "never": marks[1], "garbage": marks[2]}
    server.configure(rules=rules(chosen))

    seen = []
    with Annotator(run, llm, lambda p: seen.append((p.done, p.total))) as annotator:
        assert annotator.estimate(requests(run, teachers, settings.seed)).calls == 20, (
            "10 labels and the verdicts on them"
        )
        annotator.ask(requests(run, teachers, settings.seed)[:1])
        assert seen[-1] == (1, 1)
        assert annotator.estimate(requests(run, teachers, settings.seed)).calls == 19
    artifact = make_stage("labels", run, settings)
    labels, queue = artifact.table("labels").to_pylist(), artifact.table("queue").to_pylist()
    told = [r for r in labels if r["label_source"] != "rule"]
    assert len(told) + len(queue) == 10, "no skip is lost"
    assert sorted(r["label_source"] for r in told) == ["teacher-1"] * 7 + ["teacher-2"]
    twice = next(r for r in told if r["label_source"] == "teacher-2")
    assert (twice["option"], twice["rounds"], len(twice["verdicts"])) == ("D", 2, 2)
    assert [v["valid"] for v in twice["verdicts"]] == [False, True]
    assert sorted(q["cause"] for q in queue) == ["invalid", "not_json"]
    failed = artifact.table("failures").to_pylist()
    assert [(f["cause"], f["text"]) for f in failed] == [("not_json", "I will not say")]
    info = artifact.manifest.info
    assert info["queue"] == {"invalid": 1, "not_json": 1}
    assert info["truth"]["judged"] == 8
    assert 0 <= info["truth"]["accuracy"] <= 1
    assert artifact.table("queue").schema == QUEUE

    calls = server.stats()["total"]
    replay = LLMSettings(**{**llm.model_dump(), "mode": "replay"})
    again = make_stage("labels", run, settings.model_copy(update={"llm": replay}), force=True)
    assert again.content == artifact.content
    assert again.table("labels").equals(artifact.table("labels"))
    assert again.table("queue").equals(artifact.table("queue"))
    assert server.stats()["total"] == calls, "all of it came from the journal"


def rules(chosen):
    def says(match, value):
        return {"match": match, "text": value if isinstance(value, str) else json.dumps(value)}

    return [
        says("Your answer cannot be used", "I will not say"),
        says('check: D, "better', {"criticism": "none", "valid": "yes"}),
        says('check: C, "poor', {"criticism": "too thin", "valid": "no"}),
        says('check: B, "stubborn', {"criticism": "still thin", "valid": "no"}),
        says('check: C, "fine', {"criticism": "none", "valid": "yes"}),
        says('"too thin"', {"rationale": "better", "option": "D"}),
        says(chosen["twice"], {"rationale": "poor", "option": "C"}),
        says(chosen["never"], {"rationale": "stubborn", "option": "B"}),
        says(chosen["garbage"], "I will not say"),
        says("skip", {"rationale": "fine", "option": "C"}),
    ]


def labelled(simulated: Run, tmp_path: Path, **teachers: str) -> dict[str, dict]:
    run = copy_run(simulated, tmp_path / "run")
    chosen = with_teachers(synthetic_settings(), author="script", **teachers)
    rows = make_stage("labels", run, chosen).table("labels").to_pylist()
    return {r["interaction_id"]: r for r in rows}


def mechanisms(run: Run) -> dict[str, tuple[str, str]]:
    rows = run.artifact("truth").table("skips").to_pylist()
    return {r["interaction_id"]: (r["mechanism"], r["cause"]) for r in rows}


def test_a_naive_reader_takes_every_skip_for_meant(simulated, tmp_path):
    """Training labels: true causes, but what the fields suggest where nobody meant the skip. Test labels stay true."""
    labels, truth = labelled(simulated, tmp_path, train_labels="naive", test_labels="truth"), mechanisms(simulated)
    skips = {i: r for i, r in labels.items() if i in truth and r["label_source"] != "rule"}
    unmeant = {i for i in skips if truth[i][0] in ("accident", "exit", "interruption")}
    train = {i for i in skips if skips[i]["split"] == "train"}
    assert unmeant & train
    assert {skips[i]["label_source"] for i in unmeant & train} == {"naive"}
    assert {skips[i]["label_source"] for i in skips.keys() - (unmeant & train)} == {"truth"}
    assert all(skips[i]["option"] == truth[i][1] for i in skips.keys() - (unmeant & train))
    assert {skips[i]["option"] for i in unmeant & train} - {"D"}, "some are blamed on content or recommendation"


def test_only_what_test_users_meant_is_judged(simulated, tmp_path):
    labels, truth = labelled(simulated, tmp_path, train_labels="truth", test_labels="meant"), mechanisms(simulated)
    log = {r["interaction_id"]: r for r in IFVR(simulated).targets(Task.SEQUENTIAL).to_pylist()}
    for item, row in labels.items():
        if item not in log:
            continue
        ended = truth[item][0] in ("accident", "exit", "interruption") if item in truth else log[item]["exited_app"]
        assert (row["label_source"] == "unmeant") is (row["split"] == "test" and bool(ended)), item
    assert {"unmeant", "truth", "rule"} == {r["label_source"] for r in labels.values()}


def test_what_the_simulation_knows_is_asked_of_no_teacher(simulated):
    both = with_teachers(synthetic_settings(), train_labels="naive", test_labels="meant").teachers
    assert reasons.requests(simulated, both, 0) == []
    some = with_teachers(synthetic_settings(), train_labels="truth").teachers
    asked = reasons.requests(simulated, some, 0)
    targets = {r["interaction_id"]: r["split"] for r in IFVR(simulated).targets(Task.SEQUENTIAL).to_pylist()}
    assert {targets[r.metadata["item"]] for r in asked} == {"test"}
