"""The User Group Manager: 1,000 users in, group profiles out, by summarize -> cluster -> reflect.

    sketches = summarize(people)             # Eq. 1: k groups and their typical users
    clusters = cluster(people, sketches)     # Eq. 2: the 60 most similar users of each
    initial  = write_profiles(clusters)      # from the members' profiles alone
    matched  = reflect(clusters, initial)    # Eq. 3: does the profile fit what each member watched?
    final    = write_profiles(matched)       # from profiles and histories of the matched members

Each phase is one batch of calls to the LLM client, all in flight at once, and a second one for answers with faults.
Beside the calls stands the evidence (`gubs.ugm.evidence`): the prompts show it, everything written is checked against
it, and with the authors `both` and `evidence` it corrects or replaces what the model writes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gubs.artifacts import JsonObject
from gubs.console import say
from gubs.llm.calls import LLMRequest
from gubs.llm.client import LLMClient
from gubs.llm.settings import LLMSettings
from gubs.prompts.people import Person
from gubs.records import GroupMember, User
from gubs.ugm.asking import Interview
from gubs.ugm.author import features, name_group
from gubs.ugm.checks import fault_of_name
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
from gubs.ugm.evidence import PROFILE_SECTIONS, Records
from gubs.ugm.phases import ALL_SECTIONS, Group, Phases, evidence_of, group_id
from gubs.ugm.profiles import profile_request, write_profiles
from gubs.ugm.reflect import match_requests, reflect
from gubs.ugm.settings import UGMSettings
from gubs.ugm.summarize import Sketch, around, first_requests, summarize

_GOOD_COVERAGE = 0.95
"""Typical users stand for all users well enough if they do nearly as well as those found without a model."""


@dataclass
class UGMResult:
    """The result of the phases."""

    groups: list[Group]
    encoder: Encoder
    """Fitted on the people; places further users."""
    centres: Vectors
    """(groups, d), the vector of each group's typical user (or K-Means centre)."""
    report: JsonObject = field(default_factory=dict)


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
        InputError, SummaryError: see `summarize`. Others: see `Interview.ask`.
    """
    author = settings.author_with(llm.settings)
    work = Phases(Interview(llm, author), people, records, settings, author)
    report: JsonObject = {"users": len(people), "author": author}
    encoder = make_encoder(settings)
    users = [p.with_tags for p in people]
    encoder.fit(users)
    say(f"         summarize: {len(people):,} users into {settings.groups} groups by {settings.mode}")
    sketches, report["summarize"] = _summarize(work, users, encoder, seed)
    groups, centres = _cluster(people, sketches, encoder, settings, seed, report["summarize"]["repairs"])
    groups = _named(groups, work)
    say(f"         cluster: {len(groups)} initial profiles ({settings.method}, top {settings.top})")
    groups = write_profiles(groups, work, final=False)
    if settings.reflect:
        members = sum(len(g.members) for g in groups if not g.dropped)
        say(f"         reflect: {members:,} members against their group's profile")
        groups = reflect(groups, work)
        say(f"         reflect: {sum(not g.dropped for g in groups)} final profiles")
        groups = write_profiles(groups, work, final=True)
    groups = [_with_evidence(g, work) for g in groups]
    return UGMResult(groups, encoder, centres, report | _report(groups, work))


def foreseen_requests(
    people: Sequence[Person], settings: UGMSettings, llm: LLMSettings, records: Records
) -> list[LLMRequest]:
    """About what the phases will ask, to estimate the price before spending.

    The first questions are exact. The others depend on answers, so they are asked about groups around users who
    differ, with texts of the usual length.
    """
    author = settings.author_with(llm)
    if author == "evidence":
        return []
    encoder, users = make_encoder(settings), [p.with_tags for p in people]
    encoder.fit(users)
    typical, _ = apart(users, settings.groups, encoder, 0)
    sketches = [Sketch(f"Name of group {i}", "what unites it " * 10, i) for i in typical]
    groups, _ = _cluster(people, sketches, encoder, settings, 0, [])
    groups = [replace(g, initial_profile="what it likes and what it skips\n" * 40) for g in groups if g.members]
    interview = Interview(_Foreseen(llm), author)  # type: ignore[arg-type]
    work = Phases(interview, people, records, settings, author)
    requests = first_requests(people, settings, author, work.overview, guided=llm.guided("summarizer"))
    requests += [profile_request(g, i, work, final=False) for i, g in enumerate(groups)]
    if settings.reflect:
        requests += match_requests(groups, work)
        requests += [profile_request(g, i, work, final=True) for i, g in enumerate(groups)]
    return requests


@dataclass(frozen=True)
class _Foreseen:
    """In place of a client: only its settings are looked at."""

    settings: LLMSettings


def make_encoder(settings: UGMSettings) -> Encoder:
    """The encoder of the method; K-Means uses TF-IDF vectors. Errors: see `BertEncoder`."""
    return BertEncoder(settings.bert_model, settings.mode) if settings.method == "bert" else TfidfEncoder(settings.mode)


def _summarize(work: Phases, users: Sequence[User], encoder: Encoder, seed: int) -> tuple[list[Sketch], JsonObject]:
    """The summarizer's groups; with `both`, around other typical users if its own stand for too few."""
    k = work.settings.groups
    sketches: list[Sketch] = []
    report: JsonObject = {"calls": 0, "levels": 0, "repairs": []}
    if work.author != "evidence":
        sketches, report = summarize(work.interview, work.people, work.settings, work.author, work.overview)
    if work.author == "llm":
        return sketches, report
    vectors = encoder.encode(users)
    evident, best = apart(users, k, encoder, seed)
    given = [s.typical for s in sketches]
    own_coverage = coverage(vectors, given) if given else 0.0
    if own_coverage >= _GOOD_COVERAGE * best:
        return sketches, report
    typical, how = evident, "replaced"
    if given:
        moved, covered = apart(users, k, encoder, seed, given)
        typical, how = (moved, "moved") if covered >= _GOOD_COVERAGE * best else (evident, "replaced")
        report["repairs"].append({"typical_users": how, "coverage": {"said": own_coverage, "best": best}})
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


