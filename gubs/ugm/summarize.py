"""Summarize (Eq. 1): users + number of groups k + mode M -> k groups, each with a name, features and a typical user.

If not all users fit the summarizer's context, they are summarized in chunks. The chunks' groups are then merged by the
same question, asked about groups instead of users, so the result has the same form at any scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gubs.artifacts import JsonObject
from gubs.errors import GubsError, InputError
from gubs.llm.calls import Answer, LLMRequest, estimate_tokens, question
from gubs.llm.client import LLMClient
from gubs.llm.contract import UNANSWERED, require
from gubs.prompts import fill
from gubs.prompts.fields import record
from gubs.prompts.group_answers import Category, categories_regex, find_categories
from gubs.prompts.people import Person
from gubs.ugm.cluster import nearest_to_text
from gubs.ugm.settings import UGMSettings

CRITERIA = {
    "interest": "what videos they like",
    "demographics": "age, gender, occupation and the other facts about the person",
    "both": "what videos they like together with age, gender, occupation and the other facts about the person",
}
_FRAME_TOKENS = 400
"""The prompt around the lines."""


class SummaryError(GubsError):
    """The summarizer did not give k usable groups, even after a re-ask and repairs."""

    exit_code = 7


@dataclass(frozen=True)
class Sketch:
    """A group before it has members: g = {T_g, name} and its typical user u_g."""

    name: str
    features: str
    typical: int
    """Index into the people."""


@dataclass(frozen=True)
class _Item:
    """A line of the prompt: a person, or a chunk's group with its typical person."""

    line: str
    person: int
    is_group: bool = False


def summarize(llm: LLMClient, people: Sequence[Person], settings: UGMSettings) -> tuple[list[Sketch], JsonObject]:
    """Makes k groups.

    Args:
        llm: asks the role `summarizer`.
        people: the users to be grouped.
        settings: k, mode, context.

    Returns:
        Exactly `settings.groups` sketches with different typical users, and a report (calls, levels, repairs).

    Raises:
        InputError: fewer users than groups, or the context is too small. SummaryError: no usable answer.
        IncompleteError: no answer at all.
    """
    guided = llm.settings.guided("summarizer")
    items = _items(people, settings)
    report: JsonObject = {"calls": 0, "levels": 0, "repairs": []}
    while True:
        chunks = chunked(items, settings.context_tokens, settings.groups)
        report["levels"] += 1
        report["calls"] += len(chunks)
        answers = llm.ask(_requests(chunks, settings, guided, report["levels"]))
        require([a for a in answers if a.failure in UNANSWERED], llm.settings.contract)
        sketches = []
        for chunk, answer in zip(chunks, answers, strict=True):
            sketches += _sketches(chunk, _categories(answer, settings.groups), people, report)
        if len(chunks) == 1:
            return sketches, report
        items = [_Item(_group_line(s, people, settings), s.typical, is_group=True) for s in sketches]


def first_requests(people: Sequence[Person], settings: UGMSettings, *, guided: bool) -> list[LLMRequest]:
    """The questions of the first level, which a dry run can know."""
    return _requests(chunked(_items(people, settings), settings.context_tokens, settings.groups), settings, guided, 1)


def _items(people: Sequence[Person], settings: UGMSettings) -> list[_Item]:
    if len(people) < settings.groups:
        raise InputError(
            f"{len(people)} users cannot make {settings.groups} groups: lower ugm.groups or raise splits.ugm_users"
        )
    return [_Item(p.profile(settings.max_text), i) for i, p in enumerate(people)]


def chunked(items: Sequence[_Item], context_tokens: int, k: int) -> list[list[_Item]]:
    """Splits the lines into as few chunks of equal size as fit the context; every chunk has more lines than k.

    Raises:
        InputError: a chunk of 2 k lines, the smallest that makes progress, does not fit.
    """
    room = context_tokens - _FRAME_TOKENS
    costs = [estimate_tokens(i.line) + 6 for i in items]
    count = max(1, math.ceil(sum(costs) / max(room, 1)))
    while True:
        size = math.ceil(len(items) / count)
        starts = range(0, len(items), size)
        if all(sum(costs[s : s + size]) <= room for s in starts):
            return _even([list(items[s : s + size]) for s in starts], k)
        if size <= 2 * k:
            raise InputError(
                f"ugm.context_tokens={context_tokens} has no room for {2 * k} users in one prompt: "
                "raise it (and the endpoint's context), or lower ugm.groups or ugm.max_text"
            )
        count += 1


def _even(chunks: list[list[_Item]], k: int) -> list[list[_Item]]:
    """Spreads a last chunk that is too small for k groups over the others."""
    if len(chunks) > 1 and len(chunks[-1]) < 2 * k:
        for i, item in enumerate(chunks.pop()):
            chunks[i % len(chunks)].append(item)
    return chunks


def _requests(chunks: Sequence[Sequence[_Item]], settings: UGMSettings, guided: bool, level: int) -> list[LLMRequest]:
    k, total = settings.groups, sum(map(len, chunks))
    noun = "small groups of users, each standing for its typical user" if chunks[0][0].is_group else "users"
    return [
        question(
            "summarizer",
            f"summarize/{level}.{i}",
            fill(
                "ugm/summarize",
                count=len(chunk),
                noun=noun,
                lines=[item.line for item in chunk],
                groups=k,
                criterion=CRITERIA[settings.mode],
            ),
            regex=categories_regex(k, len(chunk)) if guided else None,
            parser="gubs.prompts.group_answers:parse_categories",
            salvage="gubs.prompts.group_answers:salvage_categories",
            parser_args={"groups": k, "users": len(chunk)},
            metadata={"of": total},
        )
        for i, chunk in enumerate(chunks)
    ]


def _group_line(sketch: Sketch, people: Sequence[Person], settings: UGMSettings) -> str:
    typical = people[sketch.typical].with_tags
    group = {"group": sketch.name, "features": sketch.features}
    return record({**group, "typical tags": typical.tags, "typical age": typical.age}, settings.max_text)


def _categories(answer: Answer, k: int) -> list[Category]:
    categories: list[Category] = answer.value if answer.ok else find_categories(answer.text)[:k]
    if len(categories) < k:
        raise SummaryError(
            f"the summarizer did not give {k} groups, even when asked again ({answer.failure}: {answer.error}). "
            f"Its answer began: {answer.text[:300]!r}. "
            "Try a stronger model for llm.roles.summarizer, or fewer ugm.groups"
        )
    return categories


def _sketches(
    chunk: Sequence[_Item], categories: Sequence[Category], people: Sequence[Person], report: JsonObject
) -> list[Sketch]:
    """Replaces typical users that do not exist or occur twice by the free user most similar to the group's words."""
    taken: set[int] = set()
    sketches = []
    for c in categories:
        index = c.typical - 1
        if 0 <= index < len(chunk) and chunk[index].person not in taken:
            person = chunk[index].person
        else:
            free = [i.person for i in chunk if i.person not in taken]
            person = free[nearest_to_text(f"{c.name} {c.features}", [people[i].with_tags for i in free])]
            report["repairs"].append({"group": c.name, "said": c.typical, "taken": people[person].user.user_id})
        taken.add(person)
        sketches.append(Sketch(c.name, c.features, person))
    return sketches
