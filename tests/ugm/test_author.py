"""Names and profiles written from the evidence say what unites the members, and pass our own checks."""

import pytest

from gubs.records import Finding
from gubs.ugm.author import features, name_group, write_profile
from gubs.ugm.checks import Evidence, fault_of, fault_of_name, unsupported
from gubs.ugm.evidence import PROFILE_SECTIONS


@pytest.fixture
def findings(records):
    return records.findings([f"u{i}" for i in range(10)])


def test_the_profile_has_what_the_records_say(findings):
    profile = write_profile(findings)
    assert "Likes: cooking." in profile
    assert "Skips: football 100%." in profile
    assert "titles that promise more than the video shows (33% of views" in profile
    assert "under 15 s suits best" in profile
    assert "female 100%" in profile
    assert profile.startswith("Likes"), "short prompts show only the beginning"


def test_what_holds_only_by_chance_is_not_said():
    same = [Finding("interest", "pets", 0.3, 0.29, 0.2, 0.4, 60), Finding("skipped", "news", 0.5, 0.3, 0.2, 0.8, 6)]
    assert "news" not in write_profile(same)
    assert "Likes" not in write_profile(same)


def test_topics_and_facts_are_shown_as_they_are():
    findings = [
        Finding("skipped", "upload: long import", 0.9, 0.2, 0.8, 0.95, 30),
        Finding("person", "city size: small town", 0.6, 0.3, 0.4, 0.8, 30),
        Finding("person", "zip code: 03060", 0.03, 0.001, 0.002, 0.1, 30),
    ]
    profile = write_profile(findings)
    assert "Skips: upload: long import 90%." in profile
    assert "Members: city size small town 60%." in profile
    assert "03060" not in profile, "few members, however rare elsewhere"


def test_the_initial_profile_knows_no_history(records):
    initial = write_profile(records.findings([f"u{i}" for i in range(10)], PROFILE_SECTIONS))
    assert "Likes: cooking." in initial
    assert "football 100%" not in initial
    assert "Lengths" not in initial


def test_what_it_writes_passes_its_own_checks(findings):
    evidence = Evidence(findings, ["cooking", "football"])
    profile = write_profile(findings)
    assert fault_of(profile) == ""
    assert unsupported(profile, evidence) == {}
    assert fault_of_name(name_group(findings, "interest"), evidence, []) == ""


def test_names_say_what_unites_and_differ(findings):
    name = name_group(findings, "interest")
    assert name == "Fans of cooking"
    second = name_group(findings, "interest", {name.casefold()})
    assert "cooking" in second
    assert second != name
    assert name_group(findings, "demographics") == "Female, in their 60s"
    taken: set[str] = set()
    for _ in range(8):
        taken.add(name_group(findings, "both", taken).casefold())
    assert len(taken) == 8, "always another one"


def test_a_group_that_shares_nothing_is_said_to():
    assert name_group([], "interest") == "Users who share little"
    assert features([]) == "nothing that most members share"
    assert write_profile([]) == ""
