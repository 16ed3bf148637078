"""The stage `ugm`: group profiles and everybody's memberships, as a versioned artifact with the evidence."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import JsonObject, Run, StageJob
from gubs.data.ifvr import IFVR, PROFILES
from gubs.errors import GubsError
from gubs.llm.budget import CostEstimate
from gubs.llm.client import LLMClient
from gubs.llm.contract import in_words
from gubs.llm.journal import journal_folder
from gubs.llm.progress import llm_progress
from gubs.llm.settings import LLMSettings
from gubs.prompts.people import Person
from gubs.records import SCHEMAS, GroupProfile, Split, User
from gubs.ugm.evidence import RECORD_COLUMNS, Records, read_records
from gubs.ugm.manager import UGMResult, foreseen_requests, manage
from gubs.ugm.phases import DROPPED, group_id
from gubs.ugm.placement import Placement
from gubs.ugm.quality import HELD_OUT_COLUMNS, geometry, skips
from gubs.ugm.settings import UGMSettings

Membership = tuple[str, str, float, str]
"""A row of `MEMBERSHIPS`."""
_BLOCK = 50_000
"""Users without tags whose histories are read at once."""
_HELD_OUT = 300
"""Members on whom it is measured what a group's skips say."""

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
    """Makes group profiles from the data set's UGM users and places all other users (tables groups, memberships,
    encoder, centres).

    Raises:
        NoGroupsError: every group lost its profile; the message says why. Others: see `manage`.
    """
    ifvr, tastes = IFVR(job.run), job.reads(PROFILES)
    people = ugm_people(ifvr, ugm, tastes=tastes)
    records = ugm_records(ifvr, people, ugm)
    with llm_progress() as on_progress, LLMClient(llm, journal_folder(job.run), on_progress=on_progress) as client:
        result = manage(client, people, ugm, records=records, seed=seed)
        spent = {role: asdict(s) for role, s in client.journal.spent.items()}
    report = result.report
    if not report["kept"]:
        raise NoGroupsError(
            f"no group has a profile ({_why_dropped(report)}): lower ugm.min_matched or ugm.groups, raise ugm.top, or "
            "use a stronger model (or ugm.author=both)"
        )
    version = job.recipe.fingerprint(job.kind)
    placement = _placement(result)
    members = _members(result, ugm.reflect)
    members += _placed_others(ifvr, placement, {p.user.user_id for p in people}, tastes=tastes)
    users = [p.with_tags for p in people]
    report["quality"] = {
        **geometry(users, placement.encoder, placement.centres, seed),
        "in_some_group": len({m[0] for m in members}) / max(1, ifvr.artifact.manifest.tables["users"].rows),
        "skips": _held_out_skips(ifvr, records, result, members, seed),
    }
    with job.writing() as out:
        out.write_table("groups", _groups_table(result, people, version))
        columns = [pa.array([m[i] for m in members], kind) for i, kind in enumerate(MEMBERSHIPS.types)]
        out.write_table("memberships", pa.table(columns, schema=MEMBERSHIPS))
        for name, table in placement.tables().items():
            out.write_table(name, table)
        out.info = {**report, "until": ugm.until, "llm": spent}
        out.summary = _summary(report, len(members))
    return out.summary


def _summary(report: JsonObject, memberships: int) -> str:
    by_evidence = {what: report[f"{what}_by"].get("evidence", 0) for what in ("names", "profiles")}
    notes = [f"{n} {what} by the evidence" for what, n in by_evidence.items() if n]
    notes += [f"{report['unsupported']} unsupported claims"] if report["unsupported"] else []
    instead = ", and the evidence decides instead" if report["author"] == "both" else ""
    notes += [in_words(role, causes, report["asked"][role]) + instead for role, causes in report["missing"].items()]
    return (
        f"{report['kept']} of {report['groups']} groups have a profile, {report['grouped_users']} of "
        f"{report['users']} users are in them; {memberships:,} memberships in all" + "".join(f"; {n}" for n in notes)
    )


def _why_dropped(report: JsonObject) -> str:
    """How many groups have no profile, by reason."""
    causes = Counter(DROPPED.get(cause, f"an answer is missing ({cause})") for cause in report["dropped"].values())
    return "; ".join(f"{n} group{'s' if n > 1 else ''}: {why}" for why, n in causes.items())


