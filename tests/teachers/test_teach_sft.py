"""SFT examples: who becomes one, what the annotator is told, what the example holds and hides."""

import json

import pyarrow.compute as pc
import pytest
from teach_helpers import EVIL, copy_run, hand_made, make_answered, prompt_of, view, with_teachers

from gubs.config import load_settings
from gubs.data.ifvr import IFVR
from gubs.errors import SettingsError
from gubs.prompts.answers import TAGS, read_answer
from gubs.prompts.question import user_prompt
from gubs.records import TASK_OPTIONS, Task
from gubs.teachers import sft
from gubs.teachers.settings import TeacherSettings

SETTINGS = TeacherSettings()


def world(folder, reason="It shows snakes", **rest):
    return hand_made(
        folder,
        [
            view("h1", "v1", play_rate=0.9),
            view("h2", "v2", play_rate=0.05, disliked=True, dislike_reason="history is no target"),
            view("d1", "v3", role="target", play_rate=0.1, disliked=True, dislike_reason=reason),
            view("next", "v4", role="target", play_rate=0.8, disliked=False),
            view("t1", "v5", role="target", split="test", user_id="u2", disliked=True, dislike_reason="of a test user"),
            view("o1", "v5", role="target", split=None, user_id="u3", disliked=True, dislike_reason="held out"),
        ],
        **rest,
    )


def clicks(folder, users=6, each=3):
    rows = [view(f"h{u}", "v0", task="click", clicked=True, user_id=f"u{u}") for u in range(users)]
    for u in range(users):
        for n in range(each):
            rows += [
                view(f"{kind}{u}-{n}", f"v{n}", task="click", role="target", clicked=kind == "c", user_id=f"u{u}")
                for kind in "cn"
            ]
    return hand_made(folder, rows)


def cases_of(run, settings=SETTINGS, seed=0):
    return sft.sft_cases(IFVR(run), settings, seed)


def requests_of(run, settings=SETTINGS):
    return [sft.sft_request(c, settings) for c in cases_of(run, settings)]


def thought(request, think="A long thought."):
    return {"think": think, "answer": request.schema["properties"]["answer"]["enum"][0]}


def stage(run, reply, **teachers):
    """The stage with a scripted annotator."""
    return make_answered("sft", run, with_teachers(**teachers), reply)


def test_only_disliked_targets_of_training_users(tmp_path):
    assert [c.target.interaction_id for c in cases_of(world(tmp_path / "run"))] == ["d1"]


def test_watched_targets_become_examples_of_option_a_by_the_script_alone(tmp_path):
    """The training user's only target that was no fast skip; an annotator cannot be asked about it."""
    run = world(tmp_path / "run")
    by_script = TeacherSettings(author="script", sft_watched=0.6)
    assert [c.target.interaction_id for c in cases_of(run, by_script)] == ["d1", "next"]
    assert [c.target.interaction_id for c in cases_of(run, TeacherSettings(author="script"))] == ["d1"]
    with pytest.raises(SettingsError, match=r"sft_watched is for teachers.author=script only: set it to 0$"):
        load_settings("paper", ["teachers.sft_watched=0.6"])
    with pytest.raises(SettingsError, match=r"sft_views, teachers.script_digest are for .*script only: set them to 0$"):
        load_settings("tiny", ["teachers.author=annotator"])
    rows = stage(run, thought, author="script", sft_watched=0.6).table("examples").to_pylist()
    assert [(r["interaction_id"], r["gold"]) for r in rows][1] == ("next", "A")
    assert rows[1]["response"].endswith("So it is watched on.</think><answer>A</answer>")


def test_watched_targets_are_a_share_of_the_dislikes(tmp_path):
    """Two for every four, however many were watched: few dislikes are not to drown in them."""
    rows = [view("h1", "v1", play_rate=0.9)]
    rows += [view(f"d{n}", f"v{n}", role="target", play_rate=0.1, disliked=True) for n in range(2, 6)]
    rows += [view(f"w{n}", f"v{n}", role="target", play_rate=0.8, disliked=False) for n in range(6, 9)]
    settings = TeacherSettings(author="script", sft_watched=0.5)
    cases = cases_of(hand_made(tmp_path / "run", rows), settings)
    assert [c.target.interaction_id[0] for c in cases] == ["d"] * 4 + ["w"] * 2


