"""SFT examples: a chain of thought and an option for explicit dislikes and for clicks (A.3, A.6, "Other Prompts").

Sequential task: a training user disliked a target; the annotator reads profile, history, video and the user's own
words, if there are any, and says which cause it is (B, C, D) and how one could have foreseen it. Click task: the
annotator explains why a target was clicked (A) or not (B). What the annotator was told about the outcome stands in a
column of its own and never in the UFM's prompt.
"""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Run, StageJob
from gubs.console import say
from gubs.data.ifvr import IFVR, PROFILES, watched
from gubs.llm.calls import LLMRequest, question
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.answers import as_answer, quiet_tags
from gubs.prompts.fields import inline, plain
from gubs.prompts.options import OPTION_TEXTS, SKIP_CAUSES, option_lines
from gubs.records import SCHEMAS, TASK_OPTIONS, Interaction, Option, Split, Task
from gubs.teachers import script
from gubs.teachers.annotator import ROLE, Annotator, annotator, by_cause, failures
from gubs.teachers.cases import Case, by_id, clicked, draw, load_cases
from gubs.teachers.forms import PARSER, thought_form, words
from gubs.teachers.score import true_flaws
from gubs.teachers.settings import TeacherSettings

SCHEMA = pa.schema(
    [
        *SCHEMAS["examples"],
        ("think", pa.string()),
        ("response", pa.string()),
        ("dislike_reason", pa.string()),
        ("quotes_reason", pa.bool_()),
    ]
)
"""An `Example` with the chain of thought, the whole answer in the UFM's form, and apart from it the user's own words;
`quotes_reason`: the chain of thought repeats them, which the UFM could not know."""

_QUOTE_FROM = 12
"""Shorter reasons ("boring") are no quotation."""


def make(job: StageJob, teachers: TeacherSettings, llm: LLMSettings, seed: int) -> str:
    """Writes the examples (tables examples, failures).

    Errors: see `LLMClient.stream`; what was finished is kept in the journal.
    """
    cases = sft_cases(IFVR(job.run), teachers, seed, tastes=job.reads(PROFILES))
    scripted = teachers.author == "script"
    flaws = true_flaws(job.run) if teachers.truth and scripted else {}
    if scripted:
        rows, failed = _scripted(cases, teachers, flaws), failures([])
    else:
        with annotator(job.run, llm) as asked:
            rows, failed = _annotated(cases, teachers, asked)
    with job.writing() as out:
        out.write_table("examples", pa.Table.from_pylist(rows, schema=SCHEMA))
        out.write_table("failures", failed)
        out.info = _report(rows, cases, failed, told=bool(flaws))
        out.summary = f"{len(rows):,} examples, {failed.num_rows:,} failures"
    for note in out.info["notes"]:
        say(f"         note: {note}")
    return out.summary


def _annotated(cases: list[Case], teachers: TeacherSettings, asked: Annotator) -> tuple[list[dict[str, Any]], pa.Table]:
    """Examples written by the annotator, and its failures."""
    answers = asked.ask([sft_request(c, teachers) for c in cases])
    rows = [
        _example(c, Option(a.value["answer"]), a.value["think"], "teacher-1")
        for c, a in zip(cases, answers, strict=True)
        if a.ok
    ]
    return rows, failures(answers)


def _scripted(cases: list[Case], teachers: TeacherSettings, flaws: Mapping[str, str]) -> list[dict[str, Any]]:
    """Examples written by rules. `flaws` of videos are told to the rules, by video; empty: they do without."""
    rows = []
    for case in cases:
        remark = script.REMARKS.get(flaws.get(case.target.video_id, ""), "")
        think, option = _by_rules(case, teachers.script_mistakes, remark)
        rows.append(_example(case, option, think, script.SCRIPT))
    return rows


def _by_rules(case: Case, mistakes: float, seen: str) -> tuple[str, Option]:
    if case.target.task == Task.CLICK:
        return script.click(case, seen)
    if case.target.disliked:
        return script.dislike(case, mistakes, seen)
    return script.watched(case, seen)


def requests(run: Run, teachers: TeacherSettings, seed: int) -> list[LLMRequest]:
    """All requests of the job, for an estimate."""
    if teachers.author == "script":
        return []
    tastes = teachers.profiles and run.has(PROFILES)
    return [sft_request(c, teachers) for c in sft_cases(IFVR(run), teachers, seed, tastes=tastes)]


def sft_cases(ifvr: IFVR, settings: TeacherSettings, seed: int, *, tastes: bool = False) -> list[Case]:
    """The targets that become examples: dislikes, some that were watched, then clicks; training users only."""
    rows = ifvr.targets(Task.SEQUENTIAL, [Split.TRAIN])
    minded = pc.fill_null(rows["disliked"], False)
    disliked = draw(rows.filter(minded), settings.sft_dislikes, [seed, 11])
    cases = load_cases(ifvr, disliked, settings.history_items, tastes=tastes)
    if count := round(settings.sft_watched * disliked.num_rows):
        liked = draw(watched(rows.filter(pc.invert(minded))), count, [seed, 13])
        cases += load_cases(ifvr, liked, settings.history_items, tastes=tastes)
    picked = _balanced_clicks(ifvr.targets(Task.CLICK, [Split.TRAIN]), settings, seed)
    return cases + load_cases(ifvr, picked, settings.history_items, tastes=tastes)


