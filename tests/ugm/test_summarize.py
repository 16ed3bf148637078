"""The summarizer's groups: from good, bad and repaired answers, in one prompt or in chunks."""

import contextlib
import re
import time

import pytest
from ugm_helpers import EVIL, ScriptedLLM, categories, people, well_behaved

from gubs.errors import InputError
from gubs.prompts.group_answers import (
    PROFILE_REGEX,
    VERDICT_REGEX,
    AnswerError,
    Category,
    categories_regex,
    find_categories,
    parse_categories,
    parse_profile,
    parse_verdict,
)
from gubs.prompts.people import Person, Taste, View
from gubs.records import User, Video
from gubs.ugm.asking import Interview
from gubs.ugm.settings import UGMSettings
from gubs.ugm.summarize import SummaryError, summarize


def run(reply, n=30, k=3, **settings):
    llm = ScriptedLLM(reply)
    crowd = people(n)
    sketches, report = summarize(Interview(llm, "llm"), crowd, UGMSettings(groups=k, **settings))
    return sketches, report, llm


def test_one_prompt_has_all_users_and_the_answer_becomes_groups():
    sketches, report, llm = run(well_behaved)
    assert [s.name for s in sketches] == ["Group 1", "Group 2", "Group 3"]
    assert [s.typical for s in sketches] == [0, 1, 2]
    assert report["calls"] == 1
    prompt = llm.prompts("summarize")[0]
    assert all(f"User {i}: " in prompt for i in range(1, 31))
    assert "exactly 3 groups" in prompt


@pytest.mark.parametrize(
    ("mode", "says"), [("interest", "videos they like"), ("demographics", "age, gender"), ("both", "together with age")]
)
def test_the_mode_is_the_criterion(mode, says):
    _, _, llm = run(well_behaved, mode=mode)
    assert says in llm.prompts("summarize")[0]


@pytest.mark.parametrize(
    ("first", "error"),
    [
        (categories([1, 2]), "not 3"),
        (categories([1, 2, 3, 4]), "not 3"),
        (categories([1, 2, 31]), "there is no User 31"),
        (categories([1, 2, 2]), "a typical user of its own"),
        ("Sorry, I cannot.", "0 complete categories"),
    ],
)
def test_a_bad_answer_is_asked_again_with_the_error_and_then_right(first, error):
    answers = iter([first, categories([4, 5, 6])])
    sketches, _, llm = run(lambda _: next(answers))
    assert [s.typical for s in sketches] == [3, 4, 5]
    assert error in llm.requests[1].messages[-1]["content"]


def test_bad_typical_users_are_repaired_if_the_reask_does_not_help():
    stubborn = categories([1, 1, 99])
    stubborn = stubborn.replace("likes things of kind 2", "football").replace("likes things of kind 3", "gaming")
    sketches, report, _ = run(lambda _: stubborn)
    assert len({s.typical for s in sketches}) == 3
    topics = ["cooking", "football", "gaming"]
    assert [topics[s.typical % 3] for s in sketches] == topics, (
        "the user most similar to the group's words replaces them"
    )
    assert len(report["repairs"]) == 2


def test_one_group_too_many_is_merged_and_reported_too_few_are_an_error():
    sketches, report, _ = run(lambda _: categories([1, 2, 3, 4]))  # users 1 and 4 like the same
    assert [s.name for s in sketches] == ["Group 1", "Group 2", "Group 3"]
    assert sketches[0].features == "likes things of kind 1; likes things of kind 4"
    assert report["repairs"] == [{"group": "Group 4", "merged_into": "Group 1"}]
    with pytest.raises(SummaryError, match="stronger model"):
        run(lambda _: categories([1, 2]))


def test_an_answer_with_too_few_groups_is_asked_for_anew_by_the_next_run():
    """It stands in the journal, which answers the same request with the same text forever."""
    replayed = []

    def reply(request):
        replayed.append(request.sample)
        return categories([1, 2, 3] if request.sample else [1, 2])

    llm = ScriptedLLM(reply, replays=lambda request: not request.sample)
    sketches, _ = summarize(Interview(llm, "llm"), people(30), UGMSettings(groups=3))
    assert len(sketches) == 3
    assert replayed == [0, 0, 1]


def test_equal_names_are_asked_about_then_told_apart():
    twins = categories([1, 2, 3]).replace("Group 2", "Group 1")
    sketches, report, llm = run(lambda _: twins)
    assert 'two groups are called "group 1"' in llm.requests[1].messages[-1]["content"]
    assert [s.name for s in sketches] == ["Group 1", "Fans of football, own1", "Group 3"]
    assert {"group": "Group 1", "renamed": "Fans of football, own1"} in report["repairs"]


