"""The stage `ugm`: group profiles and everybody's memberships, as a versioned artifact with its evidence."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import pyarrow as pa

from gubs.artifacts import Artifact, Run, fingerprint, writing
from gubs.config import Settings
from gubs.errors import GubsError
from gubs.llm.budget import Plan
from gubs.llm.client import LLMClient
from gubs.llm.progress import OnProgress
from gubs.llm.settings import EMBEDDED, LLMSettings
from gubs.people import Person, load_people
from gubs.records import SCHEMAS, GroupProfile, User
from gubs.ugm.cluster import assign
from gubs.ugm.manager import Group, UGMResult, foreseen_requests, manage

MEMBERSHIPS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        ("similarity", pa.float64()),
        ("how", pa.string()),
    ]
)
"""Table `memberships`: `how` is `matched` (one of the users the groups were made from, after reflection), `clustered`
(the same without reflection) or `assigned` (nearest typical user above the group's threshold)."""


class NoGroupsError(GubsError):
    """No group was left with a profile."""

    exit_code = 7


def ugm_fingerprint(settings: Settings, ifvr: Artifact) -> str:
    """Identity of the stage's output: the data set, the UGM's settings, and who answers with what parameters."""
    llm = settings.llm
    roles = {r: getattr(llm.roles, r).model_dump() for r in ("summarizer", "profiler", "matcher")}
    models = {r: _model(llm, r) for r in roles}
    recipe = {"ugm": settings.ugm.model_dump(), "roles": roles, "models": models, "seed": settings.seed}
    return fingerprint("ugm", recipe, {"ifvr": ifvr.fingerprint})


def ugm_stage(
    run: Run,
    settings: Settings,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress | None = None,
) -> tuple[Artifact, bool]:
    """Makes group profiles from the data set's UGM users and places all other users.

    Returns:
        The artifact `ugm` (tables groups, memberships) and whether it was made now.

    Raises:
        NoGroupsError: every group lost its profile; the message says why. Others: see `manage`.
    """
    ifvr = run.artifact("ifvr")
    mark = ugm_fingerprint(settings, ifvr)
    if found := run.finished("ugm", mark, force):
        return found, False
    people = list(load_people(ifvr, ugm_users(ifvr), settings.ugm.history_items, settings.ugm.max_text).values())
    with LLMClient(settings.llm, journal_folder(run), on_progress=on_progress) as llm:
        result = manage(llm, people, settings.ugm, guided=is_guided(settings.llm), seed=settings.seed, say=say)
        spent = {role: asdict(s) for role, s in llm.spent.items()}
    if not result.report["kept"]:
        raise NoGroupsError(
            f"no group is left with a profile ({result.report['dropped']}): lower ugm.min_matched or ugm.groups, "
            "raise ugm.top, or use a stronger matcher"
        )
    with writing(run, "ugm", fingerprint=mark, settings=settings, inputs={"ifvr": ifvr.fingerprint}) as out:
        out.write_table("groups", _groups_table(result, people, mark))
        out.write_table("memberships", _memberships(ifvr, result, people, settings.ugm.reflect))
        out.info = {**result.report, "llm": spent}
    return run.artifact("ugm"), True


def plan_ugm(run: Run, settings: Settings) -> Plan:
    """Calls, tokens and price of the stage before anything is spent; see `foreseen_requests`."""
    ifvr = run.artifact("ifvr")
    people = list(load_people(ifvr, ugm_users(ifvr), settings.ugm.history_items, settings.ugm.max_text).values())
    with LLMClient(settings.llm, journal_folder(run)) as llm:
        return llm.dry_run(foreseen_requests(people, settings.ugm, is_guided(settings.llm)))


def ugm_users(ifvr: Artifact) -> list[str]:
    """The training users from whom groups are made."""
    splits = ifvr.table("user_splits", ["user_id", "ugm"])
    return sorted(set(splits.filter(splits["ugm"])["user_id"].to_pylist()))


def journal_folder(run: Run) -> str:
    """Where the calls of a run are journaled: in the run's folder, which all stages share.

    For a run at a URI the settings must name a folder (llm.journal); the client says so.
    """
    return run.full("llm-journal")


def is_guided(settings: LLMSettings) -> bool:
    """Small local models are held to the answer forms by regular expressions; others keep them when told."""
    name = settings.endpoint_of("matcher")
    return name == EMBEDDED or settings.endpoints[name].structured in ("structured_outputs", "guided")


def _model(llm: LLMSettings, role: str) -> str:
    name = llm.endpoint_of(role)
    return EMBEDDED if name == EMBEDDED else llm.endpoints[name].model


def group_id(number: int) -> str:
    """Name of the n-th group, from 0."""
    return f"g{number:02d}"


def _groups_table(result: UGMResult, people: Sequence[Person], version: str) -> pa.Table:
    rows = [
        _profile(g, i, people, version).to_row() | {"dropped": g.dropped or None} for i, g in enumerate(result.groups)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMAS["groups"].append(pa.field("dropped", pa.string())))


def _profile(group: Group, number: int, people: Sequence[Person], version: str) -> GroupProfile:
    return GroupProfile(
        group_id=group_id(number),
        name=group.sketch.name,
        features=group.sketch.features,
        typical_user=people[group.sketch.typical].user.user_id,
        threshold=group.cluster.threshold,
        initial_profile=group.initial_profile,
        final_profile=group.final_profile,
        members=group.members,
        version=version,
    )


def _memberships(ifvr: Artifact, result: UGMResult, people: Sequence[Person], reflected: bool) -> pa.Table:
    rows = [
        {
            "user_id": m.user_id,
            "group_id": group_id(i),
            "similarity": m.similarity,
            "how": "matched" if reflected else "clustered",
        }
        for i, g in enumerate(result.groups)
        if not g.dropped
        for m in g.matched
    ]
    return pa.Table.from_pylist(rows + _placed(ifvr, result, people), schema=MEMBERSHIPS)


def _placed(ifvr: Artifact, result: UGMResult, people: Sequence[Person]) -> list[dict[str, object]]:
    """Everybody the groups were not made from: the nearest typical user above the group's threshold, or nobody."""
    known = {p.user.user_id for p in people}
    ids = [u for u in ifvr.table("users", ["user_id"])["user_id"].to_pylist() if u not in known]
    others: list[User] = [p.user for p in load_people(ifvr, ids, 1).values()]
    kept = [i for i, g in enumerate(result.groups) if not g.dropped]
    typical = [people[result.groups[i].sketch.typical].user for i in kept]
    thresholds = [result.groups[i].cluster.threshold for i in kept]
    places = assign(others, typical, thresholds, result.encoder) if others else []
    return [
        {"user_id": u.user_id, "group_id": group_id(kept[g]), "similarity": similarity, "how": "assigned"}
        for u, place in zip(others, places, strict=True)
        if place is not None
        for g, similarity in [place]
    ]