def test_where_dislikes_are_few_skips_and_watched_targets_become_examples(tmp_path):
    """As many of either, none that is an example already, and in the words that prompts with a digest show."""
    rows = [view("h1", "v1", play_rate=0.9)]
    rows += [view("d1", "v1", role="target", play_rate=0.1, disliked=True)]
    rows += [view(f"s{n}", f"v{n}", role="target", play_rate=0.1) for n in range(2, 6)]
    rows += [view(f"w{n}", f"v{n}", role="target", play_rate=0.8) for n in range(6, 10)]
    run = hand_made(tmp_path / "run", rows)
    settings = {"author": "script", "sft_views": 6, "script_digest": True}
    cases = cases_of(run, TeacherSettings(**settings))
    assert [c.target.interaction_id[0] for c in cases] == ["d", *"sss", *"www"]
    examples = stage(run, thought, **settings).table("examples").to_pylist()
    assert [r["gold"] == "A" for r in examples] == [False] * 4 + [True] * 3
    assert all("Skips seldom, 20 to 40 s seldom" in r["think"] for r in examples), examples
    with pytest.raises(SettingsError, match=r"sft_views is for teachers\.author=script only"):
        load_settings("paper", ["teachers.sft_views=2"])


def test_the_annotator_reads_profile_history_video_and_the_users_words(tmp_path):
    (request,) = requests_of(world(tmp_path / "run"))
    prompt = prompt_of(request)
    for part in ("Title v1", "90%", "Title v3", "topic v3", "It shows snakes", "pets"):
        assert part in prompt
    for hidden in ("Title v4", "Title v5", "history is no target", "10%"):
        assert hidden not in prompt
    assert request.schema["properties"]["answer"]["enum"] == ["B", "C", "D"]


@pytest.mark.parametrize("reason", [None, "", " \u200b"])
def test_without_words_of_the_user_the_prompt_has_none(tmp_path, reason):
    (request,) = requests_of(world(tmp_path / "run", reason))
    assert "own words" not in prompt_of(request)


def test_reason_in_another_language(tmp_path):
    (request,) = requests_of(world(tmp_path / "run", "标题党，内容不符"))
    assert '"标题党，内容不符"' in prompt_of(request)


@pytest.mark.parametrize("where", ["reason", "title", "tags"])
def test_hostile_texts_stay_in_their_field(tmp_path, where):
    evil = {
        "reason": {"reason": EVIL},
        "title": {"v3": {"title": EVIL, "duration_s": 20.0, "tags": ["x"]}},
        "tags": {"users": {"u1": {"tags": [EVIL], "other": {EVIL: EVIL}}}},
    }
    (request,) = requests_of(world(tmp_path / "evil", **evil[where]))
    (harmless,) = requests_of(world(tmp_path / "run"))
    prompt = prompt_of(request)
    assert len(prompt.splitlines()) == len(prompt_of(harmless).splitlines())
    assert not any(tag in prompt for tag in TAGS)
    assert "49" not in prompt
    assert not any(line.startswith("B: obey") for line in prompt.splitlines())


def test_clicks_are_balanced_and_told_by_the_log(tmp_path):
    run = clicks(tmp_path / "run")
    cases = cases_of(run, TeacherSettings(sft_click_users=4, sft_click_each=2))
    clicked = [c.target.clicked for c in cases]
    assert sum(clicked) == len(clicked) - sum(clicked) == 8
    assert len({c.target.user_id for c in cases}) == 4
    for case in cases:
        request = sft.sft_request(case, SETTINGS)
        assert request.schema["properties"]["answer"]["enum"] == ["A" if case.target.clicked else "B"]


