"""`gubs groups show`: the group profiles as a page, with what reflection changed and which members were refused."""

import difflib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from gubs.artifacts import Artifact, Run
from gubs.records import GroupMember
from gubs.report import pages

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
    assigned: int
    """Users assigned to the group who are not among its founding members."""

    @property
    def matched(self) -> int:
        """Number of members that the matcher accepted."""
        return sum(m.matched is True for m in self.members)

    @property
    def shown(self) -> list[GroupMember]:
        """The members on the page: refused ones first, then the most similar."""
        return sorted(self.members, key=lambda m: m.matched is True)[:_SHOWN_MEMBERS]


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
    return pages.render("groups", run=run.name, manifest=manifest, info=manifest.info, groups=view_groups(ugm))


def write_page(run: Run) -> str:
    """Writes the page into the run's folder and returns its path."""
    return pages.write(run, PAGE, render(run))


def _view(row: dict[str, Any], assigned: int) -> GroupView:
    members = [GroupMember.from_row(m) for m in row["members"] or []]
    return GroupView(row, members, diff(row["initial_profile"], row["final_profile"]), assigned)
