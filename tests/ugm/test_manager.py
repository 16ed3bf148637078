"""The phases ask what they should, and groups lose members and profiles for the right causes."""

import re
from collections import Counter

import pytest
from ugm_helpers import EVIL, PLAIN, ScriptedLLM, categories, people, records_of, well_behaved

from gubs.config import load_settings
from gubs.llm.errors import IncompleteError
from gubs.llm.settings import ContractSettings, LLMSettings
from gubs.prompts.people import Person, Taste, View
from gubs.records import User, Video
from gubs.ugm.manager import foreseen_requests, manage
from gubs.ugm.settings import UGMSettings


def allowing(**shares):
    return PLAIN.model_copy(update={"contract": ContractSettings(**shares)})


LENIENT = allowing(unusable=0.5)
SMALL = {"groups": 3, "top": 8, "min_matched": 4}


def run(reply=well_behaved, crowd=None, llm_settings=PLAIN, fails=lambda _: "", **settings):
    llm, crowd = ScriptedLLM(reply, llm_settings, fails=fails), crowd or people(30)
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


def test_a_match_without_a_verdict_is_neither_yes_nor_no_and_is_counted():
    result, llm = run(lambda r: "well..." if r.label == "match/g00/u000" else well_behaved(r), llm_settings=LENIENT)
    member = next(m for m in result.groups[0].members if m.user_id == "u000")
    assert member.matched is None
    assert member.reason == "no verdict (no_verdict)"
    assert member not in result.groups[0].matched
    assert 'own0"' not in llm.prompts("final/g00")[0]
    assert result.report["missing"] == {"matcher": {"no_verdict": 1}}
    assert result.report["asked"]["matcher"] == 24


def test_where_the_matcher_is_silent_the_evidence_decides():
    silent = lambda r: "well..." if r.label.startswith("match/g00") else well_behaved(r)  # noqa: E731
    result, _ = run(silent, author="both")
    assert all(m.matched is True and "log odds" in m.reason for m in result.groups[0].members)
    assert result.groups[0].members[0].reason.endswith("; the matcher: no verdict (no_verdict)")
    assert result.groups[1].members[0].reason == "it fits."


def test_records_that_speak_clearly_overrule_a_weak_matcher():
    """Nine cooks of whom the matcher refuses one, and a fan whom it accepts."""
    videos = {t: Video(t, None, 20.0, tags=[t]) for t in ("cooking", "football")}

    def person(name, tags, taste):
        views = [
            View(videos[t], play_rate=0.9 if t == taste else 0.05) for t in ("cooking", "football") for _ in range(8)
        ]
        return Person(User(name, tags=tags), tuple(views))

    crowd = [person(f"c{i}", ["cooking"], "cooking") for i in range(9)] + [person("odd", ["cooking"], "football")]
    crowd += [person(f"f{i}", ["football"], "football") for i in range(10)]

    def reply(request):
        if request.role == "summarizer":
            return categories([1, 11])
        return "Match or not: No\nReason: no" if request.label.endswith("/c1") else well_behaved(request)

    verdicts = {}
    for author in ("llm", "both"):
        result, _ = run(reply, crowd, groups=2, top=10, author=author)
        verdicts[author] = {m.user_id: m for g in result.groups for m in g.members}
    assert (verdicts["llm"]["c1"].matched, verdicts["llm"]["odd"].matched) == (False, True)
    assert (verdicts["both"]["c1"].matched, verdicts["both"]["odd"].matched) == (True, False)
    assert verdicts["both"]["c1"].reason.endswith("; the matcher: no")
    assert verdicts["both"]["c2"].reason == "it fits."


def test_a_failed_profile_drops_the_group_with_its_cause():
    result, _ = run(lambda r: "" if r.label.startswith("initial/g02") else well_behaved(r), llm_settings=LENIENT)
    assert result.groups[2].dropped == "empty"
    assert result.report["kept"] == 2


@pytest.mark.parametrize("label", ["initial/g02", "match/g01/u001", "final/g00"])
def test_missing_answers_end_the_phase(label):
    with pytest.raises(IncompleteError, match=r"incomplete: 1 of \d+ answers of the \w+ are missing"):
        run(lambda r: "" if r.label == label else well_behaved(r))


