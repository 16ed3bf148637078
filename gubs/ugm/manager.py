"""The User Group Manager: 1,000 users in, group profiles out, by summarize -> cluster -> reflect.

    sketches = summarize(people)             # Eq. 1: k groups and their typical users
    clusters = cluster(people, sketches)     # Eq. 2: the 60 most similar users of each
    initial  = write_profiles(clusters)      # from the members' profiles alone
    matched  = match(clusters, initial)      # Eq. 3: does the profile fit what each member watched?
    final    = write_profiles(matched)       # from profiles and histories of the matched members

Each phase is one batch of calls to the LLM client, all in flight at once, and a second one for answers with faults.
Beside the calls stands the evidence (`gubs.ugm.evidence`): the prompts show it, everything written is checked against
it, and with the authors `both` and `evidence` it corrects or replaces what the model writes.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

from gubs.artifacts import JsonObject
from gubs.console import say
from gubs.llm.calls import Answer, LLMRequest, estimate_tokens, question
from gubs.llm.client import LLMClient
from gubs.llm.contract import UNANSWERED, require
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.fields import block, plain
from gubs.prompts.group_answers import PROFILE_REGEX, VERDICT_REGEX, profile_form, profile_regex
from gubs.prompts.people import Person
from gubs.records import Finding, GroupMember, User
from gubs.ugm.asking import ask_checked
from gubs.ugm.author import COMPLAINT_WORDS, features, name_group, write_profile
from gubs.ugm.checks import Evidence, complete, fault_of, fault_of_name, unsupported, without
from gubs.ugm.cluster import (
    BertEncoder,
    Cluster,
    Encoder,
    TfidfEncoder,
    Vectors,
    apart,
    cluster,
    cluster_kmeans,
    coverage,
    farthest,
)
from gubs.ugm.evidence import LENGTHS, PROFILE_SECTIONS, SECTIONS, Records, in_words, odds, overview
from gubs.ugm.settings import Author, UGMSettings
from gubs.ugm.summarize import MOST_CHARS, MOST_CHOICES, Sketch, around, first_requests, summarize

PeopleById = Mapping[str, Person]

_PROFILE_FRAME_TOKENS = 600
_GOOD_COVERAGE = 0.95
"""Typical users stand for all users well enough if they do nearly as well as those found without a model."""
_AGAINST = -1.0
"""Log odds below which a member's records speak against the group: everybody's explain them e times better."""
_CLEAR = 3.0
"""Log odds from which the records overrule the matcher: twenty to one."""
_ALL_SECTIONS = tuple(SECTIONS)
UNUSABLE = "unusable_profile"


@dataclass(frozen=True)
class Group:
    """A group on its way through the phases."""

    sketch: Sketch
    cluster: Cluster
    members: list[GroupMember]
    evidence: list[Finding] = field(default_factory=list)
    profile_author: str = "llm"
    unsupported: list[str] = field(default_factory=list)
    initial_profile: str | None = None
    final_profile: str | None = None
    dropped: str = ""
    """Why it has no profile: `nobody_similar`, `few_matched`, `unusable_profile` (it is not about the group), or the
    cause of a failed call; empty = it has one."""

    @property
    def matched(self) -> list[GroupMember]:
        """C'_g of Eq. 3, without members whose verdict is missing (they have a reason for that); all without
        reflection.
        """
        return [m for m in self.members if m.matched or (m.matched is None and m.reason is None)]


@dataclass
class UGMResult:
    """The result of the phases."""

    groups: list[Group]
    encoder: Encoder
    """Fitted on the people; places further users."""
    centres: Vectors
    """(groups, d), the vector of each group's typical user (or K-Means centre)."""
    report: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class _Phases:
    """What all phases need."""

    llm: LLMClient
    people: Sequence[Person]
    records: Records
    settings: UGMSettings
    author: Author

    @cached_property
    def by_id(self) -> PeopleById:
        return {p.user.user_id: p for p in self.people}

    @cached_property
    def overview(self) -> str:
        """What the summarizer's prompt shows of all users."""
        return block("\n".join(overview(self.records))) if self.settings.show_evidence else ""

    @cached_property
    def topics(self) -> list[str]:
        """All tags and topics that are counted."""
        return self.records.items("interest", "skipped", "clicked", "liked")


