"""What the phases hand on: the groups, and what all of them need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from gubs.prompts.fields import block
from gubs.prompts.people import Person
from gubs.records import Finding, GroupMember
from gubs.ugm.asking import UNUSABLE, Interview
from gubs.ugm.checks import Evidence
from gubs.ugm.cluster import Cluster
from gubs.ugm.evidence import SECTIONS, Records, in_words, overview
from gubs.ugm.settings import Author, UGMSettings
from gubs.ugm.summarize import Sketch

ALL_SECTIONS = tuple(SECTIONS)
"""Of the evidence."""
DROPPED = {
    "few_matched": "too few members matched",
    "nobody_similar": "nobody is similar to its typical user",
    UNUSABLE: "what the language model wrote is not about the group",
}
"""Why groups have no profile, in words; further causes are those of missing answers."""


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
    """Why it has no profile: one of `DROPPED`, or the cause of a missing answer; empty = it has one."""

    @property
    def matched(self) -> list[GroupMember]:
        """C'_g of Eq. 3, without members whose verdict is missing (they have a reason for that); all without
        reflection.
        """
        return [m for m in self.members if m.matched or (m.matched is None and m.reason is None)]


@dataclass(frozen=True)
class Phases:
    """What all phases need."""

    interview: Interview
    people: Sequence[Person]
    records: Records
    settings: UGMSettings
    author: Author

    @cached_property
    def by_id(self) -> Mapping[str, Person]:
        """The people by their users' ids."""
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


def evidence_of(group: Group, work: Phases, sections: Sequence[str]) -> Evidence:
    """What the records of the group's (matched) members say."""
    findings = work.records.findings([m.user_id for m in group.matched], sections)
    return Evidence(findings, work.topics)


def shown_evidence(group: Group, work: Phases, sections: Sequence[str]) -> str:
    """The evidence as a prompt shows it; empty if it shows none."""
    if not work.settings.show_evidence:
        return ""
    return block("\n".join(in_words(evidence_of(group, work, sections).findings)))
