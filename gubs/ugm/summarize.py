"""Summarize (Eq. 1): users + number of groups k + mode M -> k groups, each with a name, features and a typical user.

If not all users fit the summarizer's context, they are summarized in chunks. The chunks' groups are then merged by the
same question, asked about groups instead of users, so the result has the same form at any scale.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from gubs.artifacts import JsonObject
from gubs.errors import GubsError, InputError
from gubs.llm.calls import Answer, LLMRequest, estimate_tokens, question
from gubs.llm.contract import NOT_TAKEN, UNANSWERED
from gubs.prompts import fill
from gubs.prompts.fields import plain, record
from gubs.prompts.group_answers import (
    AnswerError,
    Category,
    categories_regex,
    find_categories,
    parse_categories,
)
from gubs.prompts.people import Person
from gubs.ugm.asking import Check, Interview
from gubs.ugm.checks import fault_of
from gubs.ugm.cluster import TfidfEncoder, nearest_to_text
from gubs.ugm.evidence import person_items
from gubs.ugm.settings import Author, Mode, UGMSettings

CRITERIA = {
    "interest": "what videos they like",
    "demographics": "age, gender, occupation and the other facts about the person",
    "both": "what videos they like together with age, gender, occupation and the other facts about the person",
}
_FRAME_TOKENS = 400
"""The prompt around the lines."""
MOST_CHOICES, MOST_CHARS = 24, 40
"""Tags that a small model chooses from, and the longest of them in characters."""


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
    author: str = "llm"
    """`llm`; or `evidence`: made up around the typical user."""


@dataclass(frozen=True)
class _Item:
    """A line of the prompt: a person, or a chunk's group with its typical person."""

    line: str
    person: int
    is_group: bool = False


def summarize(
    interview: Interview, people: Sequence[Person], settings: UGMSettings, author: Author = "llm", overview: str = ""
) -> tuple[list[Sketch], JsonObject]:
    """Makes k groups.

    Args:
        interview: asks the role `summarizer`.
        people: the users to be grouped.
        settings: k, mode, context.
        author: with `both`, groups that the summarizer does not give are made up around free users; what is wrong with
            them is corrected later, by the evidence.
        overview: what is known of all users, as a block of lines; empty = the prompt has none.

    Returns:
        Exactly `settings.groups` sketches with different names and typical users, and a report (calls, levels,
        repairs).

    Raises:
        InputError: fewer users than groups, or the context is too small. SummaryError: no usable answer (not with
            `both`). IncompleteError: the endpoint gave none. What stops the client: see `LLMClient.stream`.
    """
    guided, names = interview.settings.guided("summarizer"), _choices(people, author)
    items = _items(people, settings)
    report: JsonObject = {"calls": 0, "levels": 0, "repairs": []}
    while True:
        chunks = chunked(items, settings.context_tokens - estimate_tokens(overview), settings.groups)
        report["levels"] += 1
        report["calls"] += len(chunks)
        requests = _requests(chunks, settings, guided, report["levels"], names, overview)
        sketches: list[Sketch] = []
        for chunk, categories in zip(chunks, _ask(interview, requests, chunks, settings.groups, author), strict=True):
            sketches += _sketches(chunk, categories, people, settings.groups, report)
        if len(chunks) == 1:
            return _different_names(sketches, people, report), report
        items = [_Item(_group_line(s, people, settings), s.typical, is_group=True) for s in sketches]


def first_requests(
    people: Sequence[Person], settings: UGMSettings, author: Author = "llm", overview: str = "", *, guided: bool
) -> list[LLMRequest]:
    """The questions of the first level, which a dry run can know."""
    names = _choices(people, author)
    chunks = chunked(_items(people, settings), settings.context_tokens - estimate_tokens(overview), settings.groups)
    return _requests(chunks, settings, guided, 1, names, overview)


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


def _requests(
    chunks: Sequence[Sequence[_Item]],
    settings: UGMSettings,
    guided: bool,
    level: int,
    names: Sequence[str],
    overview: str,
) -> list[LLMRequest]:
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
                overview=overview,
                groups=k,
                criterion=CRITERIA[settings.mode],
            ),
            regex=categories_regex(k, len(chunk), names) if guided else None,
            metadata={"of": total},
        )
        for i, chunk in enumerate(chunks)
    ]


def _ask(
    interview: Interview, requests: Sequence[LLMRequest], chunks: Sequence[Sequence[_Item]], k: int, author: Author
) -> list[list[Category]]:
    """The groups of each chunk. Faults that a re-ask leaves are repaired later, too few groups are not; with `both`,
    the missing ones are made up, even if all are.
    """
    least = 1 if author == "both" else k

    def too_few(_: int, text: str) -> str:
        n = len(find_categories(text))
        return f"{n} complete ones" if n < least else ""

    check = Check(lambda i, text: _faults(text, k, len(chunks[i])), too_few)
    answers = interview.ask_checked(requests, check, count=False)
    missing = [] if author == "both" else [a for a in answers if not a.ok]
    # What the model wrote says more than the contract's causes; what the endpoint did not give is the contract's.
    if missing and not any(a.failure in UNANSWERED | NOT_TAKEN for a in missing):
        raise _no_groups(missing[0], k)
    interview.contract.check(answers)
    if missing:
        raise _no_groups(missing[0], k)
    return [find_categories(a.text) if a.ok else [] for a in answers]