def group_id(number: int) -> str:
    """Name of the n-th group, from 0."""
    return f"g{number:02d}"


def manage(
    llm: LLMClient, people: Sequence[Person], settings: UGMSettings, *, records: Records, seed: int
) -> UGMResult:
    """Runs the three phases.

    Args:
        llm: answers the roles summarizer, profiler and matcher; with the author `evidence` it is asked nothing.
        people: the users (paper: 1,000 training users).
        settings: numbers and switches.
        records: what the people's records say.
        seed: of K-Means.

    Raises:
        InputError, SummaryError: see `summarize`. IncompleteError: too many answers are missing. What stops the client:
            see `LLMClient.stream`.
    """
    author = settings.author_with(llm.settings)
    work = _Phases(llm, people, records, settings, author)
    report: JsonObject = {"users": len(people), "author": author}
    encoder = make_encoder(settings)
    users = [p.with_tags for p in people]
    encoder.fit(users)
    say(f"         summarize: {len(people):,} users into {settings.groups} groups by {settings.mode}")
    sketches, report["summarize"] = _summarize(work, users, encoder, seed)
    groups, centres = _cluster(people, sketches, encoder, settings, seed, report["summarize"]["repairs"])
    groups = _named(groups, work)
    say(f"         cluster: {len(groups)} initial profiles ({settings.method}, top {settings.top})")
    groups = _write_profiles(groups, work, final=False)
    if settings.reflect:
        members = sum(len(g.members) for g in groups if not g.dropped)
        say(f"         reflect: {members:,} members against their group's profile")
        groups, report["match_failures"] = _match(groups, work)
        say(f"         reflect: {sum(not g.dropped for g in groups)} final profiles")
        groups = _write_profiles(groups, work, final=True)
    groups = [_with_evidence(g, work) for g in groups]
    return UGMResult(groups, encoder, centres, report | _report(groups, people))