def test_with_the_evidence_missing_groups_are_made_up_around_other_users():
    llm = ScriptedLLM(lambda _: categories([1, 2]))
    sketches, report = summarize(Interview(llm, "both"), people(30), UGMSettings(groups=4), "both")
    assert len({s.typical for s in sketches}) == 4
    assert len([r for r in report["repairs"] if "added" in r]) == 2


@pytest.mark.parametrize(
    ("mode", "shown", "hidden"),
    [("interest", ["cooking"], ["nurse"]), ("demographics", ["nurse", "female", '"typical age"'], ["cooking"])],
)
def test_lines_of_groups_show_what_the_mode_groups_by(mode, shown, hidden):
    _, _, llm = run(well_behaved, n=200, context_tokens=2000, mode=mode)
    (line, *_) = re.findall(r"^User 1: .*", llm.prompts("summarize/2")[0], re.M)
    assert all(word in line for word in shown)
    assert not any(word in line for word in hidden)


def test_fewer_users_than_groups_is_a_clear_error():
    with pytest.raises(InputError, match=r"lower ugm\.groups"):
        run(well_behaved, n=2)


def test_too_many_users_for_a_prompt_are_summarized_in_chunks_and_merged():
    sketches, report, llm = run(well_behaved, n=200, k=3, context_tokens=2000)
    assert report["levels"] >= 2
    assert len(sketches) == 3
    assert len({s.typical for s in sketches}) == 3
    lines = [len(re.findall(r"^User \d+: ", p, re.M)) for p in llm.prompts("summarize/1")]
    assert sum(lines) == 200, "everybody is in one chunk"
    assert max(lines) - min(lines) <= 6
    assert '"group"' in llm.prompts("summarize/2")[0], "the second level is asked about groups"


def test_a_context_without_room_is_an_error_with_the_remedy():
    with pytest.raises(InputError, match=r"ugm\.context_tokens"):
        run(well_behaved, n=50, k=10, context_tokens=600)


def test_a_title_or_tag_cannot_leave_its_line():
    crowd = people(6)
    crowd[2] = Person(User("evil", 30, EVIL, EVIL, {EVIL: EVIL}, [EVIL]))
    llm = ScriptedLLM(well_behaved)
    summarize(Interview(llm, "llm"), crowd, UGMSettings(groups=3))
    prompt = llm.prompts("summarize")[0]
    assert len(re.findall(r"^User \d+: ", prompt, re.M)) == 6
    assert len(re.findall(r"^Category 1", prompt, re.M)) == 1, "only our own form"
    assert "<|" not in prompt
    assert "</think>" not in prompt


def test_users_without_tags_and_other_scripts():
    crowd = [*people(5), Person(User("bare")), Person(User("zh", 60, "女", "退休", {}, ["养生", "广场舞"]))]
    llm = ScriptedLLM(well_behaved)
    summarize(Interview(llm, "llm"), crowd, UGMSettings(groups=2))
    prompt = llm.prompts("summarize")[0]
    assert "养生" in prompt
    assert "User 6: {}" in prompt


def test_a_typical_user_is_found_by_words_of_a_language_without_spaces():
    stubborn = "Category 1: 广场舞爱好者\nFeatures: 跳广场舞\nTypical user: User 99"
    crowd = [Person(User(f"u{i}", tags=[t])) for i, t in enumerate(["钓鱼视频", "教广场舞", "做饭"])]
    sketches, _ = summarize(Interview(ScriptedLLM(lambda _: stubborn), "llm"), crowd, UGMSettings(groups=1))
    assert sketches[0].typical == 1


def test_users_without_tags_are_shown_with_their_inferred_taste():
    seen = Person(User("seen"), (View(Video("v", "Chess", tags=["chess"]), play_rate=1.0),))
    rated = Person(User("rated"), (), Taste("Looks for slow films.", ("film noir",)))
    llm = ScriptedLLM(well_behaved)
    summarize(Interview(llm, "llm"), [*people(4), seen, rated], UGMSettings(groups=2))
    prompt = llm.prompts("summarize")[0]
    assert 'User 5: {"interests seen in the history": ["chess"]}' in prompt
    assert 'User 6: {"interests by ratings": ["film noir"], "taste": "Looks for slow films."}' in prompt


