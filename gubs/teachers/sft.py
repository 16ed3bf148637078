"""SFT examples: a chain of thought and an option for explicit dislikes and for clicks (A.3, A.6, "Other Prompts").

Sequential task: a training user disliked a target; the annotator reads profile, history, video and the user's own
words, if any, and names the cause (B, C, D) and how it could have been foreseen. Click task: the annotator explains why
a target was clicked (A) or not (B). The user's own words have a separate column and are never part of the UFM's prompt.
"""

import collections
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import JsonObject, Run, StageJob
from gubs.console import say
from gubs.data.ifvr import IFVR, PROFILES, fast_skips, watched
from gubs.llm.calls import LLMRequest
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.answers import as_answer, quiet_tags
from gubs.prompts.fields import inline, plain
from gubs.prompts.options import OPTION_TEXTS, SKIP_CAUSES, option_lines
from gubs.records import SCHEMAS, TASK_OPTIONS, Interaction, Option, Split, Task
from gubs.teachers import script
from gubs.teachers.annotator import Annotator, annotator, by_cause, failures, in_words, request_about
from gubs.teachers.cases import Case, by_id, clicked, draw, is_fast_skip, load_cases
from gubs.teachers.forms import thought_form, words
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
"""An `Example` with the chain of thought, the whole answer in the UFM's form, and, separately, the user's own words.
quotes_reason: the chain of thought repeats these words, which the UFM cannot know."""

_QUOTE_FROM = 12
"""Characters from which a repeated reason is a quotation; shorter ones ("boring") are common words."""


def make(job: StageJob, teachers: TeacherSettings, llm: LLMSettings, seed: int) -> str:
    """Writes the examples (tables examples, failures).

    Errors: see `LLMClient.stream`; the journal keeps the answers received so far.
    """
    cases = sft_cases(IFVR(job.run), teachers, seed, tastes=job.reads(PROFILES))
    scripted = teachers.author == "script"
    flaws = true_flaws(job.run) if teachers.script_flaws and scripted else {}
    if scripted:
        rows, failed = _scripted(cases, teachers, flaws), failures([])
    else:
        with annotator(job.run, llm) as opened:
            rows, failed = _annotated(cases, teachers, opened)
    with job.writing() as out:
        out.write_table("examples", pa.Table.from_pylist(rows, schema=SCHEMA))
        out.write_table("failures", failed)
        out.info = _report(rows, cases, failed, knows_flaws=bool(flaws))
        out.summary = f"{len(rows):,} examples, {in_words(failed)}"
    for note in out.info["notes"]:
        say(f"         note: {note}")
    return out.summary


def _annotated(cases: list[Case], teachers: TeacherSettings, opened: Annotator) -> tuple[list[JsonObject], pa.Table]:
    """Examples written by the annotator, and its failures."""
    answers = opened.ask([sft_request(c, teachers) for c in cases])
    rows = [
        _example(c, Option(a.value["answer"]), a.value["think"], "teacher-1")
        for c, a in zip(cases, answers, strict=True)
        if a.ok
    ]
    return rows, failures(answers)


def _scripted(cases: list[Case], teachers: TeacherSettings, flaws: Mapping[str, str]) -> list[JsonObject]:
    """Examples written by rules, which are told the videos' flaws (by video id; may be empty)."""
    rows = []
    for case in cases:
        remark = script.REMARKS.get(flaws.get(case.target.video_id, ""), "")
        think, option = _by_rules(case, teachers, remark)
        rows.append(_example(case, option, think, script.SCRIPT))
    return rows


def _by_rules(case: Case, teachers: TeacherSettings, seen: str) -> tuple[str, Option]:
    target, digest = case.target, teachers.script_digest
    if target.task == Task.CLICK:
        return script.click(case, seen, digest=digest)
    if target.disliked:
        return script.dislike(case, teachers.script_mistakes, seen, digest=digest)
    if is_fast_skip(target):
        return script.skipped(case, seen, digest=digest)
    return script.watched(case, seen, digest=digest)


def requests(run: Run, teachers: TeacherSettings, seed: int) -> list[LLMRequest]:
    """All requests of the job, for an estimate."""
    if teachers.author == "script":
        return []
    tastes = teachers.profiles and run.has(PROFILES)
    return [sft_request(c, teachers) for c in sft_cases(IFVR(run), teachers, seed, tastes=tastes)]


