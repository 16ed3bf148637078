"""The human queue: out to people, back with provenance, agreement, and the terminal review."""

import csv
import io
import json

import pytest
from rich.console import Console
from teach_helpers import EVIL, hand_made, make_answered, view, with_teachers

from gubs.errors import ArtifactError, InputError
from gubs.teachers.agreement import agreement, cohen_kappa, fleiss_kappa, majority
from gubs.teachers.annotations import HumanAnswer, add_answers, all_labels, open_items
from gubs.teachers.queue_files import COLUMNS, export_queue, read_answers
from gubs.teachers.review import QUIT, SKIP, default_file, review

SETTINGS = with_teachers()
RECORDED, TEACHERS = SETTINGS.model_dump(mode="json"), SETTINGS.teachers


@pytest.fixture
def run(tmp_path):
    """Three skips in the queue, one labelled by the teacher, one watched."""
    return labelled(tmp_path / "run")


def labelled(folder, **videos):
    targets = [view(f"s{n}", f"v{n}", role="target", play_rate=0.1) for n in range(4)]
    made = hand_made(
        folder,
        [view("h", "v9", play_rate=0.9), *targets, view("w", "v9", role="target", play_rate=0.9)],
        **videos,
    )

    def reply(request):
        if request.label.startswith("label"):
            return {"rationale": f"because {EVIL}", "option": "C"}
        return {"criticism": "=cmd()", "valid": "yes" if "s0" in request.label else "no"}

    make_answered("labels", made, SETTINGS, reply)
    return made


def answer(item, option, name="Ann", time="2025-06-01T10:00:00+00:00", **rest):
    return HumanAnswer(item, name, option, time, **rest)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_out_and_back(run, tmp_path, kind):
    file = tmp_path / f"queue.{kind}"
    assert export_queue(run, TEACHERS, file) == 3
    rows = read_file(file)
    assert list(rows[0]) == list(COLUMNS)
    first = rows[0]
    for part in ("Title v1", "20 s", "topic v1", "10%", "Title v9", "because", "not sound", "A: The user goes on"):
        assert any(part in value for value in first.values()), part
    fill_in(file, {"s1": "B", "s2": "d. no time"})
    answers, left_open = read_answers(run, file, "Ann")
    assert [(a.interaction_id, a.option, a.annotator, a.source) for a in answers] == [
        ("s1", "B", "Ann", file.name),
        ("s2", "D", "Ann", file.name),
    ]
    assert left_open == 1
    info = add_answers(run, RECORDED, answers).manifest.info
    assert (info["decided"], info["still_open"]) == (2, 1)
    labels = {r["interaction_id"]: r for r in all_labels(run).to_pylist()}
    assert {k: (r["option"], r["label_source"]) for k, r in labels.items()} == {
        "w": ("A", "rule"),
        "s0": ("C", "teacher-1"),
        "s1": ("B", "human"),
        "s2": ("D", "human"),
    }
    assert len(labels["s1"]["verdicts"]) == 3, "what the teacher tried stays with it"
    assert export_queue(run, TEACHERS, file) == 1, "what is decided is not asked again"


def test_hostile_texts_cannot_be_formulas_or_rows(tmp_path):
    evil = {"title": '=HYPERLINK("x")\n,,A', "duration_s": 5.0, "tags": ["=1+1"]}
    run = labelled(tmp_path / "run", v1=evil)
    file = tmp_path / "queue.csv"
    export_queue(run, TEACHERS, file)
    rows = read_file(file)
    assert len(rows) == 3
    for row in rows:
        assert not any(value.startswith(("=", "+", "-", "@")) for value in row.values())