def estimate(run: Run, ugm: UGMSettings, llm: LLMSettings, *, profiles: bool = True) -> CostEstimate:
    """Calls, tokens and price of the stage before anything is spent; see `foreseen_requests`. `profiles`: the prompts
    show what the stage `profiles` wrote, where the run has it.
    """
    ifvr = IFVR(run)
    people = ugm_people(ifvr, ugm, tastes=profiles and run.has(PROFILES))
    with LLMClient(llm, journal_folder(run)) as client:
        return client.dry_run(foreseen_requests(people, ugm, llm, ugm_records(ifvr, people, ugm)))


def ugm_people(ifvr: IFVR, ugm: UGMSettings, *, tastes: bool) -> list[Person]:
    """The users that groups are made from, as known at the time `ugm.until`, with their latest views."""
    people = ifvr.people(ifvr.ugm_users, tastes=tastes).values()
    return [p.before(ugm.until_ms).latest(ugm.history_items) for p in people]


def ugm_records(ifvr: IFVR, people: Sequence[Person], ugm: UGMSettings) -> Records:
    """What these users' whole histories say, up to the time `ugm.until`."""
    log = ifvr.history_log([p.user.user_id for p in people], RECORD_COLUMNS)
    if ugm.until_ms is not None:
        log = log.filter(pc.fill_null(pc.less(log["timestamp"], ugm.until_ms), True))
    return read_records(people, log, ifvr.videos)


def _placement(result: UGMResult) -> Placement:
    """Of the groups that have a profile."""
    kept = [i for i, g in enumerate(result.groups) if not g.dropped]
    thresholds = [result.groups[i].cluster.threshold for i in kept]
    return Placement(result.encoder, [group_id(i) for i in kept], result.centres[kept], thresholds)


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
            evidence=group.evidence,
            name_author=group.sketch.author,
            profile_author=group.profile_author,
            unsupported=group.unsupported,
        )
        rows.append(profile.to_row() | {"dropped": group.dropped or None})
    return pa.Table.from_pylist(rows, schema=SCHEMAS["groups"].append(pa.field("dropped", pa.string())))


def _members(result: UGMResult, reflected: bool) -> list[Membership]:
    """Members of the groups among the users the groups were made from."""
    kept = [(group_id(i), g) for i, g in enumerate(result.groups) if not g.dropped]
    return [
        (m.user_id, name, m.similarity, "matched" if reflected else "clustered") for name, g in kept for m in g.matched
    ]


def _placed_others(ifvr: IFVR, placement: Placement, grouped: set[str], *, tastes: bool) -> list[Membership]:
    """Each other user, in the nearest group whose threshold it reaches, or in none.

    Users who list tags need no history; those of others are read in blocks. So memory does not grow with the log.
    """
    written = ifvr.tastes if tastes else {}
    bare: list[str] = []
    placed: list[Membership] = []

    def place(users: Sequence[User]) -> None:
        for user, group in zip(users, placement.place(users), strict=True):
            if group:
                placed.append((user.user_id, *group, "assigned"))

    for batch in ifvr.user_batches():
        others = [u for u in batch if u.user_id not in grouped]
        tagged = [Person(u, (), written.get(u.user_id)) for u in others if u.tags or u.user_id in written]
        place([p.with_tags for p in tagged])
        bare += [u.user_id for u in others if not u.tags and u.user_id not in written]
    for start in range(0, len(bare), _BLOCK):
        place([p.with_tags for p in ifvr.people(bare[start : start + _BLOCK]).values()])
    return placed


def _held_out_skips(
    ifvr: IFVR, records: Records, result: UGMResult, memberships: Sequence[Membership], seed: int
) -> JsonObject:
    """See `quality.skips`; the held-out members are training users whom no group was made from."""
    others = sorted((m[0], m[1]) for m in memberships if m[3] == "assigned")
    drawn = np.random.default_rng([seed, 71]).permutation(len(others))[: 4 * _HELD_OUT]
    group_of = dict(others[i] for i in drawn)
    splits = ifvr.user_splits
    splits = splits.filter(pc.is_in(splits["user_id"], value_set=pa.array(list(group_of), pa.string())))
    roles = defaultdict[str, set[str | None]](set)
    for user, split in zip(splits["user_id"].to_pylist(), splits["split"].to_pylist(), strict=True):
        roles[user].add(split)
    training = [u for u in group_of if str(Split.TRAIN) in roles[u] and str(Split.TEST) not in roles[u]]
    held_out = {u: group_of[u] for u in training[:_HELD_OUT]}
    groups = {group_id(i): [m.user_id for m in g.matched] for i, g in enumerate(result.groups) if not g.dropped}
    return skips(records, groups, held_out, ifvr.history_log(held_out, HELD_OUT_COLUMNS), ifvr.videos)