def sft_cases(ifvr: IFVR, settings: TeacherSettings, seed: int, *, tastes: bool = False) -> list[Case]:
    """The targets of training users that become examples: dislikes, then some watched ones, then skips and watched ones
    alike, then clicks.
    """
    rows = ifvr.targets(Task.SEQUENTIAL, [Split.TRAIN])
    is_disliked = pc.fill_null(rows["disliked"], False)
    disliked = draw(rows.filter(is_disliked), settings.sft_dislikes, [seed, 11])
    cases = load_cases(ifvr, disliked, settings.history_items, tastes=tastes)
    if count := round(settings.sft_watched * disliked.num_rows):
        others = draw(watched(rows.filter(pc.invert(is_disliked))), count, [seed, 13])
        cases += load_cases(ifvr, others, settings.history_items, tastes=tastes)
    if settings.sft_views:
        outcomes = rows.filter(pc.invert(is_disliked))
        halves = [
            draw(half, settings.sft_views // 2, [seed, 14, i])
            for i, half in enumerate((fast_skips(outcomes), watched(outcomes)))
        ]
        cases += load_cases(ifvr, pa.concat_tables(halves), settings.history_items, tastes=tastes)
    clicks = _balanced_clicks(ifvr.targets(Task.CLICK, [Split.TRAIN]), settings, seed)
    return cases + load_cases(ifvr, clicks, settings.history_items, tastes=tastes)


def sft_request(case: Case, settings: TeacherSettings) -> LLMRequest:
    """Asks for the chain of thought and the option of one case."""
    disliked = case.target.task == Task.SEQUENTIAL
    options = SKIP_CAUSES if disliked else (_click_option(case),)
    prompt = fill(
        "teachers/dislike" if disliked else "teachers/click",
        **case.prompt_fields(settings.max_text),
        **(_dislike_fields(case, settings) if disliked else _click_fields(case)),
        words=words(settings.think_chars),
    )
    return request_about(case.target.interaction_id, "sft", prompt, thought_form(options, settings.think_chars))


def _dislike_fields(case: Case, settings: TeacherSettings) -> dict[str, str]:
    reason = case.target.dislike_reason
    quoted = inline(reason, settings.max_text) if reason and plain(reason) else ""
    return {"reason": quoted, "options": option_lines(Task.SEQUENTIAL, SKIP_CAUSES)}


def _click_fields(case: Case) -> dict[str, str]:
    outcome = _click_option(case)
    return {"outcome": OPTION_TEXTS[Task.CLICK][outcome], "answer": outcome.value}


def _click_option(case: Case) -> Option:
    return Option.A if clicked(case.target) else Option.B


def _balanced_clicks(rows: pa.Table, settings: TeacherSettings, seed: int) -> pa.Table:
    """Equal numbers of clicked and unclicked targets of random users."""
    rng = np.random.default_rng([seed, 12])
    users = np.array(sorted(set(rows["user_id"].to_pylist())), dtype=object)
    drawn = pa.array(rng.permutation(users)[: settings.sft_click_users].tolist(), pa.string())
    targets = list(Interaction.from_table(rows.filter(pc.is_in(rows["user_id"], value_set=drawn))))
    by_outcome: dict[bool, list[str]] = {True: [], False: []}
    taken: collections.Counter[tuple[str, bool]] = collections.Counter()
    for i in rng.permutation(len(targets)):
        outcome, user = clicked(targets[i]), targets[i].user_id
        if outcome is None or taken[user, outcome] >= settings.sft_click_each:
            continue
        taken[user, outcome] += 1
        by_outcome[outcome].append(targets[i].interaction_id)
    size = min(map(len, by_outcome.values()))
    return by_id(rows, sorted(by_outcome[True][:size] + by_outcome[False][:size]))


def _example(case: Case, option: Option, think: str, author: str) -> JsonObject:
    """A row of `SCHEMA`; the author of the chain of thought labels dislikes, the log labels clicks."""
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
    quoted = plain(reason or "", 10_000).casefold().rstrip(".!?")
    return len(quoted) >= _QUOTE_FROM and quoted in plain(think, 100_000).casefold()


def _report(rows: list[JsonObject], cases: list[Case], failed: pa.Table, knows_flaws: bool) -> JsonObject:
    golds = {
        str(task): {str(o): sum(r["task"] == task and r["gold"] == o for r in rows) for o in options}
        for task, options in TASK_OPTIONS.items()
    }
    return {
        "asked": len(cases),
        "golds": golds,
        "failures": by_cause(failed),
        "quotes_reason": sum(r["quotes_reason"] for r in rows),
        "notes": _notes(cases, knows_flaws),
    }


def _notes(cases: list[Case], knows_flaws: bool) -> list[str]:
    flaws = "; the simulation told it which videos have a flaw" if knows_flaws else ""
    notes = [f"the annotator saw no pictures, only titles, lengths and tags of videos{flaws}"]
    dislikes = [c for c in cases if c.target.task == Task.SEQUENTIAL]
    if not dislikes:
        notes.append("no training user disliked a target of the sequential task: there are only click examples")
    if wordless := sum(not c.target.dislike_reason for c in dislikes):
        notes.append(f"{wordless} of {len(dislikes)} dislikes come without the user's own words")
    if len(dislikes) == len(cases):
        notes.append("the click task has no clicked or no unclicked targets: there are only dislike examples")
    return notes
