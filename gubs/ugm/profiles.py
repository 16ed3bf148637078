"""Profiles of groups: what the LLM is asked, and how much of its text is kept."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from gubs.llm.calls import Answer, LLMRequest, estimate_tokens, question
from gubs.prompts import fill
from gubs.prompts.fields import block, plain
from gubs.prompts.group_answers import PROFILE_REGEX, profile_form, profile_regex
from gubs.prompts.people import Person
from gubs.ugm.asking import UNUSABLE, Check
from gubs.ugm.author import COMPLAINT_WORDS, write_profile
from gubs.ugm.checks import Evidence, complete, fault_of, unsupported, without
from gubs.ugm.evidence import LENGTHS, PROFILE_SECTIONS
from gubs.ugm.phases import ALL_SECTIONS, Group, Phases, evidence_of, group_id, shown_evidence
from gubs.ugm.settings import Author, UGMSettings
from gubs.ugm.summarize import MOST_CHARS, MOST_CHOICES

_PROFILE_FRAME_TOKENS = 600
_SHOWN_TEXT = 200
"""Characters shown of a text that cannot be used."""


def write_profiles(groups: Sequence[Group], work: Phases, *, final: bool) -> list[Group]:
    """Writes the profile of every group that is not dropped. Errors: see `Interview.ask`."""
    numbers = [i for i, g in enumerate(groups) if not g.dropped]
    sections = ALL_SECTIONS if final else PROFILE_SECTIONS
    evidence = {i: evidence_of(groups[i], work, sections) for i in numbers}
    answers: list[Answer] = []
    if work.author != "evidence":
        requests = [profile_request(groups[i], i, work, final=final) for i in numbers]
        answers = work.interview.ask_checked(requests, _check([evidence[i] for i in numbers]))
    result = list(groups)
    for place, i in enumerate(numbers):
        answer = answers[place] if answers else None
        result[i] = _written(groups[i], answer, evidence[i], work.author, final=final)
    return result


def _check(evidence: Sequence[Evidence]) -> Check:
    def spoilt(_: int, text: str) -> str:
        return fault_of(text, instructions())

    def faults(place: int, text: str) -> list[str]:
        claims = unsupported(text, evidence[place])
        fault = spoilt(place, text)
        return [fault] if fault else [f'"{claim}" does not hold: {why}' for claim, why in claims.items()]

    return Check(faults, spoilt)


@cache
def instructions() -> str:
    """The profiler's prompt without a group: our words."""
    nothing = {"name": "", "features": "", "members": [], "evidence": "", "initial": "x", "form": ""}
    return fill("ugm/group_profile", with_views=False, **nothing)


def _written(group: Group, answer: Answer | None, evidence: Evidence, author: Author, *, final: bool) -> Group:
    """The group with a new profile: the answer as far as it holds, or the evidence's text, or dropped."""
    text = answer.value if answer and answer.ok else ""
    claims = unsupported(text, evidence)
    listed = [f"{claim}: {why}" for claim, why in claims.items()]
    if answer and answer.failure == UNUSABLE:
        listed.append(f"{answer.text[:_SHOWN_TEXT]}: {answer.error}")
    group = replace(group, unsupported=[*group.unsupported, *listed])
    if answer and not answer.ok and author == "llm":
        return replace(group, dropped=answer.failure)
    profile, writer = (text, "llm") if author == "llm" else _corrected_profile(without(text, claims), evidence)
    group = replace(group, profile_author=writer)
    return replace(group, final_profile=profile) if final else replace(group, initial_profile=profile)


def _corrected_profile(text: str, evidence: Evidence) -> tuple[str, str]:
    """What holds of the LLM's profile (completed by the evidence if it is thin), or the evidence's; and the author."""
    own = write_profile(evidence.findings)
    if not text or not complete(text, evidence):
        return own, "evidence"
    if len(text) >= len(own):
        return text, "llm"
    headings = {line.partition(":")[0].casefold() for line in text.splitlines()}
    added = [line for line in own.splitlines() if line.partition(":")[0].casefold() not in headings]
    return "\n".join([text, *added]), "both" if added else "llm"


def profile_request(group: Group, number: int, work: Phases, *, final: bool) -> LLMRequest:
    """The question for an initial profile (members' profiles only) or a final one (with histories and the initial)."""
    settings, guided = work.settings, work.interview.settings.guided("profiler")
    initial = block(group.initial_profile or "") if final else ""
    table = shown_evidence(group, work, ALL_SECTIONS if final else PROFILE_SECTIONS)
    room = settings.context_tokens - _PROFILE_FRAME_TOKENS - estimate_tokens(initial + table)
    members = [work.by_id[m.user_id] for m in (group.matched if final else group.members)]
    descriptions = _as_many_as_fit(members, room, settings, with_views=final)
    choices = _profile_choices(work) if guided and work.author == "both" else None
    prompt = fill(
        "ugm/group_profile",
        name=group.sketch.name,
        features=group.sketch.features,
        with_views=final,
        members=descriptions,
        evidence=table,
        initial=initial,
        form=profile_form(*choices) if choices else "",
    )
    return question(
        "profiler",
        f"{'final' if final else 'initial'}/{group_id(number)}",
        prompt,
        regex=profile_regex(*choices) if choices else PROFILE_REGEX if guided else None,
        parser="gubs.prompts.group_answers:parse_profile",
        metadata={"group": number, "shown": len(descriptions), "members": len(members)},
    )


def _profile_choices(work: Phases) -> tuple[list[str], list[str], list[str]] | None:
    """Topics, complaints and lengths that a small model chooses from; None if there are too few topics."""
    topics = [plain(t, MOST_CHARS) for t in work.topics]
    topics = [t for t in topics if t and "…" not in t][:MOST_CHOICES]
    return (topics, list(COMPLAINT_WORDS.values()), list(LENGTHS)) if len(topics) > 2 else None


def _as_many_as_fit(
    members: Sequence[Person], room: int, settings: UGMSettings, *, with_views: bool
) -> list[dict[str, object]]:
    """The most similar members, until the prompt is full; at least one."""
    descriptions: list[dict[str, object]] = []
    for person in members[: settings.shown_members or None]:
        profile, views = person.profile(settings.max_text), person.views(settings.max_text) if with_views else []
        room -= estimate_tokens("".join([profile, *views])) + 4 * (1 + len(views))
        if descriptions and room < 0:
            break
        descriptions.append({"profile": profile, "views": views})
    return descriptions
