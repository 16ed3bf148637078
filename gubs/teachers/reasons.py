"""Reasons of skips (A.3): the annotator labels, judges its own rationale, and labels again, up to three rounds.

Every fast skip among the targets gets a cause (B, C, D) with a rationale. The annotator is then shown the rationale and
asks itself whether it is sound; if not, it labels again, with the criticism. What is still not sound after the last
round, or had no usable answer, goes to the queue for a person. What was not skipped is A by rule, and clicks are
labelled by what was clicked: the tables labels and queue hold every target whose outcome is known, but for the skips
that a limit left out.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from gubs.artifacts import Run, StageJob
from gubs.console import say
from gubs.data.ifvr import IFVR, PROFILES, fast_skips
from gubs.llm.calls import Answer, LLMRequest, question
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.options import SKIP_CAUSES, option_lines
from gubs.records import FAST_SKIP_BELOW, Interaction, Option, Split, Task
from gubs.teachers import script
from gubs.teachers.annotator import ROLE, Ask, annotator, by_cause, failures
from gubs.teachers.cases import Case, clicked, draw, load_cases
from gubs.teachers.forms import PARSER, label_form, verdict_form, words
from gubs.teachers.score import score, true_causes
from gubs.teachers.settings import TeacherSettings

STAGE = "labels"
RULE = "rule"
TRUE = "truth"
"""`label_source` of true causes, which only simulated sources know."""
INVALID = "invalid"
"""Why an item is in the queue: no round brought a rationale that its own author found sound."""

_ATTEMPTS = pa.list_(
    pa.struct(
        [
            ("option", pa.string()),
            ("rationale", pa.string()),
            ("valid", pa.bool_()),
            ("criticism", pa.string()),
        ]
    )
)
IDS = [
    pa.field("interaction_id", pa.string(), nullable=False),
    pa.field("user_id", pa.string(), nullable=False),
    pa.field("video_id", pa.string(), nullable=False),
    pa.field("task", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
]
"""The columns that say which target a row is about."""

LABELS = pa.schema(
    [
        *IDS,
        pa.field("option", pa.string(), nullable=False),
        ("rationale", pa.string()),
        ("rounds", pa.int32()),
        pa.field("label_source", pa.string(), nullable=False),
        ("verdicts", _ATTEMPTS),
    ]
)
"""One row a labelled target. label_source: rule, teacher-1 ... teacher-3 (the round), script, truth, human. rounds: 0
for rule."""

QUEUE = pa.schema([*IDS, ("play_rate", pa.float64()), pa.field("cause", pa.string(), nullable=False)]).append(
    pa.field("attempts", _ATTEMPTS)
)
"""What a person has to label. cause: `invalid`, or why the last answer could not be used."""


@dataclass
class Attempt:
    """One round: what was said, and what its author thought of it (valid is None before, or if that call failed)."""

    option: str
    rationale: str
    valid: bool | None = None
    criticism: str | None = None


@dataclass
class Skip:
    """A fast skip on its way to a reason."""

    case: Case
    attempts: list[Attempt] = field(default_factory=list)
    failed: Answer | None = None
    author: str = ""
    """Who gave the reason, where it was not the annotator."""

    @property
    def source(self) -> str:
        """Who said so: `label_source` of `LABELS`."""
        return self.author or f"teacher-{len(self.attempts)}"

    @property
    def sound(self) -> Attempt | None:
        """The attempt that was found sound."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].valid else None


def make(job: StageJob, teachers: TeacherSettings, llm: LLMSettings, seed: int) -> str:
    """Labels every target whose outcome is known (tables labels, queue, failures).

    On simulated sources its info tells how many labels are true.

    Errors: see `LLMClient.stream`; what was finished is kept in the journal.
    """
    ifvr, truth = IFVR(job.run), true_causes(job.run)
    skips = open_skips(ifvr, teachers, seed, tastes=job.reads(PROFILES))
    with annotator(job.run, llm) as asked:
        _find_reasons(skips, teachers, truth if teachers.truth else {}, asked.ask)
    told = [_label_row(s, s.sound) for s in skips if s.sound]
    rules, unknown = rule_labels(ifvr)
    with job.writing() as out:
        out.write_table("labels", pa.concat_tables([rules, pa.Table.from_pylist(told, schema=LABELS)]))
        out.write_table("queue", queue := queue_table(skips))
        out.write_table("failures", failures(s.failed for s in skips if s.failed))
        out.info = _report(skips, rules, queue, unknown)
        out.info["skips_left_out"] = _count_skips(ifvr) - len(skips)
        out.info["truth"] = _score(skips, truth)
        out.summary = f"{out.tables['labels'].rows:,} labels, {queue.num_rows:,} skips for people to decide"
    for note in out.info["notes"]:
        say(f"         note: {note}")
    return out.summary


