"""What an author writes is about the group, and claims that the records contradict are found."""

import pytest

from gubs.ugm.checks import Evidence, complete, fault_of, fault_of_name, unsupported, without
from gubs.ugm.profiles import instructions


@pytest.fixture
def evidence(records):
    return Evidence(records.findings([f"u{i}" for i in range(10)]), ["cooking", "football", "travel"])


@pytest.mark.parametrize(
    "text",
    [
        "xxx",
        'Name: [Your Name]\nCustom user: "xxx"',
        "A helpful AI assistant named SmolLM, trained on a vast array of texts, is ready to help.",
        "As an AI language model, I cannot know this group.",
        "Here's a breakdown of how you can improve your profile and make the best decision for the group.",
        "作为一个AI语言模型，我无法回答。",
        "You can see in your profile that cooking suits them.",
        "Please enter your name.",
        "They like cooking.\nYour answer: cooking",
        "Based on your profile, cooking suits best.",
        "I have updated your profile.",
        "Thank you for your answer.",
        "Name: <your name>",
        "The members like <topic> and skip <tags>.",
        "<group name>: retired women who cook.",
        "They like their family, they love their family. " * 6,
        "Write the profile of this group as a whole and what should change in recommending to it.",
    ],
)
def test_texts_that_are_not_about_the_group(text):
    assert fault_of(text, instructions())


@pytest.mark.parametrize(
    "text",
    [
        "Retired women who cook every day. They finish short recipes and skip football at once.",
        "喜欢养生和美食的退休用户，反感标题党。",
        "Members like what they list; show them short and friendly videos.",
        "They like <b>cooking</b> and <i>travel</i>.<br>They skip football.",
        "They are < thirty and watch > ten videos a day.",
        'They finish quizzes such as "What does your name mean?" and skip “your profile in ten seconds”.',
        "They like videos on what your name says about you, and skip tests of your profile picture.",
        "They prefer what calms them, negative or unpleasant content drives them away.",
        "Here is the revised profile of this group:\nWhat drives them away (negative or unpleasant content, style of "
        "titles): they leave at the first crude word, and titles in capitals are skipped by nearly all of them.",
    ],
)
def test_texts_that_are(text):
    assert fault_of(text, instructions()) == ""


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        ("They love football.", "skip football"),
        ("They skip cooking videos.", "like cooking"),
        ("They prefer videos over 90 s.", "most videos of over 90 s are skipped"),
        ("Videos under 15 seconds are skipped.", "played longest"),
        ("About 60 % of them are female.", "60 %"),
        ("Put off by: vulgar words", "no more than all users"),
        ("Likes: cooking, cooking, travel", "twice"),
    ],
)
def test_claims_that_do_not_hold(claim, why, evidence):
    claims = unsupported(f"They like cooking.\n{claim}", evidence)
    assert list(claims) == [claim]
    assert why in claims[claim]
    assert without(f"They like cooking.\n{claim}", claims) == "They like cooking."


@pytest.mark.parametrize(
    "claim",
    [
        "They like cooking and skip football.",
        "They enjoy travel.",  # nothing is known
        "They like cooking, but not football.",
        "They watch cooking rather than football.",
        "Videos of 10 s suit them best.",
        "They skip 100 % of football.",
        "Put off by: titles that promise more than the video shows",
        "Lengths: under 15 s suits best",
        "Avoid long videos, over 2 minutes.",
        "Recommend more cooking, at most 15 seconds.",
    ],
)
def test_claims_that_hold_or_cannot_be_checked(claim, evidence):
    assert unsupported(claim, evidence) == {}


def test_a_topic_is_a_whole_word(records):
    findings = records.findings([f"u{i}" for i in range(10)])
    evidence = Evidence(findings, ["car", "养生"])
    assert evidence.mentioned("They care for cards and like 养生茶.") == ["养生"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("xxx", "placeholder"),
        ("Category 2", "placeholder"),
        ("Group 3", "nothing"),
        ("Cooks", "same name"),
        ("Football fans", "football"),
        ("A helpful assistant", "assistant"),
    ],
)
def test_names_that_cannot_stand(name, why, evidence):
    assert why in fault_of_name(name, evidence, ["COOKS"])


def test_names_that_can(evidence):
    for name in ("Home cooking lovers", "Health-minded retirees", "Fans of cooking"):
        assert fault_of_name(name, evidence, ["Gamers"]) == ""


def test_a_profile_is_complete_if_it_says_what_the_evidence_says(evidence):
    assert complete("They cook: cooking every day, under 15 s. Football is skipped.", evidence)
    assert not complete("They cook: cooking every day, under 15 s.", evidence), "what do they skip?"
    assert not complete("They watch short and friendly videos of 10 s, no football.", evidence), "what do they like?"
    assert not complete("They cook: cooking every day, no football.", evidence), "which lengths?"