def sft_request(case: Case, settings: TeacherSettings) -> LLMRequest:
    """Asks for the chain of thought and the option of one case."""
    disliked = case.target.task == Task.SEQUENTIAL
    options = SKIP_CAUSES if disliked else (_click_option(case),)
    prompt = fill(
        "teachers/dislike" if disliked else "teachers/click",
        **case.shown(settings.max_text),
        **(_told_dislike(case, settings) if disliked else _told_click(case)),
        words=words(settings.think_chars),
    )
    key = case.target.interaction_id
    return question(
        ROLE,
        f"sft/{key}",
        prompt,
        schema=thought_form(options, settings.think_chars),
        parser=PARSER,
        metadata={"item": key},
    )


def _told_dislike(case: Case, settings: TeacherSettings) -> dict[str, Any]:
    reason = case.target.dislike_reason
    told = inline(reason, settings.max_text) if reason and plain(reason) else ""
    return {"reason": told, "options": option_lines(Task.SEQUENTIAL, SKIP_CAUSES)}


def _told_click(case: Case) -> dict[str, Any]:
    outcome = _click_option(case)
    return {"outcome": OPTION_TEXTS[Task.CLICK][outcome], "answer": outcome.value}


def _click_option(case: Case) -> Option:
    return Option.A if clicked(case.target) else Option.B


def _balanced_clicks(rows: pa.Table, settings: TeacherSettings, seed: int) -> pa.Table:
    """As many clicked as unclicked targets of random users."""
    rng = np.random.default_rng([seed, 12])
    users = np.array(sorted(set(rows["user_id"].to_pylist())), dtype=object)
    drawn = pa.array(rng.permutation(users)[: settings.sft_click_users].tolist(), pa.string())
    mine = list(Interaction.from_table(rows.filter(pc.is_in(rows["user_id"], value_set=drawn))))
    sides: dict[bool, list[str]] = {True: [], False: []}
    given: collections.Counter[tuple[str, bool]] = collections.Counter()
    for i in rng.permutation(len(mine)):
        outcome, user = clicked(mine[i]), mine[i].user_id
        if outcome is None or given[user, outcome] >= settings.sft_click_each:
            continue
        given[user, outcome] += 1
        sides[outcome].append(mine[i].interaction_id)
    size = min(map(len, sides.values()))
    return by_id(rows, sorted(sides[True][:size] + sides[False][:size]))


def _example(case: Case, option: Option, think: str, author: str) -> dict[str, Any]:
    """A row of `SCHEMA`. Who said so: of dislikes the author of the chain of thought, of clicks the log."""
    think = quiet_tags(think).strip()
    sequential = case.target.task == Task.SEQUENTIAL
    reason = case.target.dislike_reason
    return {
        **case.ids(),
        "example_id": f"sft-{case.target.interaction_id}",
        "history": [v.interaction_id for v in case.person.history],
        "gold": option.value,
        "label_source": author if sequential else "rule",
        "think": think,
        "response": as_answer(think, option),
        "dislike_reason": reason,
        "quotes_reason": sequential and _quotes(think, reason),
    }


def _quotes(think: str, reason: str | None) -> bool:
    said = plain(reason or "", 10_000).casefold().rstrip(".!?")
    return len(said) >= _QUOTE_FROM and said in plain(think, 100_000).casefold()


def _report(rows: list[dict[str, Any]], cases: list[Case], failed: pa.Table, told: bool) -> dict[str, Any]:
    golds = {
        str(task): {str(o): sum(r["task"] == task and r["gold"] == o for r in rows) for o in options}
        for task, options in TASK_OPTIONS.items()
    }
    return {
        "asked": len(cases),
        "golds": golds,
        "failures": by_cause(failed),
        "quotes_reason": sum(r["quotes_reason"] for r in rows),
        "notes": _notes(cases, told),
    }


def _notes(cases: list[Case], told: bool) -> list[str]:
    eyes = "; which videos have a flaw, the simulation told it" if told else ""
    notes = [f"the annotator saw no pictures: a video is its title, length and tags{eyes}"]
    dislikes = [c for c in cases if c.target.task == Task.SEQUENTIAL]
    if not dislikes:
        notes.append("no training user disliked a target of the sequential task: there are only click examples")
    mute = sum(not c.target.dislike_reason for c in dislikes)
    if mute:
        notes.append(f"{mute} of {len(dislikes)} dislikes come without the user's own words")
    if len(dislikes) == len(cases):
        notes.append("the click task has no clicked or no unclicked targets: there are only dislike examples")
    return notes
