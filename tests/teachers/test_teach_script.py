"""The scripted teacher: what it reads, what it says, and that it never knows the truth."""

from dataclasses import replace

import pyarrow as pa
import pytest
from artifact_helpers import put
from teach_helpers import copy_run, hand_made, synthetic_settings, view, with_teachers

from gubs.artifacts import Run
from gubs.config import Settings
from gubs.prompts.answers import as_answer, read_answer
from gubs.prompts.people import Person, View
from gubs.records import TASK_OPTIONS, Interaction, Option, Task, User, Video
from gubs.stages import make_stage
from gubs.teachers import script
from gubs.teachers.cases import Case

PETS = User("u1", 30, tags=["pets", "travel"])


def a_case(reason: str | None = None, *, tags=("pets",), seconds=20.0, views=(), title="Cats", **target) -> Case:
    person = Person(PETS, tuple(views))
    video = Video("v1", title, seconds, tags=list(tags))
    shown = {"task": "sequential", "disliked": True, **target}
    return Case(Interaction("i1", "u1", "v1", dislike_reason=reason, **shown), "train", person, video)


def seen(title: str, seconds: float, play_rate: float) -> View:
    return View(Video("v", title, seconds), play_rate=play_rate)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("Pure clickbait!", Option.B),
        ("It is DISGUSTING", Option.B),
        ("such vulgar language", Option.B),
        ("I have seen it before", Option.C),
        ("why am I shown this", Option.C),
        ("way too long for me", Option.D),
        ("not now, please", Option.D),
    ],
)
def test_words_decide_the_cause(words, option):
    """Whatever the fields say: here the topic does not fit and the video is long."""
    think, cause = script.dislike(a_case(words, tags=("news",), seconds=900.0))
    assert cause == option
    assert think.endswith({"B": "puts off.", "C": "missed.", "D": "user's moment."}[option])


@pytest.mark.parametrize("words", [None, "", "hm", "\U0001f44e"])
def test_words_that_tell_nothing_leave_it_to_the_fields(words):
    assert script.dislike(a_case(words, tags=("news",)))[1] == Option.C
    assert script.dislike(a_case(words, seconds=300.0))[1] == Option.D
    assert script.dislike(a_case(words))[1] == Option.B


def test_every_reason_of_the_simulated_app_is_understood():
    """A pattern that misses would fill the SFT set with guesses."""
    from gubs.simulator.behaviour import _REASONS

    wanted = {"mismatch": "C", "repetition": "C", "too_long": "D", "no_intent": "D", "accident": "D"}
    for key, reasons in _REASONS.items():
        for reason in reasons:
            reading = script.read_words(reason.format(topic="pets"))
            option = None if key == "vague" else Option(wanted.get(key, "B"))
            assert (reading[0] if reading else None) == option, (key, reason)


def test_facts_are_what_the_fields_say():
    facts = script.facts(Person(PETS, ()), Video("v", "Cats", 20.0, tags=["travel"]))
    assert facts.sentences() == 'Topic "travel". Likes "pets", "travel". It fits. Length 20 s, short.'
    first = script.facts(Person(PETS, ()), Video("v", "Cats", 20.0, tags=["news", "pets"]))
    assert first.sentences().startswith('Topic "pets". Likes "pets". It fits.'), "interests up to the topic"
    other = script.facts(Person(PETS, ()), Video("v", "Cats", 20.0, tags=["news"]))
    assert other.sentences().startswith('Topic "news". Likes "pets", "travel". It does not fit.')
    bare = script.facts(Person(User("u"), ()), Video("v"))
    assert (bare.fits, bare.seconds, bare.long, bare.sentences()) == (None, None, False, "Topic unknown.")


def test_a_flaw_is_remarked_and_a_repetition_seen():
    views = [seen("Cats", 20.0, 0.9)]
    assert "It was shown before." in script.dislike(a_case(None, views=views))[0]
    assert script.dislike(a_case(None, views=views))[1] == Option.C
    assert "But the title promises too much." in script.dislike(a_case("clickbait", views=views))[0]


def test_patience_comes_from_what_the_user_watched_on():
    """A user of ten-second videos finds thirty seconds long; one of long films does not."""
    short = [seen(f"t{i}", 10.0, 0.9) for i in range(3)]
    long = [seen(f"t{i}", 200.0, 0.9) for i in range(3)]
    skipped = [seen(f"t{i}", 10.0, 0.05) for i in range(3)]
    for views, is_long in ((short, True), (long, False), (skipped, False), (short[:2], False)):
        assert script.facts(Person(PETS, tuple(views)), Video("v", "x", 30.0)).long is is_long


@pytest.mark.parametrize(("clicked", "option"), [(True, Option.A), (False, Option.B)])
def test_clicks_follow_the_log(clicked, option):
    think, answer = script.click(a_case(task="click", clicked=clicked, disliked=None))
    assert answer == option
    assert ("does not attract" in think) is (option == Option.B)


def test_mistakes_do_not_blame_the_content_in_about_that_share():
    """Which ones depends on the target alone, so a resumed run makes the same; 0 makes none, 1 only them."""
    one = a_case("clickbait")
    cases = [replace(one, target=replace(one.target, interaction_id=f"i{i}")) for i in range(400)]
    wrong = [script.dislike(c, 0.3)[1] == Option.D for c in cases]
    assert 0.2 < sum(wrong) / len(wrong) < 0.4
    assert wrong == [script.dislike(c, 0.3)[1] == Option.D for c in cases]
    assert {script.dislike(c)[1] for c in cases} == {Option.B}
    assert {script.dislike(c, 1.0)[1] for c in cases} == {Option.D}
    assert script.dislike(one, 1.0)[0].endswith("But the title promises too much. So it is the user's moment.")
    assert script.dislike(a_case("clickbait", tags=("news",)), 1.0)[1] == Option.C


