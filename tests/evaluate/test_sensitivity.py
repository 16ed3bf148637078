"""What a policy's answers depend on: each prompt changes what it says it changes, and answers are read accordingly."""

import collections
from dataclasses import replace

import numpy as np
import pytest
from judged_run import POLICY, SETTINGS, Reader, make_run, stand_in

from gubs import stages
from gubs.evaluate.conditions import CHANGES, Condition, Subject, prompts, rotated
from gubs.evaluate.sensitivity import CHANGED, TURNED, Target, figures, left_out, row, verdicts
from gubs.evaluate.sheets import print_sheet, sensitivity_sheets
from gubs.evaluate.verdicts import Word
from gubs.prompts.options import OPTION_TEXTS
from gubs.prompts.people import Person, View
from gubs.prompts.question import meant
from gubs.records import TASK_OPTIONS, GroupProfile, Option, Task, User, Video
from gubs.ufm.labels import OptionProbabilities
from gubs.ufm.predict import Prediction
from gubs.ufm.prompting import PromptBuilder
from gubs.ufm.questions import Item
from gubs.ufm.settings import InputSettings, UFMSettings
from gubs.video.clips import Clip

ANNA = Person(
    User("u1", 41, "female", "farmer"),
    tuple(View(Video(f"v{k}", f"Seen {k}", tags=[f"tag{k % 3}"]), play_rate=0.9) for k in range(6)),
)
BERT = Person(User("u2", 20, "male", "cook", tags=["cars"]), ANNA.history[:1])
CLIP = Clip("film", np.zeros((4, 56, 56, 3), np.uint8), 9.0)
SUBJECT = Subject(
    task=Task.SEQUENTIAL,
    person=ANNA,
    video=Video("v", "Puppy", 12.0, tags=["pets"]),
    clip=CLIP,
    cover=Clip("film-cover", CLIP.frames[:1]),
    similar=BERT,
    group=GroupProfile("g", "Cooks", "likes soup", "u9", 0.1, "Likes soup.", None, [], "1"),
    order=rotated(Task.SEQUENTIAL, 0),
)
ITEM = Item("i0", "u1", "v", Task.SEQUENTIAL, Option.B, "rule", play_rate=0.1)
FULL, BRIEF = (PromptBuilder(InputSettings(style=s, history_items=4), pictures=True) for s in ("full", "brief"))


@pytest.mark.parametrize("builder", [FULL, BRIEF], ids=["full", "brief"])
def test_each_prompt_changes_one_thing(builder):
    made = prompts(SUBJECT, builder)
    assert list(made) == list(Condition), "the own one first"
    own, text = made[Condition.OWN], {c: p.text for c, p in made.items()}
    assert all("Puppy" in t for c, t in text.items() if c is not Condition.NO_TITLE)
    assert [k for k in range(6) if f"Seen {k}" in own.text] == [2, 3, 4, 5]
    assert ("cook" in text[Condition.SIMILAR], "farmer" in text[Condition.SIMILAR]) == (True, False)
    assert ("soup" in text[Condition.GROUP], "farmer" in text[Condition.GROUP]) == (True, False)
    assert not any(word in text[Condition.NOBODY] for word in ("farmer", "Seen", "tag"))
    assert "pets" not in text[Condition.NO_TITLE], "tags would stand in for the title"
    assert ("farmer" in text[Condition.NO_HISTORY], "Seen" in text[Condition.NO_HISTORY]) == (True, False)
    assert [k for k in range(6) if f"Seen {k}" in text[Condition.HALF]] == [4, 5]
    seen = text[Condition.REVERSED]
    assert seen.index("Seen 5") < seen.index("Seen 2")
    assert sorted(seen.splitlines()) == sorted(own.text.splitlines()), "profile and interests stay"
    assert made[Condition.NO_PICTURES].clip is None
    assert made[Condition.COVER].clip.kind == "image"
    assert {made[c].clip.key for c in made if c not in (Condition.NO_PICTURES, Condition.COVER)} == {"film"}


def test_what_changes_nothing_is_not_asked():
    plain = replace(SUBJECT, clip=None, cover=None, similar=None, group=None, person=replace(ANNA, history=()))
    made = prompts(plain, PromptBuilder(InputSettings(), pictures=False))
    assert set(made) == {Condition.OWN, Condition.NOBODY, Condition.NO_TITLE, Condition.LETTERS}
    assert "pets" in made[Condition.NO_TITLE].text, "without pictures, tags are shown anyway"


@pytest.mark.parametrize("task", list(Task))
def test_permuted_letters_stand_for_the_texts_beside_them(task):
    options = TASK_OPTIONS[task]
    for places in range(7):
        order = rotated(task, places)
        assert sorted(order) == sorted(options)
        assert all(a != b for a, b in zip(order, options, strict=True)), "each option gets another letter"
        text = FULL.about_user(task, ANNA, SUBJECT.video, None, order).text
        for letter in options:
            assert f"\n{letter}: {OPTION_TEXTS[task][meant(letter, task, order, 'full')]}\n" in text
            assert meant(letter, task, order, "brief") == letter, "only the order of the letters changes"
        assert BRIEF.about_user(task, ANNA, SUBJECT.video, None, order).text.endswith(" ".join(order))