def _find_reasons(skips: list[Skip], teachers: TeacherSettings, truth: Mapping[str, str], ask: Ask) -> None:
    """Gives the skips their reasons: the true causes where they are given, else the teacher's."""
    if not truth and teachers.author == "annotator":
        label(skips, ask, teachers)
        return
    for skip in skips:
        rationale, option = script.skip_cause(skip.case)
        if truth:
            rationale, option = "", Option(truth[skip.case.target.interaction_id])
        skip.attempts.append(Attempt(option.value, rationale, valid=True))
        skip.author = TRUE if truth else script.SCRIPT


def requests(run: Run, teachers: TeacherSettings, seed: int) -> list[LLMRequest]:
    """The labels of the first round, for an estimate. A skip costs two calls per round: a label and a verdict on it."""
    if teachers.author == "script" or (teachers.truth and true_causes(run)):
        return []
    skips = open_skips(IFVR(run), teachers, seed, tastes=teachers.profiles and run.has(PROFILES))
    return [label_request(s, teachers) for s in skips]


def open_skips(ifvr: IFVR, settings: TeacherSettings, seed: int, *, tastes: bool = False) -> list[Skip]:
    """The fast skips that get a reason, train then test."""
    cases = []
    for number, (split, count) in enumerate([(Split.TRAIN, settings.train_skips), (Split.TEST, settings.test_skips)]):
        rows = draw(fast_skips(ifvr.targets(Task.SEQUENTIAL, [split])), count, [seed, 21, number])
        cases += load_cases(ifvr, rows, settings.history_items, tastes=tastes)
    return [Skip(case) for case in cases]


def label(skips: Collection[Skip], ask: Ask, settings: TeacherSettings) -> None:
    """The rounds of A.3, over all skips at once; each skip is left sound, failed, or with its last attempt invalid."""
    still_open = list(skips)
    for _ in range(settings.rounds):
        labelled = _label(still_open, ask, settings)
        still_open = _judge(labelled, ask, settings)


def label_request(skip: Skip, settings: TeacherSettings) -> LLMRequest:
    """Asks for the cause of a skip; shows what was said before and why it was found wanting."""
    prompt = fill("teachers/label", **_shown(skip, settings), attempts=skip.attempts)
    form = label_form(SKIP_CAUSES, settings.reason_chars)
    return _request(skip, f"label{len(skip.attempts) + 1}", prompt, form)


def verdict_request(skip: Skip, settings: TeacherSettings) -> LLMRequest:
    """Asks whether the last attempt is sound."""
    prompt = fill("teachers/judge", **_shown(skip, settings), attempt=skip.attempts[-1])
    return _request(skip, f"verdict{len(skip.attempts)}", prompt, verdict_form(settings.reason_chars))


def rule_labels(ifvr: IFVR) -> tuple[pa.Table, int]:
    """Labels that need no teacher, and the number of targets for which the log does not tell the outcome."""
    rows = [row for task in Task for row in _with_split(ifvr.targets(task))]
    known = [(r, split, option) for r, split in rows if (option := _by_rule(r)) is not None]
    unknown = sum(_unknown(r) for r, _ in rows)
    told = [{**_ids(r, split), "option": option.value, "rounds": 0} for r, split, option in known]
    return pa.Table.from_pylist([{**t, "label_source": RULE, "verdicts": []} for t in told], schema=LABELS), unknown


def queue_table(skips: Iterable[Skip]) -> pa.Table:
    """The skips that need a person."""
    rows = [
        {
            **s.case.ids(),
            "play_rate": s.case.target.play_rate,
            "cause": s.failed.failure if s.failed else INVALID,
            "attempts": [asdict(a) for a in s.attempts],
        }
        for s in skips
        if not s.sound
    ]
    return pa.Table.from_pylist(rows, schema=QUEUE)