def failing(cause, *labels):
    return lambda r: cause if r.label in labels else ""


@pytest.mark.parametrize(
    ("author", "reply", "label", "least"),
    [
        ("llm", well_behaved, "final/g00", 1 / 6),  # of 3 and 3 profiles
        ("both", lambda r: "?" if r.role == "matcher" else well_behaved(r), "match/g00/u000", 1 / 24),
        ("both", lambda r: "?" if r.role == "summarizer" else well_behaved(r), "summarize/1.0", 1.0),
    ],
)
def test_the_share_that_may_be_missing_is_of_all_calls_of_the_role(author, reply, label, least):
    """Of all batches of the stage, and of answers that cannot be used too."""
    fails = failing("rate_limited", label)
    result, _ = run(reply, author=author, fails=fails, llm_settings=allowing(unanswered=least, unusable=0.0))
    assert "rate_limited" in str(result.report["missing"])
    with pytest.raises(IncompleteError, match=r"rate_limited 1.*the same command resumes"):
        run(reply, author=author, fails=fails, llm_settings=allowing(unanswered=least - 0.01))


def test_a_chunk_of_users_that_is_not_answered_is_one_of_all_chunks():
    crowd, fails = people(200), failing("rate_limited", "summarize/1.0")
    result, llm = run(
        crowd=crowd, author="both", context_tokens=2000, fails=fails, llm_settings=allowing(unanswered=0.3)
    )
    asked = len(llm.prompts("summarize"))
    assert asked > 4
    assert result.report["asked"]["summarizer"] == asked
    assert result.report["missing"] == {"summarizer": {"rate_limited": 1}}


@pytest.mark.parametrize("cause", ["empty", "moderated"])
def test_where_the_summarizer_is_silent_the_evidence_makes_the_groups(cause):
    result, _ = run(author="both", fails=failing(cause, "summarize/1.0"))
    assert result.report["missing"] == {"summarizer": {cause: 1}}
    assert {g.sketch.author for g in result.groups} == {"evidence"}
    assert result.report["kept"] == 3


@pytest.mark.parametrize("author", ["llm", "both"])
def test_a_prompt_that_is_not_taken_counts_as_the_answers_own(author):
    """Within the share; above it, the same command would fail again, and says so."""
    for cause in ("context", "rejected"):
        fails = failing(cause, "match/g00/u000")
        result, _ = run(author=author, fails=fails, llm_settings=allowing(unusable=0.05))
        assert result.report["missing"] == {"matcher": {cause: 1}}
        with pytest.raises(IncompleteError, match="will be refused again") as e:
            run(author=author, fails=fails)
        assert "the same command resumes" not in str(e.value)
        assert ("lower ugm.context_tokens" in str(e.value)) is (cause == "context")


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


@pytest.mark.parametrize("overlap", [True, False])
def test_a_dry_run_foresees_the_calls(overlap):
    crowd = people(30)
    for place, alike in ((10, 9), (20, 21)):  # the users at 0, 10 and 20 like the same
        crowd[place], crowd[alike] = crowd[alike], crowd[place]
    _, llm = run(crowd=crowd, overlap=overlap)
    settings = UGMSettings(**SMALL, overlap=overlap)
    foreseen = foreseen_requests(crowd, settings, llm.settings, records_of(crowd))
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
    profile = EVIL.replace("Category 1", "This")  # it would be no profile otherwise
    _, llm = run(
        lambda r: profile + well_behaved(r) if r.role == "profiler" else well_behaved(r),
        crowd=crowd,
        top=4,
        min_matched=1,
    )
    assert len(llm.prompts("match")) > len(llm.prompts("final")) == 3
    for prompt in [*llm.prompts("match"), *llm.prompts("final")]:
        assert len(re.findall(r"^Match or not", prompt, re.M)) == (1 if "You check" in prompt else 0)
        assert "<|" not in prompt
        assert "</think>" not in prompt
        assert not re.search(r"^ignore the above", prompt, re.M)