def test_an_answer_in_permuted_letters_is_read_as_what_it_means():
    target = Target(ITEM, None, None, rotated(Task.SEQUENTIAL, 0))  # A stands for B, ..., D for A
    shares = dict(zip(TASK_OPTIONS[Task.SEQUENTIAL], (0.1, 0.2, 0.3, 0.4), strict=True))
    prediction = Prediction(
        ("", 0), "<think>x</think><answer>D</answer>", True, options=OptionProbabilities(shares, 1.0)
    )
    full, brief = (UFMSettings(inputs=InputSettings(style=s)) for s in ("full", "brief"))
    stored = row(target, Condition.LETTERS, "?", prediction, full)
    assert (stored["predicted"], stored["skip"]) == ("A", pytest.approx(0.6))
    assert stored["answer"].endswith("<answer>D</answer>"), "as it was written"
    for ufm, condition in ((full, Condition.OWN), (brief, Condition.LETTERS)):
        stored = row(target, condition, "?", prediction, ufm)
        assert (stored["predicted"], stored["skip"]) == ("D", pytest.approx(0.9))


def answered(condition, option_of, users=30):
    """One skip and one watched video per user; `option_of` gives the option from the gold one."""
    return [
        {
            "interaction_id": f"{u}-{gold}",
            "task": "sequential",
            "condition": condition,
            "user_id": f"u{u}",
            "gold": gold,
            "play_rate": 0.9 if gold == "A" else 0.1,
            "clicked": None,
            "predicted": option_of(gold),
            "skip": float(option_of(gold) != "A"),
        }
        for u in range(users)
        for gold in "AB"
    ]


def test_a_condition_is_compared_on_the_targets_that_it_changes():
    rows = answered(Condition.OWN, lambda gold: gold)
    rows += answered(Condition.GROUP, lambda gold: "B", users=20) + answered(Condition.COVER, lambda gold: gold)
    fine = {"resamples": 50, "seed": 0}
    by_name = {(f["condition"], f["name"]): f for f in figures(rows, **fine)}
    group = {name: by_name[Condition.GROUP, name] for name in ("judge_balanced_acc", "auc", CHANGED, TURNED)}
    assert {name: f["value"] for name, f in group.items()} == {**dict.fromkeys(group, 0.5)}, (
        "half of its answers are others, and wrong"
    )
    assert {f["n"] for f in group.values()} == {40}
    assert (Condition.OWN, CHANGED) not in by_name
    by_condition = {v["first"]: v for v in verdicts(rows, **fine)}
    assert (by_condition[Condition.GROUP]["difference"], by_condition[Condition.GROUP]["word"]) == (-0.5, Word.WORSE)
    assert (by_condition[Condition.COVER]["difference"], by_condition[Condition.COVER]["word"]) == (0, Word.UNKNOWN)
    assert set(left_out(rows)["sequential"]) == {str(c) for c in CHANGES} - {Condition.GROUP, Condition.COVER}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("sensitivity"))


def test_a_killed_attempt_asks_nothing_twice_and_the_tables_tell_what_was_asked(run, monkeypatch, capsys):
    stand_in(monkeypatch)
    Reader.left = 100
    with pytest.raises(KeyboardInterrupt):
        stages.make_stage(f"sensitivity-{POLICY}", run, SETTINGS)
    Reader.left = 10**9
    artifact = stages.make_stage(f"sensitivity-{POLICY}", run, SETTINGS)
    asked = [q.key for q in Reader.asked]
    assert len(asked) == len(set(asked)) == artifact.manifest.tables["answers"].rows
    assert all(q.temperature == 0 for q in Reader.asked)
    rows = artifact.table("answers").to_pylist()
    of = {(r["task"], r["interaction_id"], r["condition"]): r for r in rows}
    counts = collections.Counter((r["task"], r["condition"]) for r in rows)
    assert counts["sequential", Condition.OWN] == 40
    assert 0 < counts["sequential", Condition.GROUP] < 40, "every fifth user is in no group"
    assert all(r["shown"] != r["user_id"] for r in rows if r["condition"] == Condition.SIMILAR)
    assert {r["predicted"] for (_, _, c), r in of.items() if c == Condition.NO_TITLE} == {"B"}
    assert artifact.manifest.info["left_out"] == {"click": {"cover only": "prompts show one picture at most"}}
    values = {(f["task"], f["condition"], f["name"]): f["value"] for f in artifact.table("figures").to_pylist()}
    assert values["sequential", Condition.NO_PICTURES, CHANGED] == 0, "this policy does not look at them"
    assert values["sequential", Condition.NO_TITLE, "judge_balanced_acc"] == 0.5
    for sheet in sensitivity_sheets(artifact):
        print_sheet(sheet)
    printed = capsys.readouterr().out
    assert "left out, prompts show one picture at most: cover only" in printed
    assert "brief prompts show no texts of options" in printed


def test_without_groups_and_pictures_it_says_so(run, monkeypatch):
    stand_in(monkeypatch)
    settings = SETTINGS.model_copy(
        update={"ufm": SETTINGS.ufm.model_copy(update={"inputs": InputSettings(vision=False)})}
    )
    monkeypatch.setattr("gubs.artifacts.StageJob.reads", lambda self, name: False)
    missing = stages.make_stage(f"sensitivity-{POLICY}", run, settings).manifest.info["left_out"]["sequential"]
    assert set(missing) == {Condition.SIMILAR, Condition.GROUP, Condition.NO_PICTURES, Condition.COVER}
    assert "gubs ugm" in missing[Condition.GROUP]