def test_what_a_look_shows_is_noted_whatever_the_user_complains_about():
    think, option = script.dislike(a_case("too long"), seen=script.REMARKS["unpleasant"])
    assert "But the picture is hard to bear. So it is the user's moment." in think
    assert option == Option.D
    think, option = script.click(a_case(task="click", clicked=True, disliked=None), script.REMARKS["vulgar"])
    assert think.endswith("But the words are vulgar. So it attracts.")


def test_what_it_says_is_a_well_formed_answer():
    """SFT on a broken form would teach it."""
    for words in ("clickbait", "seen before", "too long", None):
        think, option = script.dislike(a_case(words))
        read = read_answer(as_answer(think, option), TASK_OPTIONS[Task.SEQUENTIAL], finished=True)
        assert read.ok
        assert read.option == option


def test_every_sentence_is_known_to_the_tokenizer():
    texts = " ".join(script.texts())
    for words in ("clickbait", "disgusting", "vulgar", "seen before", "boring", "too long", "not now"):
        conclusion = script.dislike(a_case(words))[0].rsplit(". ", 1)[-1]
        assert conclusion in texts


def settings(truth: bool = False) -> Settings:
    base = synthetic_settings()
    labels = "truth" if truth else "teacher"
    labelling = {"train_labels": labels, "test_labels": labels, "script_flaws": truth}
    teachers = {"author": "script", "sft_click_users": 20, "profiles": False, **labelling}
    return base.model_copy(update={"teachers": base.teachers.model_copy(update=teachers)})


@pytest.fixture
def no_llm(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an LLM was asked")

    monkeypatch.setattr("gubs.teachers.annotator.LLMClient", refuse)


def stages(run: Run, chosen: Settings) -> dict[str, list[dict]]:
    examples, labels = make_stage("sft", run, chosen), make_stage("labels", run, chosen)
    return {"examples": examples.table("examples").to_pylist(), "labels": labels.table("labels").to_pylist()}


def truths(run: Run) -> dict[str, str]:
    table = run.artifact("truth").table("skips")
    return dict(zip(table["interaction_id"].to_pylist(), table["cause"].to_pylist(), strict=True))


def test_the_stages_need_no_language_model(simulated, tmp_path, no_llm):
    run = copy_run(simulated, tmp_path / "run")
    tables = stages(run, settings(truth=True))
    assert {(r["task"], r["label_source"]) for r in tables["examples"]} == {("sequential", "script"), ("click", "rule")}
    assert {r["split"] for r in tables["examples"]} == {"train"}
    options = TASK_OPTIONS[Task.SEQUENTIAL]
    assert all(read_answer(r["response"], options, finished=True).ok for r in tables["examples"])
    causes = truths(run)
    told = [r for r in tables["labels"] if r["label_source"] == "truth"]
    assert told
    assert all(r["option"] == causes[r["interaction_id"]] for r in told)
    assert run.artifact("labels").table("queue").num_rows == 0


def test_without_truth_labels_are_the_scripts_and_not_all_true(simulated, tmp_path, no_llm):
    """A teacher that is always right would have looked."""
    run = copy_run(simulated, tmp_path / "run")
    tables = stages(run, settings())
    causes = truths(run)
    told = [r for r in tables["labels"] if r["label_source"] in ("script", "guess")]
    right = sum(r["option"] == causes[r["interaction_id"]] for r in told)
    assert 0.2 * len(told) < right < len(told)


def test_the_script_says_the_same_where_the_truth_is_another(simulated, tmp_path, no_llm):
    """Examples are for training: a cause only the simulator knows must not get into them."""
    plain, changed = copy_run(simulated, tmp_path / "a"), copy_run(simulated, tmp_path / "b")
    table = changed.artifact("truth").table("skips")
    other = pa.array([{"B": "C", "C": "D", "D": "B"}[c] for c in table["cause"].to_pylist()])
    put(changed, "truth", {"skips": table.set_column(table.schema.get_field_index("cause"), "cause", other)})
    first, second = stages(plain, settings()), stages(changed, settings())
    assert first == second


def test_a_source_without_truth_is_labelled_by_the_script(tmp_path, no_llm):
    """True labels are a wish of simulated sources; elsewhere the script has to do."""
    history = [view(f"h{i}", f"v{i}", play_rate=0.9) for i in range(3)]
    run = hand_made(
        tmp_path / "run",
        [*history, view("t1", "v9", role="target", play_rate=0.05), view("t2", "v8", role="target", play_rate=0.9)],
        v9={"title": "News", "duration_s": 20.0, "tags": ["news"]},
    )
    labels = make_stage("labels", run, with_teachers(author="script", train_labels="truth", test_labels="truth"))
    by_id = {r["interaction_id"]: (r["option"], r["label_source"]) for r in labels.table("labels").to_pylist()}
    assert by_id["t1"] == ("C", "guess"), "nobody said why: the fields only suggest it"
    assert by_id["t2"] == ("A", "rule")


def test_with_a_digest_the_thought_ends_with_it_and_decides_nothing():
    """The letter alone is left to decide, so that its probability means something."""
    case = a_case(views=[seen("a", 20.0, 0.1), seen("b", 20.0, 0.1)])
    think, option = script.watched(case, digest=True)
    assert option == Option.A
    assert think == ('Topic "pets". Likes "pets". It fits. Skips mostly, 20 to 40 s always, such tags unknown, new.')
    assert script.watched(case)[0].endswith("So it is watched on.")