def test_spreadsheets_semicolons(run, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("interaction_id;answer;comment;annotator\ns1; c ;übel;Bo\n", encoding="utf-8-sig")
    answers, _ = read_answers(run, file)
    assert [(a.option, a.annotator, a.comment) for a in answers] == [("C", "Bo", "übel")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("interaction_id,answer\ns9,A\n", "line 2: interaction_id 's9' is not in the queue"),
        ("interaction_id,answer\ns0,A\n", "'s0' is not in the queue"),
        ("interaction_id,answer\ns1,E\n", "answer 'E' is none of A, B, C, D"),
        ("interaction_id,answer\ns1,A or B\n", "is none of"),
        ("interaction_id,answer,time\ns1,A,yesterday\n", "time 'yesterday'"),
        ("id,answer\ns1,A\n", "lacks the column interaction_id"),
    ],
)
def test_wrong_files_are_refused_as_a_whole(run, tmp_path, text, message):
    file = tmp_path / "a.csv"
    file.write_text(text + "".join("s1,B\n" for _ in range(2)))
    with pytest.raises(InputError, match=message):
        read_answers(run, file, "Ann")


def test_wrong_files_of_other_kinds(run, tmp_path):
    with pytest.raises(InputError, match=r"\.csv or \.jsonl"):
        read_answers(run, tmp_path / "a.xls", "Ann")
    with pytest.raises(InputError, match="cannot be read"):
        read_answers(run, tmp_path / "none.csv", "Ann")
    (tmp_path / "a.jsonl").write_text('{"interaction_id": "s1"')
    with pytest.raises(InputError, match="line 1: not JSON"):
        read_answers(run, tmp_path / "a.jsonl", "Ann")
    (tmp_path / "b.csv").write_text("interaction_id,answer\ns1,B\n")
    with pytest.raises(InputError, match="nobody is named"):
        read_answers(run, tmp_path / "b.csv")


def test_a_person_may_change_an_answer_and_ties_stay_open(run):
    add_answers(run, RECORDED, [answer("s1", "B"), answer("s2", "B"), answer("s2", "C", "Bo")])
    assert set(ids(open_items(run))) == {"s2", "s3"}
    assert ids(open_items(run, "Bo")) == ["s1", "s3"], "who has not answered is asked, decided or not"
    later = "2025-06-02T10:00:00+00:00"
    earlier = "2025-05-02T10:00:00+00:00"
    artifact = add_answers(run, RECORDED, [answer("s2", "C", time=later), answer("s1", "D", time=earlier)])
    assert artifact.manifest.info["tied"] == []
    options = {r["interaction_id"]: r["option"] for r in all_labels(run).to_pylist() if r["label_source"] == "human"}
    assert options == {"s1": "B", "s2": "C"}, "the later answer counts, not the later import"
    assert artifact.table("answers").num_rows == 3


def test_importing_the_same_file_twice_changes_nothing(run):
    first = add_answers(run, RECORDED, [answer("s1", "B")])
    second = add_answers(run, RECORDED, [answer("s1", "B")])
    assert second.content == first.content
    assert second.manifest.fingerprint == first.manifest.fingerprint


def test_answers_to_other_labels_are_refused(run):
    add_answers(run, RECORDED, [answer("s1", "B")])
    make_answered("labels", run, with_teachers(rounds=1), lambda r: "no", force=True)
    with pytest.raises(ArtifactError, match="other labels"):
        all_labels(run)


def test_cohen_kappa():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, by chance 0.5
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(["B", "C"], ["B", "C"]) == 1.0
    assert cohen_kappa(["B", "C"], ["C", "B"]) == -1.0
    assert cohen_kappa([], []) is None
    assert cohen_kappa(["B", "B"], ["B", "B"]) is None, "chance alone would agree"
    assert cohen_kappa(["B", "B"], ["C", "C"]) == 0.0
    with pytest.raises(ValueError, match="against"):
        cohen_kappa(["B"], [])


def test_cohen_kappa_is_that_of_scikit_learn():
    import random

    from sklearn.metrics import cohen_kappa_score

    rng = random.Random(0)
    for _ in range(20):
        a, b = (rng.choices("ABCD", k=30) for _ in range(2))
        assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_fleiss_kappa():
    # the textbook's ten subjects, fourteen raters, five categories: 0.210
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    assert fleiss_kappa([dict(zip("abcde", row, strict=True)) for row in table]) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([]) is None
    assert fleiss_kappa([{"B": 3}, {"B": 3}]) is None
    with pytest.raises(ValueError, match="same number"):
        fleiss_kappa([{"B": 3}, {"B": 2}])