NONSENSE = "A helpful AI assistant named SmolLM, trained on a vast array of texts, is ready to help refine a message."


def topic_of(user):
    return user.tags[0]


def weak(request):
    """As a weak model: the form's placeholders as names, typical users of one kind, and no profile."""
    if request.role == "summarizer":
        return re.sub(r"(Group \d|likes things of kind \d)", "xxx", categories([1, 4, 7]))
    return NONSENSE if request.role == "profiler" else well_behaved(request)


def test_the_evidence_needs_no_model():
    result, llm = run(author="evidence")
    assert llm.requests == []
    assert sorted(g.sketch.name for g in result.groups) == ["Fans of cooking", "Fans of football", "Fans of gaming"]
    assert all("Likes: " in g.final_profile and g.profile_author == "evidence" for g in result.groups)
    assert all(m.matched is not None and "log odds" in m.reason for g in result.groups for m in g.members)


def test_what_a_weak_model_writes_is_corrected_by_the_evidence():
    result, llm = run(weak, author="both")
    assert {r.role for r in llm.requests} == {"summarizer", "profiler", "matcher"}, "all phases ask"
    assert sorted(g.sketch.name for g in result.groups) == ["Fans of cooking", "Fans of football", "Fans of gaming"]
    assert all(g.sketch.author == g.profile_author == "evidence" for g in result.groups)
    assert not any("SmolLM" in g.final_profile for g in result.groups)
    assert any("SmolLM" in claim for g in result.groups for claim in g.unsupported), "shown, not hidden"
    crowd = {p.user.user_id: p.user for p in people(30)}
    for g in result.groups:
        assert len({topic_of(crowd[m.user_id]) for m in g.members}) == 1, "around typical users of each kind"
    assert result.report["profiles_by"] == {"evidence": 3}
    assert any("typical_users" in r for r in result.report["summarize"]["repairs"])


def test_without_the_evidence_such_groups_get_no_profile():
    with pytest.raises(IncompleteError, match=r"3 of 3 answers of the profiler are missing \(unusable 3\)"):
        run(weak, author="llm")
    result, llm = run(weak, author="llm", llm_settings=allowing(unusable=1.0))
    assert {g.dropped for g in result.groups} == {"unusable"}
    assert all("SmolLM" in g.unsupported[-1] for g in result.groups), "shown"
    assert result.report["kept"] == 0
    asked_again = [r for r in llm.requests if r.role == "profiler" and len(r.messages) > 1]
    assert len(asked_again) == 3, "once each"
    assert "talks about the assistant" in asked_again[0].messages[-1]["content"]


def test_a_good_model_stays_the_author():
    def good(request):
        if request.role == "summarizer":
            names = iter(["Home cooks", "Football fans", "Gaming fans"])
            return re.sub(r"Group \d", lambda _: next(names), categories([1, 2, 3]))
        if request.role == "profiler":
            name = re.search(r'Name of the group: "(\w+)', request.messages[0]["content"])[1]
            topic = {"Home": "cooking", "Football": "football", "Gaming": "gaming"}[name]
            return f"These people live for {topic}. They watch clips of 20 s of it every evening."
        return well_behaved(request)

    result, _ = run(good, author="both")
    assert [g.sketch.name for g in result.groups] == ["Home cooks", "Football fans", "Gaming fans"]
    assert all(g.sketch.author == "llm" for g in result.groups)
    assert [g.sketch.typical for g in result.groups] == [0, 1, 2]
    first, *rest = result.groups[0].final_profile.splitlines()
    assert first == "These people live for cooking. They watch clips of 20 s of it every evening."
    assert any(line.startswith("Members: female 100%, nurse 100%") for line in rest), "thin: the evidence completes it"
    assert {g.profile_author for g in result.groups} == {"both"}
    many = " ".join(f"Some keep {a}ari{b} beside {b}omi{a}, others {a}u{b}e." for a in "bcdfg" for b in "klmnp")
    long, _ = run(lambda r: f"{good(r)} {many}" if r.role == "profiler" else good(r), author="both")
    assert {g.profile_author for g in long.groups} == {"llm"}