def _no_groups(answer: Answer, k: int) -> SummaryError:
    return SummaryError(
        f"the summarizer did not give {k} groups, even when asked again ({answer.failure}: {answer.error}). "
        f"Its answer began: {answer.text[:300]!r}. The next run asks again. "
        "Try a stronger model for llm.roles.summarizer, fewer ugm.groups, or ugm.author=both"
    )


def _faults(text: str, k: int, users: int) -> list[str]:
    """What is wrong with the summarizer's answer; each goes back to the model."""
    try:
        categories = parse_categories(text, k, users)
    except AnswerError as e:
        return [str(e)]
    return [f'the name "{c.name}" cannot be used: {fault}' for c in categories if (fault := fault_of(c.name))] + [
        f'two groups are called "{name}"' for name, n in Counter(c.name.casefold() for c in categories).items() if n > 1
    ]


def _choices(people: Sequence[Person], author: Author) -> list[str]:
    """The commonest tags: what a small model may name groups by. Empty: it is free, or there are none."""
    if author != "both":
        return []
    counts = Counter(plain(t, MOST_CHARS) for p in people for t in p.tags)
    return [t for t, _ in counts.most_common(MOST_CHOICES) if t and "…" not in t]


def _group_line(sketch: Sketch, people: Sequence[Person], settings: UGMSettings) -> str:
    """A chunk's group for the next level: its name, features, and of its typical user what groups are made by."""
    typical = people[sketch.typical].with_tags
    person = {"age": typical.age, "gender": typical.gender, "occupation": typical.occupation, **typical.other}
    by: dict[Mode, dict[str, object]] = {
        "interest": {"typical tags": typical.tags},
        "demographics": {f"typical {name}": value for name, value in person.items()},
    }
    by["both"] = by["interest"] | by["demographics"]
    return record({"group": sketch.name, "features": sketch.features} | by[settings.mode], settings.max_text)


def _sketches(
    chunk: Sequence[_Item], categories: Sequence[Category], people: Sequence[Person], k: int, report: JsonObject
) -> list[Sketch]:
    """As many sketches as groups, with different typical users; all that had to be repaired is reported."""
    taken: set[int] = set()
    sketches = []
    for c in categories:
        index = c.typical - 1
        if 0 <= index < len(chunk) and chunk[index].person not in taken:
            person = chunk[index].person
        else:
            free = [i.person for i in chunk if i.person not in taken]
            if not free:
                report["repairs"].append({"group": c.name, "dropped": "no user is left for it"})
                continue
            person = free[nearest_to_text(f"{c.name} {c.features}", [people[i].with_tags for i in free])]
            report["repairs"].append({"group": c.name, "said": c.typical, "taken": people[person].user.user_id})
        taken.add(person)
        sketches.append(Sketch(c.name, c.features, person))
    sketches = _merged(sketches, people, k, report)
    free = [i.person for i in chunk if i.person not in taken]
    for person in free[:: max(1, len(free) // max(1, k - len(sketches)))][: k - len(sketches)]:
        sketches.append(around(person, people))
        report["repairs"].append({"group": sketches[-1].name, "added": people[person].user.user_id})
    return sketches


def _merged(sketches: list[Sketch], people: Sequence[Person], k: int, report: JsonObject) -> list[Sketch]:
    """Merges the two groups whose typical users are most alike until k are left; the earlier one stays."""
    if len(sketches) <= k:
        return sketches
    encoder = TfidfEncoder("both")
    users = [people[s.typical].with_tags for s in sketches]
    encoder.fit(users)
    vectors = encoder.encode(users)
    similarity = np.triu((vectors @ vectors.T).toarray(), 1)
    kept = list(range(len(sketches)))
    while len(kept) > k:
        pairs = [(similarity[i, j], -j, -i) for i, j in itertools.combinations(kept, 2)]
        _, j, i = max(pairs)
        into, gone = sketches[-i], sketches[-j]
        sketches[-i] = dataclasses.replace(into, features=f"{into.features}; {gone.features}")
        kept.remove(-j)
        report["repairs"].append({"group": gone.name, "merged_into": into.name})
    return [sketches[i] for i in kept]


def _different_names(sketches: Sequence[Sketch], people: Sequence[Person], report: JsonObject) -> list[Sketch]:
    """Groups with the name of an earlier one are named after their typical user."""
    different: list[Sketch] = []
    for sketch in sketches:
        names = {s.name.casefold() for s in different}
        if sketch.name.casefold() in names:
            new = around(sketch.typical, people, names)
            report["repairs"].append({"group": sketch.name, "renamed": new.name})
            sketch = dataclasses.replace(sketch, name=new.name, author="evidence")
        different.append(sketch)
    return different


def around(person: int, people: Sequence[Person], taken: Container[str] = ()) -> Sketch:
    """A group around a typical user, named by that user's interests and facts; `taken`: other names, case-folded."""
    user = people[person].with_tags
    tags, facts = list(user.tags), list(person_items(user).values())
    names = [f"Like {user.user_id}"]
    if tags:
        names = [f"Fans of {', '.join(tags[:n])}" for n in range(min(2, len(tags)), len(tags) + 1)]
        names += [f"{names[-1]} ({', '.join(facts)})", f"{names[-1]} (like {user.user_id})"]
    name = next((n for n in names if n.casefold() not in taken), names[-1])
    return Sketch(name, ", ".join([*tags, *facts]) or name, person, "evidence")
