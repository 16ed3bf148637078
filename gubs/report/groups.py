"""`gubs groups show`: the group profiles as a page, with what reflection changed and which members were refused."""

import difflib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gubs.artifacts import Artifact, JsonObject, Run
from gubs.llm.contract import in_words
from gubs.records import Finding, GroupMember
from gubs.report import pages
from gubs.ugm.evidence import SECTIONS, number
from gubs.ugm.phases import DROPPED

PAGE = "groups.html"
_SHOWN_MEMBERS = 12


@dataclass(frozen=True)
class Line:
    """A line of the diff of two profiles."""

    kind: str
    """`same`, `old` (only in the initial profile) or `new` (only in the final one)."""
    text: str


@dataclass(frozen=True)
class GroupView:
    """One group as the page shows it."""

    row: dict[str, Any]
    members: list[GroupMember]
    lines: list[Line]
    """Diff of the initial against the final profile; all `same` where there is one profile only."""
    evidence: list[Finding]
    """What the members' records say, section by section."""
    assigned: int
    """Users assigned to the group who are not among its founding members."""

    @property
    def matched(self) -> int:
        """Number of members that the matcher accepted."""
        return sum(m.matched is True for m in self.members)

    @property
    def evidence_by_section(self) -> list[tuple[str, list[Finding]]]:
        """The evidence in the order of the sections."""
        by_section = {s: [f for f in self.evidence if f.section == s] for s in SECTIONS}
        return [(s, findings) for s, findings in by_section.items() if findings]

    @property
    def shown(self) -> list[GroupMember]:
        """The members on the page: refused ones first, then the most similar."""
        return sorted(self.members, key=lambda m: m.matched is True)[:_SHOWN_MEMBERS]


@dataclass(frozen=True)
class Purity:
    """How far groups are the simulator's: the share of their users who belong to their commonest archetype."""

    members: float | None
    """Of the users whom groups were made from; None if none of them is in a group."""
    everybody: float | None
    """Of all memberships."""


def purity(memberships: list[JsonObject], archetypes: Mapping[str, int]) -> Purity:
    """From the table `memberships` and the true archetype of each user."""

    def share(rows: list[JsonObject]) -> float | None:
        by_group = defaultdict[str, list[int]](list)
        for row in rows:
            by_group[row["group_id"]].append(archetypes[row["user_id"]])
        return sum(max(Counter(a).values()) for a in by_group.values()) / len(rows) if rows else None

    with_archetype = [r for r in memberships if r["user_id"] in archetypes]
    return Purity(share([r for r in with_archetype if r["how"] != "assigned"]), share(with_archetype))


def view_groups(ugm: Artifact) -> list[GroupView]:
    """All groups, those with a profile first, in the order of their ids."""
    assigned = Counter(r["group_id"] for r in ugm.table("memberships").to_pylist() if r["how"] == "assigned")
    views = [_view(row, assigned[row["group_id"]]) for row in ugm.table("groups").to_pylist()]
    return sorted(views, key=lambda v: (v.row["dropped"] is not None, v.row["group_id"]))


def diff(initial: str | None, final: str | None) -> list[Line]:
    """Compares the initial with the final profile, line by line."""
    old, new = (initial or "").splitlines(), (final or "").splitlines()
    if not old or not new:
        return [Line("same", text) for text in old or new if text.strip()]
    kinds = {"  ": "same", "- ": "old", "+ ": "new"}
    lines = [Line(kinds[d[:2]], d[2:]) for d in difflib.ndiff(old, new) if d[:2] in kinds]
    return [line for line in lines if line.text.strip()]


def render(run: Run) -> str:
    """The page as self-contained HTML.

    Raises:
        ArtifactError: the run has no finished stage `ugm`.
    """
    ugm = run.artifact("ugm")
    manifest = ugm.manifest
    return pages.render(
        "groups",
        run=run.name,
        manifest=manifest,
        info=manifest.info,
        quality=manifest.info.get("quality") or {},
        repairs=(manifest.info.get("summarize") or {}).get("repairs", []),
        missing=_missing(manifest.info),
        dropped=DROPPED,
        purity=purity_of(run, ugm),
        groups=view_groups(ugm),
        sections=SECTIONS,
        number=number,
    )


def write_page(run: Run) -> str:
    """Writes the page into the run's folder and returns its path."""
    return pages.write(run, PAGE, render(run))


def _missing(info: JsonObject) -> list[str]:
    """Answers that the language model did not give, by role and cause."""
    return [in_words(role, causes, info["asked"][role]) for role, causes in info.get("missing", {}).items()]


def _view(row: dict[str, Any], assigned: int) -> GroupView:
    members = [GroupMember.from_row(m) for m in row["members"] or []]
    evidence = [Finding.from_row(f) for f in row["evidence"] or []]
    return GroupView(row, members, diff(row["initial_profile"], row["final_profile"]), evidence, assigned)


def purity_of(run: Run, ugm: Artifact) -> Purity | None:
    """On a simulated app, whose truth is known; the groups were made without it."""
    if not run.has("truth"):
        return None
    truth = run.artifact("truth").table("users", ["user_id", "archetype"])
    archetypes = dict(zip(truth["user_id"].to_pylist(), truth["archetype"].to_pylist(), strict=True))
    return purity(ugm.table("memberships").to_pylist(), archetypes)