def _named(groups: Sequence[Group], work: Phases) -> list[Group]:
    """The final names: the summarizer's where they hold, or (`both`, `evidence`) the evidence's."""
    named: list[Group] = []
    for group in groups:
        names = [g.sketch.name for g in named]
        evidence = evidence_of(group, work, PROFILE_SECTIONS)
        made_up = group.sketch.author == "evidence"
        fault = "" if made_up else fault_of_name(group.sketch.name, evidence, names)
        if group.members and (made_up or (fault and work.author == "both")):
            name = name_group(evidence.findings, work.settings.mode, {n.casefold() for n in names})
            sketch = replace(group.sketch, name=name, features=features(evidence.findings), author="evidence")
            group = replace(group, sketch=sketch)
        listed = [f"{groups[len(named)].sketch.name}: {fault}"] if fault else []
        named.append(replace(group, unsupported=listed))
    return named


def _with_evidence(group: Group, work: Phases) -> Group:
    return replace(group, evidence=list(evidence_of(group, work, ALL_SECTIONS).findings))


def _report(groups: Sequence[Group], work: Phases) -> JsonObject:
    contract = work.interview.contract
    kept = [g for g in groups if not g.dropped]
    memberships = Counter(m.user_id for g in kept for m in g.matched)
    return {
        "groups": len(groups),
        "kept": len(kept),
        "dropped": {group_id(i): g.dropped for i, g in enumerate(groups) if g.dropped},
        "grouped_users": len(memberships),
        "ungrouped_users": len(work.people) - len(memberships),
        "users_by_number_of_groups": {str(n): users for n, users in sorted(Counter(memberships.values()).items())},
        "names_by": dict(Counter(g.sketch.author for g in kept)),
        "profiles_by": dict(Counter(g.profile_author for g in kept)),
        "unsupported": sum(len(g.unsupported) for g in kept),
        "asked": dict(contract.asked),
        "missing": contract.missing,
    }