def test_answers_with_other_markup_are_understood():
    loose = (
        "**User definitions and typical features:**\n**Category 1:** Cooks\n**Features:** home\ncooking\n"
        "**Typical user:** User 2\n\ncategory 2: Fans\nfeatures: sport\ntypical user: 1"
    )
    assert find_categories(loose) == [Category("Cooks", "home cooking", 2), Category("Fans", "sport", 1)]


@pytest.mark.parametrize(
    ("typical", "cause"), [([1], "wrong_count"), ([1, 9], "unknown_typical"), ([1, 1], "same_typical")]
)
def test_failures_have_causes(typical, cause):
    with pytest.raises(AnswerError) as e:
        parse_categories(categories(typical), 2, 5)
    assert e.value.cause == cause


def test_verdicts_and_profiles():
    assert parse_verdict("Match or not: Yes\nReason: it fits").matched
    assert parse_verdict("```\nmatch or not : NO.\nReason: a\nb\n```").reason == "a b"
    assert parse_verdict("Match or not: Yes").reason == ""
    for bad in ("Yes", "Match or not: Maybe\nReason: x", "I think Match or not: Yes"):
        with pytest.raises(AnswerError, match="must begin"):
            parse_verdict(bad)
    with pytest.raises(AnswerError, match="more than"):
        parse_profile(" short ")


@pytest.mark.parametrize(
    ("text", "matched", "reason"),
    [
        ("**Match or not:** Yes\n**Reason:** fits", True, "fits"),
        ("Sure! Here is my answer.\n\nMatch or not: No\nReason: skips it", False, "skips it"),
        ("Match or not\uff1a No\nReason\uff1askips it", False, "skips it"),
        ("\u662f\u5426\u5339\u914d\uff1a\u662f\n\u7406\u7531\uff1a\u559c\u6b22", True, "\u559c\u6b22"),
        ("\u662f\u5426\u5339\u914d: \u5426\u3002\n\u539f\u56e0: x", False, "x"),
        ("- Match or not: **Yes**. Reason: both", True, "both"),
        ("Match or not: No, no interest in cats", False, "no interest in cats"),
        ("Match or not: Yes/No\nReason: one sentence\n\nMatch or not: No\nReason: why", False, "why"),
    ],
)
def test_verdicts_are_read_through_marks_preambles_and_chinese(text, matched, reason):
    verdict = parse_verdict(text)
    assert (verdict.matched, verdict.reason) == (matched, reason)


@pytest.mark.parametrize(
    "text",
    [
        "Match or not: Yes/No\nReason: one sentence",
        "Match or not: Yes or No\nReason: one sentence",
        "Match or not: Yes, no",
        "**Match or not**: **Yes** | **No**",
        "Match or not: Yes / No",
        "Match or not: Yes\nMatch or not: No",
        "Match or not: Yesterday",
        "Match or not:",
    ],
)
def test_the_form_itself_and_contradictions_are_no_verdict(text):
    with pytest.raises(AnswerError) as e:
        parse_verdict(text)
    assert e.value.cause == "no_verdict"


def test_categories_with_chinese_labels_are_understood():
    lines = [
        "\u7c7b\u522b1\uff1a\u7f8e\u98df",
        "\u7279\u5f81\uff1a\u559c\u6b22\u505a\u996d",
        "\u5178\u578b\u7528\u6237\uff1a\u7528\u6237 2",
    ]
    assert find_categories("\n".join(lines)) == [Category("\u7f8e\u98df", "\u559c\u6b22\u505a\u996d", 2)]


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 2500,
        "\n" * 1_000_000,
        "Category 1: " * 50_000,
        "Category 1: x\nFeatures: " + "\n" * 100_000,
        "Match or not: " * 100_000,
        " * " * 1_000_000,
        "Category 1: x\n" * 100_000,
        "x" * 10_000_000,
    ],
)
def test_hostile_answers_cost_no_time(text):
    began = time.monotonic()
    find_categories(text)
    for parse in (parse_verdict, parse_profile):
        with contextlib.suppress(AnswerError):
            parse(text)
    assert time.monotonic() - began < 2


def test_guides_are_parsed_by_the_parsers():
    assert re.fullmatch(PROFILE_REGEX, "They like cooking videos and quiet films, and skip what is loud.")
    assert re.fullmatch(categories_regex(3, 12), categories([1, 12, 3]))
    assert not re.fullmatch(categories_regex(3, 12), categories([1, 13, 3]))
    assert re.fullmatch(VERDICT_REGEX, "Match or not: No\nReason: they skip these")