def foreseen_requests(
    people: Sequence[Person], settings: UGMSettings, llm: LLMSettings, records: Records
) -> list[LLMRequest]:
    """About what the phases will ask, to estimate the price before spending.

    The first questions are exact. The others depend on answers, so they are asked about groups around users spread over
    the list, with texts of the usual length.
    """
    author = settings.author_with(llm)
    if author == "evidence":
        return []
    typical = [i * len(people) // settings.groups for i in range(settings.groups)]
    sketches = [Sketch(f"Name of group {i}", "what unites it " * 10, i) for i in typical]
    groups, _ = _cluster(people, sketches, make_encoder(settings), settings, 0, [])
    groups = [replace(g, initial_profile="what it likes and what it skips\n" * 40) for g in groups if g.members]
    work = _Phases(_Foreseen(llm), people, records, settings, author)  # type: ignore[arg-type]
    requests = first_requests(people, settings, author, work.overview, guided=llm.guided("summarizer"))
    requests += [_profile_request(g, i, work, final=False) for i, g in enumerate(groups)]
    if settings.reflect:
        requests += _match_requests(groups, work)
        requests += [_profile_request(g, i, work, final=True) for i, g in enumerate(groups)]
    return requests


@dataclass(frozen=True)
class _Foreseen:
    """In place of a client: only its settings are looked at."""

    settings: LLMSettings


def make_encoder(settings: UGMSettings) -> Encoder:
    """The encoder of the method; K-Means uses TF-IDF vectors. Errors: see `BertEncoder`."""
    return BertEncoder(settings.bert_model, settings.mode) if settings.method == "bert" else TfidfEncoder(settings.mode)


def _summarize(work: _Phases, users: Sequence[User], encoder: Encoder, seed: int) -> tuple[list[Sketch], JsonObject]:
    """The summarizer's groups; with `both`, around other typical users if its own stand for too few."""
    k = work.settings.groups
    if work.author == "llm":
        return summarize(work.llm, work.people, work.settings, overview=work.overview)
    if work.author == "both":
        sketches, report = summarize(work.llm, work.people, work.settings, "both", work.overview)
    else:
        sketches, report = [], {"calls": 0, "levels": 0, "repairs": []}
    vectors = encoder.encode(users)
    evident, best = apart(users, k, encoder, seed)
    given = [s.typical for s in sketches]
    said = coverage(vectors, given) if given else 0.0
    if said >= _GOOD_COVERAGE * best:
        return sketches, report
    typical, how = evident, "replaced"
    if given:
        moved, covered = apart(users, k, encoder, seed, given)
        typical, how = (moved, "moved") if covered >= _GOOD_COVERAGE * best else (evident, "replaced")
        report["repairs"].append({"typical_users": how, "coverage": {"said": said, "best": best}})
    kept = {s.typical: s for s in sketches}
    return [kept.get(i) or around(i, work.people) for i in typical], report


def _cluster(
    people: Sequence[Person],
    sketches: Sequence[Sketch],
    encoder: Encoder,
    settings: UGMSettings,
    seed: int,
    repairs: list[JsonObject],
) -> tuple[list[Group], Vectors]:
    """The groups' users, and the centres. Groups of equal members are put around users that no group is near to."""
    users, sketches = [p.with_tags for p in people], list(sketches)
    clusters, centres = _clusters(users, sketches, encoder, settings, seed)
    for _ in sketches:
        twin = _twin(clusters)
        if twin is None or len(people) <= len(sketches):
            break
        others = [s.typical for i, s in enumerate(sketches) if i != twin]
        new = farthest(encoder.encode(users), [*others, sketches[twin].typical])
        taken = {s.name.casefold() for s in sketches}
        repairs.append({"group": sketches[twin].name, "same_members": True, "taken": users[new].user_id})
        sketches[twin] = around(new, people, taken)
        clusters, centres = _clusters(users, sketches, encoder, settings, seed)
    groups = []
    for sketch, c in zip(sketches, clusters, strict=True):
        members = [GroupMember(users[i].user_id, float(v)) for i, v in zip(c.members, c.similarity, strict=True)]
        groups.append(Group(sketch, c, members, dropped="" if members else "nobody_similar"))
    return groups, centres


def _clusters(
    users: Sequence[User], sketches: Sequence[Sketch], encoder: Encoder, settings: UGMSettings, seed: int
) -> tuple[list[Cluster], Vectors]:
    typical = [s.typical for s in sketches]
    if settings.method == "kmeans":
        return cluster_kmeans(users, typical, encoder, settings.top, seed)
    clusters = cluster(users, typical, encoder, settings.top, overlap=settings.overlap)
    return clusters, encoder.encode([users[i] for i in typical])


def _twin(clusters: Sequence[Cluster]) -> int | None:
    """The first group with the members of an earlier one."""
    seen: set[frozenset[int]] = set()
    for i, c in enumerate(clusters):
        members = frozenset(map(int, c.members))
        if members and members in seen:
            return i
        seen.add(members)
    return None


def _named(groups: Sequence[Group], work: _Phases) -> list[Group]:
    """The names that stand: the summarizer's where they hold, or (`both`, `evidence`) the evidence's."""
    named: list[Group] = []
    for group in groups:
        names = [g.sketch.name for g in named]
        evidence = _evidence(group, work, PROFILE_SECTIONS)
        made_up = group.sketch.author == "evidence"
        fault = "" if made_up else fault_of_name(group.sketch.name, evidence, names)
        if group.members and (made_up or (fault and work.author == "both")):
            name = name_group(evidence.findings, work.settings.mode, {n.casefold() for n in names})
            sketch = replace(group.sketch, name=name, features=features(evidence.findings), author="evidence")
            group = replace(group, sketch=sketch)
        listed = [f"{groups[len(named)].sketch.name}: {fault}"] if fault else []
        named.append(replace(group, unsupported=listed))
    return named


def _write_profiles(groups: Sequence[Group], work: _Phases, *, final: bool) -> list[Group]:
    """Writes the profile of every group that is not dropped."""
    numbers = [i for i, g in enumerate(groups) if not g.dropped]
    sections = _ALL_SECTIONS if final else PROFILE_SECTIONS
    evidence = {i: _evidence(groups[i], work, sections) for i in numbers}
    answers: list[Answer] = []
    if work.author != "evidence":
        requests = [_profile_request(groups[i], i, work, final=final) for i in numbers]

        def faults(place: int, text: str) -> list[str]:
            fault = fault_of(text, _instructions())
            claims = unsupported(text, evidence[numbers[place]])
            return [fault] if fault else [f'"{claim}" does not hold: {why}' for claim, why in claims.items()]

        answers = ask_checked(work.llm, requests, faults)
        _require(answers, work)
    result = list(groups)
    for place, i in enumerate(numbers):
        answer = answers[place] if answers else None
        result[i] = _written(groups[i], answer, evidence[i], work.author, final=final)
    return result


@cache
def _instructions() -> str:
    """The profiler's prompt without a group: our words."""
    nothing = {"name": "", "features": "", "members": [], "evidence": "", "initial": "x", "form": ""}
    return fill("ugm/group_profile", with_views=False, **nothing)


def _written(group: Group, answer: Answer | None, evidence: Evidence, author: Author, *, final: bool) -> Group:
    """The group with a new profile: the answer as far as it holds, or the evidence's text, or dropped."""
    if answer and not answer.ok and author == "llm":
        return replace(group, dropped=answer.failure)
    text = answer.value if answer and answer.ok else ""
    claims = unsupported(text, evidence)
    fault = fault_of(text, _instructions())
    listed = [f"{claim}: {why}" for claim, why in claims.items()] or ([f"{text[:200]}: {fault}"] if fault else [])
    if author == "llm" and fault:
        return replace(group, dropped=UNUSABLE, unsupported=[*group.unsupported, *listed])
    if author == "llm":
        profile, writer = text, "llm"
    else:
        profile, writer = _corrected_profile("" if fault else without(text, claims), evidence)
    group = replace(group, profile_author=writer, unsupported=[*group.unsupported, *listed])
    return replace(group, final_profile=profile) if final else replace(group, initial_profile=profile)


def _corrected_profile(text: str, evidence: Evidence) -> tuple[str, str]:
    """What holds of the LLM's profile (completed by the evidence if it is thin), or the evidence's; and the author."""
    own = write_profile(evidence.findings)
    if not text or not complete(text, evidence):
        return own, "evidence"
    if len(text) >= len(own):
        return text, "llm"
    said = {line.partition(":")[0].casefold() for line in text.splitlines()}
    added = [line for line in own.splitlines() if line.partition(":")[0].casefold() not in said]
    return "\n".join([text, *added]), "both" if added else "llm"


def _match(groups: Sequence[Group], work: _Phases) -> tuple[list[Group], dict[str, int]]:
    """Judges every member of every group that is not dropped (Eq. 3); counts failed calls by cause."""
    pairs = [(i, m) for i, g in enumerate(groups) if not g.dropped for m in g.members]
    if work.author == "evidence":
        judged = {i: [m for m, _ in _by_records(groups[i], work).values()] for i, _ in pairs}
        return _judged(groups, judged, work.settings.min_matched), {}
    answers = work.llm.ask(_match_requests(groups, work))
    _require(answers, work)
    by_records = {i: _by_records(groups[i], work) for i, _ in pairs} if work.author == "both" else {}
    members: dict[int, list[GroupMember]] = defaultdict(list)
    for (i, member), answer in zip(pairs, answers, strict=True):
        # Of a member whose call failed, nobody said Yes and nobody said No.
        said = replace(
            member,
            matched=answer.value.matched if answer.ok else None,
            reason=answer.value.reason if answer.ok else f"no verdict ({answer.failure})",
        )
        members[i].append(_corrected(said, by_records[i][member.user_id]) if i in by_records else said)
    return _judged(groups, members, work.settings.min_matched), dict(Counter(a.failure for a in answers if not a.ok))


def _corrected(said: GroupMember, records: tuple[GroupMember, float]) -> GroupMember:
    """The matcher's verdict, or that of the records where there is none or where they speak clearly against it."""
    judged, value = records
    if said.matched == judged.matched or (said.matched is not None and abs(value) < _CLEAR):
        return said
    return replace(judged, reason=f"{judged.reason}; the matcher: {said.reason}")


def _judged(groups: Sequence[Group], members: Mapping[int, list[GroupMember]], min_matched: int) -> list[Group]:
    result = list(groups)
    for i, judged in members.items():
        few = sum(m.matched is True for m in judged) < min_matched
        result[i] = replace(groups[i], members=judged, dropped="few_matched" if few else "")
    return result


def _require(answers: Sequence[Answer], work: _Phases) -> None:
    """Ends the stage if too many answers are missing. With `both`, those that cannot be used count as answers: the
    evidence then stands.
    """
    unusable = {a.failure for a in answers} - UNANSWERED - {""} if work.author == "both" else set()
    require([a for a in answers if a.failure not in unusable], work.llm.settings.contract)


def _by_records(group: Group, work: _Phases) -> dict[str, tuple[GroupMember, float]]:
    """Verdicts without a model, with the log odds, by user: a member matches unless everybody's records explain its own
    clearly better than the group's.
    """
    found = odds(work.records, [m.user_id for m in group.members])
    judged = {}
    for member in group.members:
        value = found[member.user_id]
        whose = "the group's" if value > _AGAINST else "everybody's"
        reason = f"{whose} records explain the member's better (log odds {value:+.1f})"
        judged[member.user_id] = replace(member, matched=value > _AGAINST, reason=reason), value
    return judged


def _profile_request(group: Group, number: int, work: _Phases, *, final: bool) -> LLMRequest:
    """The question for an initial profile (members' profiles only) or a final one (with histories and the initial)."""
    settings, guided = work.settings, work.llm.settings.guided("profiler")
    initial = block(group.initial_profile or "") if final else ""
    table = _shown_evidence(group, work, _ALL_SECTIONS if final else PROFILE_SECTIONS)
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


def _profile_choices(work: _Phases) -> tuple[list[str], list[str], list[str]] | None:
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


def _match_requests(groups: Sequence[Group], work: _Phases) -> list[LLMRequest]:
    """The question about every member of every group that is not dropped, group by group."""
    regex = VERDICT_REGEX if work.llm.settings.guided("matcher") else None
    requests = []
    for number, group in enumerate(groups):
        table = _shown_evidence(group, work, _ALL_SECTIONS) if not group.dropped else ""
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


def _evidence(group: Group, work: _Phases, sections: Sequence[str]) -> Evidence:
    findings = work.records.findings([m.user_id for m in group.matched], sections)
    return Evidence(findings, work.topics)


def _shown_evidence(group: Group, work: _Phases, sections: Sequence[str]) -> str:
    """The evidence as a prompt shows it; empty if it shows none."""
    if not work.settings.show_evidence:
        return ""
    return block("\n".join(in_words(_evidence(group, work, sections).findings)))


def _with_evidence(group: Group, work: _Phases) -> Group:
    return replace(group, evidence=list(_evidence(group, work, _ALL_SECTIONS).findings))


def _report(groups: Sequence[Group], people: Sequence[Person]) -> JsonObject:
    kept = [g for g in groups if not g.dropped]
    memberships = Counter(m.user_id for g in kept for m in g.matched)
    return {
        "groups": len(groups),
        "kept": len(kept),
        "dropped": {group_id(i): g.dropped for i, g in enumerate(groups) if g.dropped},
        "grouped_users": len(memberships),
        "ungrouped_users": len(people) - len(memberships),
        "users_by_number_of_groups": {str(n): users for n, users in sorted(Counter(memberships.values()).items())},
        "names_by": dict(Counter(g.sketch.author for g in kept)),
        "profiles_by": dict(Counter(g.profile_author for g in kept)),
        "unsupported": sum(len(g.unsupported) for g in kept),
    }
