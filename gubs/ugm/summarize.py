"""Summarize (Eq. 1): users + number of groups k + mode M -> k groups with a name, features and a typical user each.

Where all users do not fit the summarizer's context, they are summarized in chunks and the chunks' groups are merged by
the same question, asked about groups in place of users; so the result is the same kind of thing at any scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gubs.errors import GubsError, InputError
from gubs.llm.calls import Answer, LLMRequest, estimate_tokens, question
from gubs.llm.client import LLMClient
from gubs.people import Person
from gubs.prompts import fill
from gubs.prompts.fields import record
from gubs.prompts.group_answers import Category, categories_regex, find_categories
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
    """The summarizer did not give k usable groups, not even after a re-ask and repairs."""

    exit_code = 7


@dataclass(frozen=True)
class Sketch:
    """A group before anyone was put into it: g = {T_g, name} and its typical user u_g."""

    name: str
    features: str
    typical: int
    """Index into the people."""


@dataclass(frozen=True)
class _Item:
    """A line of the prompt: a person, or a chunk's group with its typical person behind it."""

    line: str
    person: int
    sketch: Sketch | None = None


def summarize(
    llm: LLMClient, people: Sequence[Person], settings: UGMSettings, guided: bool
) -> tuple[list[Sketch], dict[str, Any]]:
    """Makes k groups.

    Args:
        llm: asks the role `summarizer`.
        people: the users to be grouped.
        settings: k, mode, context.
        guided: hold the endpoint to the form by a regex (small local models need it).

    Returns:
        Exactly `settings.groups` sketches with different typical users, and a report (calls, rounds, repairs).

    Raises:
        InputError: fewer users than groups. SummaryError: no usable answer.
    """
    k = settings.groups
    items = _items(people, settings)
    report: dict[str, Any] = {"calls": 0, "levels": 0, "repairs": []}
    while True:
        chunks = chunked(items, settings.context_tokens, k)
        report["levels"] += 1
        report["calls"] += len(chunks)
        requests = _requests(chunks, settings, guided, report["levels"])
        sketches = [
            s
            for chunk, answer in zip(chunks, llm.ask(requests), strict=True)
            for s in _sketches(chunk, answer, k, people, report)
        ]
        if len(chunks) == 1:
            return sketches, report
        items = [_Item(_group_line(s, people, settings), s.typical, s) for s in sketches]


def first_requests(people: Sequence[Person], settings: UGMSettings, guided: bool) -> list[LLMRequest]:
    """The first level's questions: what a dry run can know."""
    return _requests(chunked(_items(people, settings), settings.context_tokens, settings.groups), settings, guided, 1)


def _items(people: Sequence[Person], settings: UGMSettings) -> list[_Item]:
    if len(people) < settings.groups:
        raise InputError(
            f"{len(people)} users cannot make {settings.groups} groups: lower ugm.groups or raise splits.ugm_users"
        )
    return [_Item(p.profile(settings.max_text), i) for i, p in enumerate(people)]


def _requests(chunks: Sequence[Sequence[_Item]], settings: UGMSettings, guided: bool, level: int) -> list[LLMRequest]:
    total = sum(map(len, chunks))
    return [_request(c, settings.groups, settings, guided, f"{level}.{i}", total) for i, c in enumerate(chunks)]


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
    """A last chunk too small to make k groups of is spread over the others."""
    if len(chunks) > 1 and len(chunks[-1]) < 2 * k:
        for i, item in enumerate(chunks.pop()):
            chunks[i % len(chunks)].append(item)
    return chunks


def _request(chunk: Sequence[_Item], k: int, settings: UGMSettings, guided: bool, label: str, total: int) -> LLMRequest:
    noun = "users" if chunk[0].sketch is None else "small groups of users, each standing for its typical user"
    prompt = fill(
        "summarize",
        count=len(chunk),
        noun=noun,
        lines=[i.line for i in chunk],
        groups=k,
        criterion=CRITERIA[settings.mode],
    )
    return question(
        "summarizer",
        f"summarize/{label}",
        prompt,
        regex=categories_regex(k, len(chunk)) if guided else None,
        parser="gubs.prompts.group_answers:parse_categories",
        parser_args={"groups": k, "users": len(chunk)},
        metadata={"of": total},
    )


def _group_line(sketch: Sketch, people: Sequence[Person], settings: UGMSettings) -> str:
    typical = people[sketch.typical].user
    fields = {
        "group": sketch.name,
        "features": sketch.features,
        "typical tags": typical.tags,
        "typical age": typical.age,
    }
    return record(fields, settings.max_text)


def _sketches(
    chunk: Sequence[_Item], answer: Answer, k: int, people: Sequence[Person], report: dict[str, Any]
) -> list[Sketch]:
    categories: list[Category] = answer.value if answer.ok else find_categories(answer.text)[:k]
    if len(categories) < k:
        raise SummaryError(
            f"the summarizer gave no {k} groups, not even when asked again ({answer.failure}: {answer.error}). "
            f"Its answer began: {answer.text[:300]!r}. "
            "Try a stronger model for llm.roles.summarizer, or fewer ugm.groups"
        )
    return _with_different_typical(categories, chunk, people, report)


def _with_different_typical(
    categories: Sequence[Category], chunk: Sequence[_Item], people: Sequence[Person], report: dict[str, Any]
) -> list[Sketch]:
    """Repairs typical users that do not exist or stand twice: the user most similar to the group's words steps in."""
    taken: set[int] = set()
    sketches = []
    for c in categories:
        place = c.typical - 1
        if not 0 <= place < len(chunk) or chunk[place].person in taken:
            free = [i for i in chunk if i.person not in taken]
            best = nearest_to_text(f"{c.name} {c.features}", [people[i.person].user for i in free])
            person = free[best].person
            report["repairs"].append({"group": c.name, "said": c.typical, "taken": people[person].user.user_id})
        else:
            person = chunk[place].person
        taken.add(person)
        sketches.append(Sketch(c.name, c.features, person))
    return sketches
