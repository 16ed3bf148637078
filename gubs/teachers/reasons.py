"""Reasons of skips (A.3): the annotator labels, judges its own rationale, and labels again, up to three rounds.

Every fast skip among the targets gets a cause (B, C, D) with a rationale. The annotator then judges whether its
rationale is sound; if not, it labels again, given the criticism. A skip without a sound rationale after the last round,
or without a usable answer, goes to the queue for people. Targets that were not skipped are A by rule, and click targets
are labelled by the log. The tables labels and queue hold every target whose outcome is known, except skips beyond a
limit.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from gubs.artifacts import JsonObject, Run, StageJob
from gubs.console import say
from gubs.data.ifvr import IFVR, PROFILES, fast_skips
from gubs.llm.calls import Answer, LLMRequest
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.options import SKIP_CAUSES, option_lines
from gubs.records import FAST_SKIP_BELOW, Interaction, Option, Split, Task
from gubs.simulator.behaviour import UNMEANT as UNMEANT_MECHANISMS
from gubs.teachers import script
from gubs.teachers.annotator import Ask, annotator, by_cause, failures, in_words, request_about
from gubs.teachers.cases import Case, clicked, draw, load_cases, target_ids, with_split
from gubs.teachers.forms import label_form, verdict_form, words
from gubs.teachers.score import score, true_causes, true_mechanisms
from gubs.teachers.settings import TeacherSettings

STAGE = "labels"
RULE = "rule"
TRUE, NAIVE = "truth", "naive"
"""`label_source` of true causes, which only simulated sources know, and of what the fields of a skip suggest that
nobody meant (`teachers.train_labels=naive`)."""
UNMEANT = "unmeant"
"""`label_source` of a target that is not judged, since nobody meant how it ended (`teachers.test_labels=meant`)."""
INVALID = "invalid"
"""Why an item is in the queue: the annotator found none of its own rationales sound."""

_ATTEMPTS = pa.list_(
    pa.struct([("option", pa.string()), ("rationale", pa.string()), ("valid", pa.bool_()), ("criticism", pa.string())])
)
IDS = [
    pa.field("interaction_id", pa.string(), nullable=False),
    pa.field("user_id", pa.string(), nullable=False),
    pa.field("video_id", pa.string(), nullable=False),
    pa.field("task", pa.string(), nullable=False),
    pa.field("split", pa.string(), nullable=False),
]
"""The columns that identify the target of a row."""

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
"""One row per labelled target. label_source: rule, teacher-1 ... teacher-3 (the round), script, guess (see
teachers/script.py), truth, naive, unmeant, human. rounds: 0 for rule."""

QUEUE = pa.schema([*IDS, ("play_rate", pa.float64()), pa.field("cause", pa.string(), nullable=False)]).append(
    pa.field("attempts", _ATTEMPTS)
)
"""What a person has to label. cause: `invalid`, or why the last answer could not be used."""


@dataclass
class Attempt:
    """One round: the label and the verdict on it (valid is None before the verdict, or if that call failed)."""

    option: str
    rationale: str
    valid: bool | None = None
    criticism: str | None = None


@dataclass
class Skip:
    """A fast skip that is to get a reason."""

    case: Case
    attempts: list[Attempt] = field(default_factory=list)
    failed: Answer | None = None
    author: str = ""
    """Who gave the reason, if not the annotator."""

    @property
    def source(self) -> str:
        """The author of the label: `label_source` of `LABELS`."""
        return self.author or f"teacher-{len(self.attempts)}"

    @property
    def sound(self) -> Attempt | None:
        """The attempt that was found sound."""
        return self.attempts[-1] if self.attempts and self.attempts[-1].valid else None


def make(job: StageJob, teachers: TeacherSettings, llm: LLMSettings, seed: int) -> str:
    """Labels every target whose outcome is known (tables labels, queue, failures).

    On simulated sources the artifact's info says how many labels are true.

    Errors: see `LLMClient.stream`; the journal keeps the answers received so far.
    """
    ifvr, truth = IFVR(job.run), true_causes(job.run)
    skips = open_skips(ifvr, teachers, seed, tastes=job.reads(PROFILES))
    with annotator(job.run, llm) as opened:
        _find_reasons(skips, teachers, SimulatedCauses(truth, true_mechanisms(job.run)), opened.ask)
    rows = [_label_row(s, s.sound) for s in skips if s.sound]
    rules, unknown = rule_labels(ifvr, meant_only=teachers.test_labels == "meant")
    with job.writing() as out:
        out.write_table("labels", pa.concat_tables([rules, pa.Table.from_pylist(rows, schema=LABELS)]))
        out.write_table("queue", queue := queue_table(skips))
        out.write_table("failures", failed := failures(s.failed for s in skips if s.failed))
        out.info = _report(skips, rules, queue, unknown)
        out.info["skips_left_out"] = fast_skips(ifvr.targets(Task.SEQUENTIAL)).num_rows - len(skips)
        out.info["truth"] = _score(skips, truth)
        out.summary = (
            f"{out.tables['labels'].rows:,} labels, {queue.num_rows:,} skips for people to decide, {in_words(failed)}"
        )
    for note in out.info["notes"]:
        say(f"         note: {note}")
    return out.summary


@dataclass(frozen=True)
class SimulatedCauses:
    """What the simulation knows about skips, by interaction id; both empty for other sources."""

    causes: Mapping[str, str]
    mechanisms: Mapping[str, str]

    def label(self, skip: Skip, way: str) -> tuple[Option, str] | None:
        """Option and `label_source` of a skip; None if the teacher is to find them.

        Args:
            skip: the skip.
            way: `teachers.train_labels` or `teachers.test_labels`.
        """
        item = skip.case.target.interaction_id
        if way == "teacher" or not self.causes:
            return None
        if way == TRUE or self.mechanisms[item] not in UNMEANT_MECHANISMS:
            return Option(self.causes[item]), TRUE
        if way == NAIVE:
            return script.skip_cause(skip.case)[1], NAIVE
        return Option(self.causes[item]), UNMEANT


def _find_reasons(skips: list[Skip], teachers: TeacherSettings, truth: SimulatedCauses, ask: Ask) -> None:
    """Gives the skips their reasons: those that the simulation knows, if they are wanted, else the teacher's."""
    ways = {str(Split.TRAIN): teachers.train_labels, str(Split.TEST): teachers.test_labels}
    unlabelled = []
    for skip in skips:
        if true_label := truth.label(skip, ways[skip.case.split]):
            option, skip.author = true_label
            skip.attempts.append(Attempt(option.value, "", valid=True))
        else:
            unlabelled.append(skip)
    if teachers.author == "annotator":
        label(unlabelled, ask, teachers)
        return
    for skip in unlabelled:
        rationale, option, skip.author = script.skip_cause(skip.case)
        skip.attempts.append(Attempt(option.value, rationale, valid=True))


