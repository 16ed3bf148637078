"""Reflection (Eq. 3): does a group's profile fit what each of its members watched?"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from gubs.llm.calls import LLMRequest, question
from gubs.prompts import fill
from gubs.prompts.fields import block
from gubs.prompts.group_answers import VERDICT_REGEX
from gubs.prompts.people import Person
from gubs.records import GroupMember
from gubs.ugm.evidence import odds
from gubs.ugm.phases import ALL_SECTIONS, Group, Phases, group_id, shown_evidence
from gubs.ugm.settings import UGMSettings

_AGAINST = -1.0
"""Log odds below which a member's records speak against the group: everybody's explain them e times better."""
_CLEAR = 3.0
"""Log odds from which the records overrule the matcher: twenty to one."""


def reflect(groups: Sequence[Group], work: Phases) -> list[Group]:
    """Judges every member of every group that is not dropped. Errors: see `Interview.ask`."""
    pairs = [(i, m) for i, g in enumerate(groups) if not g.dropped for m in g.members]
    if work.author == "evidence":
        judged = {i: [m for m, _ in _by_records(groups[i], work).values()] for i, _ in pairs}
        return _judged(groups, judged, work.settings.min_matched)
    answers = work.interview.ask(match_requests(groups, work))
    by_records = {i: _by_records(groups[i], work) for i, _ in pairs} if work.author == "both" else {}
    members: dict[int, list[GroupMember]] = defaultdict(list)
    for (i, member), answer in zip(pairs, answers, strict=True):
        # Of a member whose call failed, nobody said Yes and nobody said No.
        verdict = replace(
            member,
            matched=answer.value.matched if answer.ok else None,
            reason=answer.value.reason if answer.ok else f"no verdict ({answer.failure})",
        )
        members[i].append(_corrected(verdict, by_records[i][member.user_id]) if i in by_records else verdict)
    return _judged(groups, members, work.settings.min_matched)


def _corrected(verdict: GroupMember, records: tuple[GroupMember, float]) -> GroupMember:
    """The matcher's verdict, or that of the records where there is none or where they speak clearly against it."""
    judged, value = records
    if verdict.matched == judged.matched or (verdict.matched is not None and abs(value) < _CLEAR):
        return verdict
    return replace(judged, reason=f"{judged.reason}; the matcher: {verdict.reason}")


def _judged(groups: Sequence[Group], members: Mapping[int, list[GroupMember]], min_matched: int) -> list[Group]:
    result = list(groups)
    for i, judged in members.items():
        few = sum(m.matched is True for m in judged) < min_matched
        result[i] = replace(groups[i], members=judged, dropped="few_matched" if few else "")
    return result


def _by_records(group: Group, work: Phases) -> dict[str, tuple[GroupMember, float]]:
    """Verdicts without a model, with the log odds, by user: a member matches unless everybody's records explain its own
    clearly better than the group's.
    """
    log_odds = odds(work.records, [m.user_id for m in group.members])
    judged = {}
    for member in group.members:
        value = log_odds[member.user_id]
        whose = "the group's" if value > _AGAINST else "everybody's"
        reason = f"{whose} records explain the member's better (log odds {value:+.1f})"
        judged[member.user_id] = replace(member, matched=value > _AGAINST, reason=reason), value
    return judged


def match_requests(groups: Sequence[Group], work: Phases) -> list[LLMRequest]:
    """The question about every member of every group that is not dropped, group by group."""
    regex = VERDICT_REGEX if work.interview.settings.guided("matcher") else None
    requests = []
    for number, group in enumerate(groups):
        table = shown_evidence(group, work, ALL_SECTIONS) if not group.dropped else ""
        for member in [] if group.dropped else group.members:
            requests.append(_match_request(group, number, work.by_id[member.user_id], table, work.settings, regex))
    return requests


def _match_request(
    group: Group, number: int, person: Person, table: str, settings: UGMSettings, regex: str | None
) -> LLMRequest:
    # The group comes first: engines with a prefix cache read it once for all its members.
    prompt = fill(
        "ugm/match",
        name=group.sketch.name,
        profile=block(group.initial_profile or ""),
        evidence=table,
        person={"profile": person.profile(settings.max_text), "views": person.views(settings.max_text)},
    )
    return question(
        "matcher",
        f"match/{group_id(number)}/{person.user.user_id}",
        prompt,
        regex=regex,
        parser="gubs.prompts.group_answers:parse_verdict",
    )
