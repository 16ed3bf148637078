"""Cases of the report: a user and a video with what the policy was shown, and its answers to changed prompts.

Nobody picks them: of each kind the first ones in the order in which the targets were drawn.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gubs.artifacts import Artifact
from gubs.errors import ArtifactError
from gubs.evaluate.breakdown import OPTION_WORDS
from gubs.evaluate.conditions import Condition
from gubs.prompts.answers import read_answer
from gubs.records import FAST_SKIP_BELOW, TASK_OPTIONS, Task
from gubs.report import pages
from gubs.ufm.questions import Questions
from gubs.ufm.settings import InputSettings

PER_KIND = {Task.SEQUENTIAL: 2, Task.CLICK: 1}
"""Cases of each kind."""
SHOWN = (Condition.OWN, Condition.SIMILAR, Condition.GROUP, Condition.NOBODY, Condition.NO_PICTURES)
"""Answers side by side."""
KINDS = {
    (True, True): "Right skip",
    (False, True): "Wrong skip",
    (True, False): "Missed skip",
    (False, False): "Right keep",
}
"""By what happened (skipped, not clicked) and what the own prompt's answer says; no readable answer keeps a video."""
_LONGEST = 1200
"""Characters of a profile or an answer."""

Row = dict[str, Any]


@dataclass(frozen=True)
class ConditionAnswer:
    """The answer under one condition."""

    condition: str
    option: str | None
    """With its meaning."""
    skip: float | None
    thought: str
    right: bool
    """It names the gold option; where that is not known, skip or not."""
    asked: bool = True


@dataclass(frozen=True)
class Case:
    """One user and one video."""

    kind: str
    task: str
    user: str
    video: str
    title: str
    gold: str
    happened: str
    frames: list[str]
    """Data URIs."""
    profile: str
    history: list[str]
    """Oldest view first."""
    group: str
    """Name and profile; empty: the user is in none, or the run has none."""
    similar: str
    """Profile of the similar user; empty: there is none."""
    answers: list[ConditionAnswer]


def cases(sensitivity: Artifact) -> list[Case]:
    """The cases of the stage `sensitivity`."""
    run, settings = sensitivity.run, sensitivity.manifest.settings["ufm"]["inputs"]
    inputs = {name: settings[name] for name in InputSettings.model_fields if name in settings}
    questions = Questions(run, InputSettings(**inputs))
    rows = sensitivity.table("answers").to_pylist()
    answers: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        answers.setdefault((row["task"], row["interaction_id"]), {})[row["condition"]] = row
    return [_case(kind, asked, questions) for kind, asked in _chosen(list(answers.values()))]


def _chosen(targets: Sequence[dict[str, Row]]) -> Iterator[tuple[str, dict[str, Row]]]:
    for task, most in PER_KIND.items():
        for kind in KINDS.values():
            of_kind = (t for t in targets if t[Condition.OWN]["task"] == task and _kind(t[Condition.OWN]) == kind)
            yield from ((kind, target) for target, _ in zip(of_kind, range(most), strict=False))


def _kind(own: Row) -> str:
    return KINDS[_skipped(own), own["predicted"] not in (None, "A")]


def _skipped(row: Row) -> bool:
    """What happened: a fast skip, or no click."""
    if row["task"] == Task.CLICK:
        return not row["clicked"]
    return bool(row["gold"] != "A" if row["gold"] else row["play_rate"] < FAST_SKIP_BELOW)


def _case(kind: str, asked: dict[str, Row], questions: Questions) -> Case:
    own, inputs = asked[Condition.OWN], questions.inputs
    task, words = Task(own["task"]), OPTION_WORDS[Task(own["task"])]
    people, video = questions.people(task), questions.ifvr.videos[own["video_id"]]
    person = people[own["user_id"]].latest(inputs.history_items)
    similar, group = (asked.get(c, {}).get("shown") for c in (Condition.SIMILAR, Condition.GROUP))
    profile = questions.groups.get(group) if group else None
    return Case(
        kind=kind,
        task=task,
        user=own["user_id"],
        video=own["video_id"],
        title=video.title or ", ".join(video.tags) or own["video_id"],
        gold=f"{own['gold']}: {words[own['gold']]}" if own["gold"] else "skip, for a reason that is not known",
        happened=_happened(own),
        frames=_frames(questions, task, own["video_id"]),
        profile=_in_words(person.profile(inputs.max_text)),
        history=[_in_words(view) for view in person.views(inputs.max_text)],
        group=f"{profile.name}\n{profile.text}"[:_LONGEST] if profile else "",
        similar=_in_words(people[similar].profile(inputs.max_text)) if similar else "",
        answers=[_answer(c, asked.get(c), task) for c in SHOWN],
    )


def _happened(own: Row) -> str:
    if own["task"] == Task.CLICK:
        return "clicked" if own["clicked"] else "not clicked"
    return "skipped" if own["play_rate"] is None else f"played {own['play_rate']:.0%}"


def _frames(questions: Questions, task: Task, video_id: str) -> list[str]:
    try:
        clip = questions.clip(task, video_id)
    except ArtifactError:  # a frame store elsewhere, or cleared since: a case is worth showing without pictures
        return []
    return [pages.picture(jpeg) for jpeg in clip.jpegs()] if clip else []


def _answer(condition: Condition, row: Row | None, task: Task) -> ConditionAnswer:
    if row is None:
        return ConditionAnswer(condition, None, None, "", right=False, asked=False)
    option, text = row["predicted"], row["answer"]
    gold = row["gold"] or ("B" if _skipped(row) else "A")
    right = option == gold if row["gold"] else (option not in (None, "A")) == _skipped(row)
    thought = read_answer(text, TASK_OPTIONS[task]).think or text if text else "The prompt was too long."
    named = f"{option}: {OPTION_WORDS[task][option]}" if option else None
    return ConditionAnswer(condition, named, row["skip"], thought[:_LONGEST], right)


def _in_words(line: str) -> str:
    """A line of JSON, as prompts show people and views, as a person would write it."""
    return "; ".join(
        f"{'' if name == 'title' else f'{name} '}{', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in json.loads(line).items()
    )
