"""The stage `ugm`: group profiles and everybody's memberships, as a versioned artifact with the evidence."""

from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from gubs.artifacts import JsonObject, Run, StageJob
from gubs.data.ifvr import IFVR, PROFILES
from gubs.errors import GubsError
from gubs.llm.budget import CostEstimate
from gubs.llm.client import LLMClient
from gubs.llm.journal import journal_folder
from gubs.llm.progress import llm_progress
from gubs.llm.settings import LLMSettings
from gubs.prompts.people import Person
from gubs.records import SCHEMAS, GroupProfile
from gubs.ugm.cluster import assign
from gubs.ugm.manager import UGMResult, foreseen_requests, group_id, manage
from gubs.ugm.settings import UGMSettings

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
    """No group has a profile."""

    exit_code = 7


def make(job: StageJob, ugm: UGMSettings, llm: LLMSettings, seed: int) -> str:
    """Makes group profiles from the data set's UGM users and places all other users (tables groups, memberships).

    Raises:
        NoGroupsError: every group lost its profile; the message says why. Others: see `manage`.
    """
    ifvr, tastes = IFVR(job.run), job.reads(PROFILES)
    people = ugm_people(ifvr, ugm, tastes=tastes)
    with llm_progress() as on_progress, LLMClient(llm, journal_folder(job.run), on_progress=on_progress) as client:
        result = manage(client, people, ugm, seed=seed)
        spent = {role: asdict(s) for role, s in client.journal.spent.items()}
    report = result.report
    if not report["kept"]:
        raise NoGroupsError(
            f"no group has a profile ({report['dropped']}): lower ugm.min_matched or ugm.groups, raise ugm.top, or use "
            "a stronger matcher"
        )
    version = job.recipe.fingerprint(job.kind)
    others = ifvr.people(set(ifvr.users) - {p.user.user_id for p in people}, tastes=tastes)
    with job.writing() as out:
        out.write_table("groups", _groups_table(result, people, version))
        out.write_table("memberships", members := _memberships(result, people, list(others.values()), ugm.reflect))
        out.info = {**report, "until": ugm.until, "llm": spent}
        out.summary = (
            f"{report['kept']} of {report['groups']} groups have a profile, {report['grouped_users']} of "
            f"{report['users']} users are in them; {members.num_rows:,} memberships in all{_undecided(report)}"
        )
    return out.summary


def estimate(run: Run, ugm: UGMSettings, llm: LLMSettings, *, profiles: bool = True) -> CostEstimate:
    """Calls, tokens and price of the stage before anything is spent; see `foreseen_requests`. `profiles`: the prompts
    show what the stage `profiles` wrote, where the run has it.
    """
    people = ugm_people(IFVR(run), ugm, tastes=profiles and run.has(PROFILES))
    with LLMClient(llm, journal_folder(run)) as client:
        return client.dry_run(foreseen_requests(people, ugm, llm))


def ugm_people(ifvr: IFVR, ugm: UGMSettings, *, tastes: bool) -> list[Person]:
    """The users that groups are made from, as known at the time `ugm.until`, with their latest views."""
    people = ifvr.people(ifvr.ugm_users, tastes=tastes).values()
    return [p.before(ugm.until_ms).latest(ugm.history_items) for p in people]


def _undecided(report: JsonObject) -> str:
    """How many members have no verdict, by cause."""
    failures = report.get("match_failures", {})
    causes = ", ".join(f"{cause} {n}" for cause, n in failures.items())
    return f"; {sum(failures.values())} members without a verdict ({causes})" if failures else ""


def _groups_table(result: UGMResult, people: Sequence[Person], version: str) -> pa.Table:
    rows = []
    for number, group in enumerate(result.groups):
        profile = GroupProfile(
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
        rows.append(profile.to_row() | {"dropped": group.dropped or None})
    return pa.Table.from_pylist(rows, schema=SCHEMAS["groups"].append(pa.field("dropped", pa.string())))


def _memberships(result: UGMResult, people: Sequence[Person], others: Sequence[Person], reflected: bool) -> pa.Table:
    """Members of the groups; then each other user, in the nearest group whose threshold it reaches, or in none."""
    kept = [(group_id(i), g) for i, g in enumerate(result.groups) if not g.dropped]
    how = "matched" if reflected else "clustered"
    rows = [(m.user_id, name, m.similarity, how) for name, g in kept for m in g.matched]
    if others:
        typical = [people[g.sketch.typical].with_tags for _, g in kept]
        thresholds = [g.cluster.threshold for _, g in kept]
        places = assign([p.with_tags for p in others], typical, thresholds, result.encoder)
        rows += [
            (p.user.user_id, kept[place[0]][0], place[1], "assigned")
            for p, place in zip(others, places, strict=True)
            if place
        ]
    return pa.Table.from_pylist([dict(zip(MEMBERSHIPS.names, row, strict=True)) for row in rows], schema=MEMBERSHIPS)