def test_agreement_of_three():
    votes = {
        "1": {"Ann": "B", "Bo": "B", "Cy": "B"},
        "2": {"Ann": "C", "Bo": "C", "Cy": "D"},
        "3": {"Ann": "D", "Bo": "D"},
        "4": {"Cy": "B"},
    }
    result = agreement(votes)
    assert result["annotators"] == {"Ann": 3, "Bo": 3, "Cy": 3}
    assert [p["items"] for p in result["pairs"]] == [3, 2, 2]
    assert result["pairs"][0]["kappa"] == 1.0
    assert result["fleiss"]["items"] == 2
    assert agreement({"1": {"Ann": "B"}}) == {
        "annotators": {"Ann": 1},
        "items": 1,
        "pairs": [],
        "mean_kappa": None,
        "fleiss": None,
    }
    assert agreement({})["mean_kappa"] is None


def test_majority():
    assert majority({"a": "B"}) == "B"
    assert majority({"a": "B", "b": "C", "c": "B"}) == "B"
    assert majority({"a": "B", "b": "C"}) is None


def keys(*pressed):
    left = list(pressed)
    return lambda: left.pop(0)


def session(run, *pressed, name="Ann", screen=None):
    console = Console(file=screen or io.StringIO(), width=100)
    return review(run, RECORDED, TEACHERS, name, console=console, read_key=keys(*pressed))


def test_review_can_be_left_and_taken_up_again(run):
    screen = io.StringIO()
    assert session(run, "B", SKIP, QUIT, screen=screen) == (1, 2)
    assert "Title v1" in screen.getvalue()
    assert "1 of 3: s1" in screen.getvalue()
    assert session(run, "C", "D") == (2, 0), "what was skipped comes again, what was answered does not"
    assert session(run) == (0, 0)
    options = {r["interaction_id"]: r["option"] for r in all_labels(run).to_pylist() if r["label_source"] == "human"}
    assert options == {"s1": "B", "s2": "C", "s3": "D"}


def test_review_of_a_second_person_gives_agreement(run):
    session(run, "B", "C", "D")
    session(run, "B", "C", "B", name="Bo")
    info = run.artifact("annotations").manifest.info
    (pair,) = info["agreement"]["pairs"]
    assert (pair["annotators"], pair["items"]) == (["Ann", "Bo"], 3)
    assert pair["observed"] == pytest.approx(2 / 3)
    assert info["tied"] == ["s3"]


def test_a_killed_review_loses_no_answer(run):
    def killed():
        if not pressed:
            raise KeyboardInterrupt
        return pressed.pop()

    pressed = ["B"]
    with pytest.raises(KeyboardInterrupt):
        review(run, RECORDED, TEACHERS, "Ann", console=Console(file=io.StringIO()), read_key=killed)
    assert ids(open_items(run, "Ann")) == ["s2", "s3"]
    with default_file(run, "Ann").open("a") as f:
        f.write('{"interaction_id": "s2", "ans')  # a power cut in the middle of a line
    assert session(run, "C", QUIT) == (1, 1)


def test_review_shows_markup_of_titles_as_text(tmp_path):
    title = "[bold red]x[/] [link=http://a]y"
    run = labelled(tmp_path / "run", v1={"title": title, "duration_s": 5.0, "tags": []})
    screen = io.StringIO()
    session(run, QUIT, screen=screen)
    assert title in screen.getvalue()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x"])
def test_names_that_are_no_file_names(run, name):
    with pytest.raises(InputError, match="cannot be used"):
        session(run, name=name)


def ids(table):
    return table["interaction_id"].to_pylist()


def read_file(file):
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(io.StringIO(text, newline="")))


def fill_in(file, answers):
    """What a person does: fills the column answer and saves."""
    rows = [{**row, "answer": answers.get(row["interaction_id"], "")} for row in read_file(file)]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
