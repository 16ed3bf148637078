"""The stage `oracle`: the simulated app's archetypes as groups, with profiles that say what is true of them.

No model may use them in earnest: they show what groups could be worth at best. Profiles have the form of those that are
written from evidence.
"""

from collections import Counter
from statistics import median

import pyarrow as pa

from gubs.artifacts import JsonObject, StageJob
from gubs.errors import SettingsError
from gubs.records import SCHEMAS, GroupProfile
from gubs.ugm.author import COMPLAINT_WORDS
from gubs.ugm.phases import group_id
from gubs.ugm.stage import MEMBERSHIPS

TRUTH = "truth"
HOW = "true"
"""`how` of these memberships."""
_MOST = 0.5
"""Share of members who cannot stand a flaw, from which the group cannot."""


def preflight(kind: str) -> None:
    """Checks that the source is simulated.

    Raises:
        SettingsError: it is not.
    """
    if kind != "synthetic":
        raise SettingsError(f"ufm.grpo.profiles=oracle is for simulated apps only, not for source.kind={kind}")


def make(job: StageJob, kind: str) -> str:
    """Writes the tables groups and memberships. Errors: see `preflight`."""
    preflight(kind)
    users = job.input(TRUTH).table("users").to_pylist()
    members: dict[int, list[JsonObject]] = {}
    for user in users:
        members.setdefault(user["archetype"], []).append(user)
    version = job.recipe.fingerprint(job.kind)
    groups = [_group(number, members[number], version) for number in sorted(members)]
    rows = [(u["user_id"], group_id(u["archetype"]), 1.0, HOW) for u in users]
    columns = [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), MEMBERSHIPS.types, strict=True)]
    with job.writing() as out:
        out.write_table("groups", pa.Table.from_pylist([g.to_row() for g in groups], schema=SCHEMAS["groups"]))
        out.write_table("memberships", pa.table(columns, schema=MEMBERSHIPS))
        out.info = {"note": "What the simulation knows and no model may see: archetypes and what is true of them."}
        out.summary = f"{len(groups)} true groups of {len(users):,} users"
    return out.summary


def _group(number: int, members: list[JsonObject], version: str) -> GroupProfile:
    likes = members[0]["archetype_interests"]
    profile = _profile(likes, members)
    return GroupProfile(
        group_id=group_id(number),
        name=f"Fans of {', '.join(likes[:-1])} and {likes[-1]}",
        features=", ".join(likes),
        typical_user=members[0]["user_id"],
        threshold=0.0,
        initial_profile=profile,
        final_profile=profile,
        members=[],
        version=version,
    )


def _profile(likes: list[str], members: list[JsonObject]) -> str:
    hated = Counter(flaw for m in members for flaw in m["intolerance"])
    triggers = [COMPLAINT_WORDS[flaw] for flaw, n in sorted(hated.items()) if n > _MOST * len(members)]
    lines = [f"Likes: {', '.join(likes)}."]
    lines += [f"Put off by: {'; '.join(triggers)}."] if triggers else []
    lines.append(f"Lengths: over {median(m['patience_s'] for m in members):.0f} s takes too long.")
    return "\n".join(lines)