def requests(run: Run, teachers: TeacherSettings, seed: int) -> list[LLMRequest]:
    """The labels of the first round and the verdicts on them, for an estimate; rationales that are found wanting cost
    two further calls each time.
    """
    if teachers.author == "script":
        return []
    skips = open_skips(IFVR(run), teachers, seed, tastes=teachers.profiles and run.has(PROFILES))
    if true_causes(run):
        asked = {str(Split.TRAIN): teachers.train_labels, str(Split.TEST): teachers.test_labels}
        skips = [s for s in skips if asked[s.case.split] == "teacher"]
    labels = [label_request(s, teachers) for s in skips]
    foreseen = Attempt(SKIP_CAUSES[0].value, "x" * teachers.reason_chars)
    return labels + [verdict_request(Skip(s.case, [foreseen]), teachers) for s in skips]


def open_skips(ifvr: IFVR, settings: TeacherSettings, seed: int, *, tastes: bool = False) -> list[Skip]:
    """The fast skips that get a reason, training users first."""
    cases = []
    for number, (split, count) in enumerate([(Split.TRAIN, settings.train_skips), (Split.TEST, settings.test_skips)]):
        rows = draw(fast_skips(ifvr.targets(Task.SEQUENTIAL, [split])), count, [seed, 21, number])
        cases += load_cases(ifvr, rows, settings.history_items, tastes=tastes)
    return [Skip(case) for case in cases]


def label(skips: Collection[Skip], ask: Ask, settings: TeacherSettings) -> None:
    """The rounds of A.3, over all skips at once; each skip ends up sound, failed, or with an invalid last attempt."""
    still_open = list(skips)
    for _ in range(settings.rounds):
        labelled = _label(still_open, ask, settings)
        still_open = _judge(labelled, ask, settings)


