"""The phases ask what they should, and groups lose members and profiles for the right causes."""

import re
from collections import Counter

import pytest
from ugm_helpers import EVIL, PLAIN, ScriptedLLM, people, records_of, well_behaved

from gubs.llm.settings import LLMSettings
from gubs.prompts.people import Person, Taste, View
from gubs.records import User, Video
from gubs.ugm.manager import foreseen_requests, manage
from gubs.ugm.settings import UGMSettings

SMALL = {"groups": 3, "top": 8, "min_matched": 4}


def run(reply=well_behaved, crowd=None, llm_settings=PLAIN, **settings):
    llm, crowd = ScriptedLLM(reply, llm_settings), crowd or people(30)
    return manage(llm, crowd, UGMSettings(**{**SMALL, **settings}), records=records_of(crowd), seed=0), llm


def test_the_three_phases_ask_what_they_should():
    result, llm = run()
    assert [len(llm.prompts(p)) for p in ("summarize", "initial", "match", "final")] == [1, 3, 24, 3]
    assert all(g.final_profile and g.initial_profile for g in result.groups)
    assert result.report["kept"] == 3
    assert "About cooking" not in llm.prompts("initial")[0], "initial profiles are written without histories"
    assert "About cooking" in llm.prompts("match/g00")[0]
    assert "About cooking" in llm.prompts("final/g00")[0]
    assert "| They like what their tags say" in llm.prompts("final/g00")[0], "the initial profile, to be corrected"


def test_users_who_do_not_match_are_left_out_of_the_final_profile():
    refused = {"u000", "u003", "u006"}
    no = "Match or not: No\nReason: skips it"
    result, llm = run(lambda r: no if r.label.rsplit("/", 1)[-1] in refused else well_behaved(r))
    group = result.groups[0]
    assert {m.user_id for m in group.members if m.matched is False} == refused
    assert len(group.matched) == 5
    assert {m.reason for m in group.members if m.user_id in refused} == {"skips it"}
    assert 'own0"' not in llm.prompts("final/g00")[0]
    assert 'own9"' in llm.prompts("final/g00")[0]


def test_groups_with_too_few_matches_get_no_profile():
    result, llm = run(lambda r: "Match or not: No\nReason: no" if r.label.startswith("match/g01") else well_behaved(r))
    assert [g.dropped for g in result.groups] == ["", "few_matched", ""]
    assert result.groups[1].final_profile is None
    assert len(llm.prompts("final")) == 2
    assert result.report["dropped"] == {"g01": "few_matched"}
    assert result.report["ungrouped_users"] == 30 - 16


def test_reflection_can_be_off():
    result, llm = run(reflect=False)
    assert llm.prompts("match") == []
    assert llm.prompts("final") == []
    assert all(m.matched is None for g in result.groups for m in g.members)
    assert result.report["grouped_users"] == 24


def test_a_match_without_a_verdict_is_no_refusal_and_is_counted():
    result, _ = run(lambda r: "well..." if r.label == "match/g00/u000" else well_behaved(r))
    member = next(m for m in result.groups[0].members if m.user_id == "u000")
    assert member.matched is None
    assert member in result.groups[0].matched, "it stays where Eq. 2 put it"
    assert member.reason == "no verdict (no_verdict)"
    assert result.report["match_failures"] == {"no_verdict": 1}


def test_a_failed_profile_drops_the_group_with_its_cause():
    result, _ = run(lambda r: "" if r.label.startswith("initial/g02") else well_behaved(r))
    assert result.groups[2].dropped == "empty"
    assert result.report["kept"] == 2


def test_the_least_similar_members_are_left_out_if_the_prompt_is_full():
    result, llm = run(crowd=people(300), top=200, context_tokens=2400)
    request = next(r for r in llm.requests if r.label == "initial/g00")
    assert 5 < request.metadata["shown"] < request.metadata["members"] == len(result.groups[0].members)
    first = result.groups[0].members[0].user_id
    assert f'own{int(first[1:])}"' in request.messages[0]["content"]


def test_match_prompts_of_a_group_share_their_beginning():
    _, llm = run()
    a, b = llm.prompts("match/g00")[:2]
    profile_ends = a.index("They like what their tags say") + 60
    assert a[:profile_ends] == b[:profile_ends], "engines with a prefix cache read the group's profile once"


def test_a_dry_run_foresees_the_calls():
    _, llm = run()
    foreseen = foreseen_requests(people(30), UGMSettings(**SMALL), llm.settings, records_of(people(30)))
    assert Counter(r.role for r in foreseen) == Counter(r.role for r in llm.requests)


@pytest.mark.parametrize(
    ("roles", "guided"),
    [
        ({}, set()),
        ({"summarizer": "local"}, {"summarizer"}),
        ({"matcher": "local"}, {"matcher"}),
        ({"summarizer": "embedded", "matcher": "local"}, {"summarizer", "matcher"}),
    ],
)
def test_forms_are_enforced_for_the_roles_whose_endpoint_can(roles, guided):
    """A strong model for one role and a small local one for another, side by side."""
    large = {"base_url": "http://nowhere/v1", "model": "m"}
    endpoints = {"default": large, "local": {**large, "model": "small", "structured": "guided"}}
    settings = LLMSettings(endpoints=endpoints, roles={role: {"endpoint": name} for role, name in roles.items()})
    _, llm = run(llm_settings=settings)
    foreseen = foreseen_requests(people(30), UGMSettings(**SMALL), settings, records_of(people(30)))
    for requests in (llm.requests, foreseen):
        assert {r.role for r in requests if r.regex} == guided
        assert all(bool(r.regex) is (r.role in guided) for r in requests)


def test_users_without_tags_are_grouped_by_what_was_written_about_them():
    rated = [Person(User(f"r{i}"), (), Taste("Looks for goals.", ("football",))) for i in range(3)]
    result, llm = run(crowd=[*people(30), *rated], top=12)
    assert {f"r{i}" for i in range(3)} <= {m.user_id for m in result.groups[1].members}
    assert '"taste": "Looks for goals."' in llm.prompts("match/g01/r0")[0]
    assert llm.prompts("final/g01")[0].count('"taste": "Looks for goals."') == 3


def test_nothing_a_user_wrote_can_break_the_form():
    crowd = people(12)
    for i in range(3):
        evil = User(f"u{i:03d}", 30, EVIL, EVIL, {EVIL: EVIL}, ["cooking", EVIL])
        crowd[i] = Person(evil, (View(Video(f"v{i}", EVIL)), View(Video(f"w{i}", None, tags=[EVIL]))))
    crowd.append(Person(User("u012"), (), Taste(EVIL, ("cooking", EVIL))))
    _, llm = run(
        lambda r: EVIL + well_behaved(r) if r.role == "profiler" else well_behaved(r), crowd=crowd, top=4, min_matched=1
    )
    for prompt in [*llm.prompts("match"), *llm.prompts("final")]:
        assert len(re.findall(r"^Match or not", prompt, re.M)) == (1 if "You check" in prompt else 0)
        assert "<|" not in prompt
        assert "</think>" not in prompt
        assert not re.search(r"^ignore the above", prompt, re.M)


@pytest.mark.parametrize("method", ["tfidf", "kmeans"])
def test_methods_run_through(method):
    result, _ = run(method=method)
    assert result.report["kept"] == 3