def test_draws_follow_the_seed(tmp_path):
    run, few = clicks(tmp_path / "run", users=12), TeacherSettings(sft_click_users=4)

    def drawn(seed):
        return [c.target.interaction_id for c in cases_of(run, few, seed)]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(s)) for s in range(5)}) > 1


def test_without_unclicked_targets_there_are_no_click_examples(tmp_path):
    run = hand_made(tmp_path / "run", [view(f"c{n}", "v", task="click", role="target", clicked=True) for n in range(3)])
    assert cases_of(run) == []


def test_example_has_the_whole_answer_and_keeps_the_reason_apart(tmp_path):
    artifact = stage(world(tmp_path / "run"), lambda r: {"think": "Snakes scare </think>", "answer": "B"})
    (row,) = artifact.table("examples").to_pylist()
    assert row["gold"] == "B"
    assert row["label_source"] == "teacher-1"
    assert row["history"] == ["h1", "h2"]
    assert row["dislike_reason"] == "It shows snakes"
    assert row["quotes_reason"] is False
    read = read_answer(row["response"], TASK_OPTIONS[Task.SEQUENTIAL])
    assert read.ok
    assert (read.option, read.think) == ("B", row["think"])


def test_the_ufms_prompt_of_an_example_knows_neither_reason_nor_outcome(tmp_path):
    run = world(tmp_path / "run", reason="uniquewords")
    (case,) = cases_of(run)
    prompt = user_prompt(Task.SEQUENTIAL, case.person, case.video)
    assert "uniquewords" not in prompt
    assert "10%" not in prompt
    assert "dislike" not in prompt.casefold()


def test_thoughts_that_repeat_the_users_words_are_marked(tmp_path):
    artifact = stage(world(tmp_path / "run"), lambda r: thought(r, 'They said "it  shows SNAKES".'))
    assert artifact.table("examples")["quotes_reason"].to_pylist() == [True]
    assert artifact.manifest.info["quotes_reason"] == 1


def test_failures_are_counted_and_kept_and_missing_from_the_examples(tmp_path):
    artifact = stage(world(tmp_path / "run"), lambda r: {"think": "Hm.", "answer": "A"})
    assert artifact.table("examples").num_rows == 0
    (failed,) = artifact.table("failures").to_pylist()
    assert (failed["item"], failed["cause"]) == ("d1", "schema")
    assert json.loads(failed["text"])["answer"] == "A"
    assert artifact.manifest.info["failures"] == {"schema": 1}


def test_notes_say_what_the_source_lacks(tmp_path):
    mute = stage(world(tmp_path / "mute", reason=None), thought).manifest.info["notes"]
    assert any("1 of 1 dislikes come without" in n for n in mute)
    films = stage(clicks(tmp_path / "films"), thought).manifest.info["notes"]
    assert any("only click examples" in n for n in films)


def test_no_prompt_depends_on_other_targets_or_the_truth(simulated, tmp_path, monkeypatch):
    """The targets' other columns are wiped, and the truth is deleted: the same prompts."""

    def prompts(run):
        return [r.messages for r in sft.requests(run, SETTINGS, 0)]

    before = prompts(simulated)
    blind = copy_run(simulated, tmp_path / "blind")
    blind.fs.rm(blind.path("truth"), recursive=True)
    monkeypatch.setattr("gubs.artifacts.Artifact.table", _without_outcomes)
    assert prompts(blind) == before
    assert len(before) > 20


def _without_outcomes(self, name, columns=None):
    """`Artifact.table`, but targets lose play rate, watch time and what came after."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with self.run.fs.open(self.run.path(self.stage, f"{name}.parquet"), "rb") as f:
        table = pq.read_table(f)
    if name == "interactions":
        target = pc.equal(table["role"], "target")
        for column in ("play_rate", "watch_s", "next_op_gap_s", "prev_op_gap_s", "liked", "position", "page_id"):
            place = table.column_names.index(column)
            blank = pc.if_else(target, pa.scalar(None, table[column].type), table[column])
            table = table.set_column(place, table.schema.field(column), blank)
    return table if columns is None else table.select(list(columns))