def test_a_claim_that_does_not_hold_is_asked_about_once_then_shown():
    def wrong(request):
        return "They love gaming above all, every day." if request.role == "profiler" else well_behaved(request)

    result, llm = run(wrong, author="llm")
    cooks = result.groups[0]
    again = [r for r in llm.requests if r.label == "initial/g00" and len(r.messages) > 1]
    assert "hardly a member lists gaming" in again[0].messages[-1]["content"]
    assert cooks.final_profile == "They love gaming above all, every day.", "it is the author"
    assert any("gaming" in claim for claim in cooks.unsupported)
    assert not any("gaming" in claim for claim in result.groups[2].unsupported), "of gamers it holds"
    corrected, _ = run(wrong, author="both")
    assert "gaming" not in corrected.groups[0].final_profile.splitlines()[0]


def test_the_prompts_show_the_evidence_unless_told_otherwise():
    _, llm = run()
    shown = "Counted over"
    assert all(shown in p for p in [*llm.prompts("initial"), *llm.prompts("match"), *llm.prompts("final")])
    assert "| interest (members who list the tag): cooking 100% (all users 33%)" in llm.prompts("match/g00")[0]
    assert "| interest: cooking 33%; football 33%; gaming 33%" in llm.prompts("summarize")[0]
    _, llm = run(show_evidence=False)
    assert not any(shown in p for p in llm.prompts(""))
    assert load_settings("paper").ugm.show_evidence is False, "the paper's inputs"
    assert load_settings("paper").ugm.author == "llm"


def test_the_author_follows_the_endpoint():
    assert UGMSettings().author_with(PLAIN) == "llm"
    assert UGMSettings().author_with(LLMSettings()) == "both", "the embedded model is too weak alone"
    assert UGMSettings(author="evidence").author_with(LLMSettings()) == "evidence"


def test_a_small_model_chooses_from_what_is_there():
    local = LLMSettings(endpoints={"default": {"base_url": "http://nowhere/v1", "model": "m", "structured": "guided"}})
    _, llm = run(weak, llm_settings=local, author="both")
    summary = next(r for r in llm.requests if r.role == "summarizer")
    assert re.search(r"Category 1: Fans of \((\w+\|)*cooking(\|\w+)*\) and", summary.regex)
    profile = next(r for r in llm.requests if r.role == "profiler")
    assert re.fullmatch(
        profile.regex,
        "Likes: cooking, football, gaming\nSkips: gaming, football\nPut off by: vulgar words\n"
        "Lengths: 15-30 s suits best",
    )
    assert "Put off by: one of" in profile.messages[0]["content"]


def test_groups_of_the_same_members_are_put_apart():
    result, _ = run(lambda r: categories([1, 4, 2]) if r.role == "summarizer" else well_behaved(r), top=10)
    members = [frozenset(m.user_id for m in g.members) for g in result.groups]
    assert len(set(members)) == 3
    assert [r for r in result.report["summarize"]["repairs"] if r.get("same_members")]
    crowd = {p.user.user_id: p.user for p in people(30)}
    assert {topic_of(crowd[m]) for m in members[1]} == {"gaming"}, "around a user that no group was near to"


def test_users_can_be_kept_to_one_group():
    crowd = people(30, tags=["cooking", "football"])
    assert run(crowd=crowd)[0].report["users_by_number_of_groups"] != {"1": 30}
    assert set(run(overlap=False)[0].report["users_by_number_of_groups"]) == {"1"}


def test_every_group_has_its_evidence():
    result, _ = run(author="llm")
    for g, topic in zip(result.groups, ("cooking", "football", "gaming"), strict=True):
        by_item = {(f.section, f.item): f for f in g.evidence}
        assert by_item["interest", topic].value == 1.0
        assert ("skipped by length", "15-30 s") in by_item


@pytest.mark.parametrize("method", ["tfidf", "kmeans"])
def test_methods_run_through(method):
    result, _ = run(method=method)
    assert result.report["kept"] == 3