def _label(skips: list[Skip], ask: Ask, settings: TeacherSettings) -> list[Skip]:
    """Adds an attempt to each; returns those that got one."""
    answers = ask([label_request(s, settings) for s in skips])
    for skip, answer in zip(skips, answers, strict=True):
        if answer.ok:
            skip.attempts.append(Attempt(answer.value["option"], answer.value["rationale"]))
        else:
            skip.failed = answer
    return [s for s in skips if not s.failed]


def _judge(skips: list[Skip], ask: Ask, settings: TeacherSettings) -> list[Skip]:
    """Judges the last attempt of each; returns those that need another."""
    answers = ask([verdict_request(s, settings) for s in skips])
    for skip, answer in zip(skips, answers, strict=True):
        if answer.ok:
            skip.attempts[-1].valid = answer.value["valid"] == "yes"
            skip.attempts[-1].criticism = answer.value["criticism"]
        else:
            skip.failed = answer
    return [s for s in skips if not s.failed and not s.sound]


def _shown(skip: Skip, settings: TeacherSettings) -> dict[str, Any]:
    return {
        **skip.case.shown(settings.max_text),
        "played": f"{skip.case.target.play_rate:.0%}",
        "options": option_lines(Task.SEQUENTIAL, SKIP_CAUSES),
        "limit": settings.reason_chars,
        "words": words(settings.reason_chars),
    }


def _request(skip: Skip, step: str, prompt: str, form: dict[str, Any]) -> LLMRequest:
    key = skip.case.target.interaction_id
    return question(ROLE, f"{step}/{key}", prompt, schema=form, parser=PARSER, metadata={"item": key})


def _label_row(skip: Skip, attempt: Attempt) -> dict[str, Any]:
    return {
        **skip.case.ids(),
        "option": attempt.option,
        "rationale": attempt.rationale,
        "rounds": len(skip.attempts),
        "label_source": skip.source,
        "verdicts": [asdict(a) for a in skip.attempts],
    }


def _by_rule(row: Interaction) -> Option | None:
    if row.task == Task.CLICK:
        outcome = clicked(row)
        return None if outcome is None else Option.A if outcome else Option.B
    return Option.A if row.play_rate is not None and row.play_rate >= FAST_SKIP_BELOW else None


def _unknown(row: Interaction) -> bool:
    return clicked(row) is None if row.task == Task.CLICK else row.play_rate is None


def _with_split(table: pa.Table) -> Iterator[tuple[Interaction, str]]:
    return zip(Interaction.from_table(table), table["split"].to_pylist(), strict=True)


def _ids(row: Interaction, split: str) -> dict[str, str]:
    ids = {"interaction_id": row.interaction_id, "user_id": row.user_id, "video_id": row.video_id}
    return {**ids, "task": row.task, "split": split}


def _count_skips(ifvr: IFVR) -> int:
    return int(fast_skips(ifvr.targets(Task.SEQUENTIAL)).num_rows)


def _report(skips: list[Skip], rules: pa.Table, queue: pa.Table, unknown: int) -> dict[str, Any]:
    by_rule = Counter(zip(rules["task"].to_pylist(), rules["option"].to_pylist(), strict=True))
    notes = ["the annotator saw no pictures: a video is its title, length and tags"]
    if not skips:
        notes.append("there is no fast skip to explain: all labels are by rule")
    return {
        "skips": len(skips),
        "by_source": dict(sorted(Counter(s.source for s in skips if s.sound).items())),
        "by_option": dict(sorted(Counter(s.sound.option for s in skips if s.sound).items())),
        "by_rule": {f"{task}/{option}": n for (task, option), n in sorted(by_rule.items())},
        "outcome_unknown": unknown,
        "queue": by_cause(queue),
        "failures": by_cause(failures(s.failed for s in skips if s.failed)),
        "notes": notes,
    }


def _score(skips: Iterable[Skip], truth: dict[str, str]) -> dict[str, Any] | None:
    """The labels against the truth, all of them and by the round that brought them; None where there is no truth."""
    said: dict[str, dict[str, str]] = {}
    for skip in skips:
        if skip.sound:
            said.setdefault(skip.source, {})[skip.case.target.interaction_id] = skip.sound.option
    overall = score({k: o for labels in said.values() for k, o in labels.items()}, truth)
    if overall is None:
        return None
    rounds = {source: score(labels, truth) for source, labels in sorted(said.items())}
    return {**overall, "by_source": {s: {k: r[k] for k in ("judged", "accuracy")} for s, r in rounds.items() if r}}