def label_request(skip: Skip, settings: TeacherSettings) -> LLMRequest:
    """Asks for the cause of a skip; shows the earlier attempts and their criticism."""
    prompt = fill("teachers/label", **_prompt_fields(skip, settings), attempts=skip.attempts)
    form = label_form(SKIP_CAUSES, settings.reason_chars)
    return request_about(skip.case.target.interaction_id, f"label{len(skip.attempts) + 1}", prompt, form)


def verdict_request(skip: Skip, settings: TeacherSettings) -> LLMRequest:
    """Asks whether the last attempt is sound."""
    prompt = fill("teachers/judge", **_prompt_fields(skip, settings), attempt=skip.attempts[-1])
    form = verdict_form(settings.reason_chars)
    return request_about(skip.case.target.interaction_id, f"verdict{len(skip.attempts)}", prompt, form)


def rule_labels(ifvr: IFVR, *, meant_only: bool = False) -> tuple[pa.Table, int]:
    """Labels that need no teacher, and the number of targets whose outcome the log does not have; with `meant_only`,
    test users' views that ended as they left the app are marked.
    """
    targets = [pair for task in Task for pair in with_split(ifvr.targets(task))]

    def source(target: Interaction, split: str) -> str:
        return UNMEANT if meant_only and split == Split.TEST and target.exited_app else RULE

    common = {"rounds": 0, "verdicts": []}
    rows = [
        {**target_ids(target, split), "option": option.value, "label_source": source(target, split), **common}
        for target, split in targets
        if (option := _by_rule(target)) is not None
    ]
    return pa.Table.from_pylist(rows, schema=LABELS), sum(_unknown(target) for target, _ in targets)


def queue_table(skips: Iterable[Skip]) -> pa.Table:
    """The skips that a person has to label."""
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
    """Adds an attempt to each skip; returns those that got one."""
    answers = ask([label_request(s, settings) for s in skips])
    for skip, answer in zip(skips, answers, strict=True):
        if answer.ok:
            skip.attempts.append(Attempt(answer.value["option"], answer.value["rationale"]))
        else:
            skip.failed = answer
    return [s for s in skips if not s.failed]


def _judge(skips: list[Skip], ask: Ask, settings: TeacherSettings) -> list[Skip]:
    """Judges the last attempt of each skip; returns those that need another."""
    answers = ask([verdict_request(s, settings) for s in skips])
    for skip, answer in zip(skips, answers, strict=True):
        if answer.ok:
            skip.attempts[-1].valid = answer.value["valid"] == "yes"
            skip.attempts[-1].criticism = answer.value["criticism"]
        else:
            skip.failed = answer
    return [s for s in skips if not s.failed and not s.sound]


def _prompt_fields(skip: Skip, settings: TeacherSettings) -> dict[str, object]:
    return {
        **skip.case.prompt_fields(settings.max_text),
        "played": f"{skip.case.target.play_rate:.0%}",
        "options": option_lines(Task.SEQUENTIAL, SKIP_CAUSES),
        "limit": settings.reason_chars,
        "words": words(settings.reason_chars),
    }


def _label_row(skip: Skip, attempt: Attempt) -> JsonObject:
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


def _report(skips: list[Skip], rules: pa.Table, queue: pa.Table, unknown: int) -> JsonObject:
    by_rule = Counter(zip(rules["task"].to_pylist(), rules["option"].to_pylist(), strict=True))
    notes = ["the annotator saw no pictures, only titles, lengths and tags of videos"]
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


def _score(skips: Iterable[Skip], truth: dict[str, str]) -> JsonObject | None:
    """The labels against the truth, overall and by source; None without a truth."""
    by_source: dict[str, dict[str, str]] = {}
    for skip in skips:
        if skip.sound:
            by_source.setdefault(skip.source, {})[skip.case.target.interaction_id] = skip.sound.option
    overall = score({item: option for labels in by_source.values() for item, option in labels.items()}, truth)
    if overall is None:
        return None
    scores = {source: score(labels, truth) for source, labels in sorted(by_source.items())}
    return {**overall, "by_source": {s: {k: r[k] for k in ("judged", "accuracy")} for s, r in scores.items() if r}}
