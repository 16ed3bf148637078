"""Models' answers about groups, parsed; an `AnswerError` says what is wrong, for the re-ask and the counts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_EMPHASIS = " \t*_#>-•`"
_COLONS = ":\uff1a"
_CATEGORY_LABEL = re.compile(r"(?:Category|Group|类别|分类|群组|组别|第)\s*(\d{1,4})\s*(?:类|组)?", re.I)
_FEATURES_LABEL = re.compile(r"(?:Features|特征|特点|典型特征)", re.I)
_TYPICAL_LABEL = re.compile(r"(?:Typical\s+user|典型用户|代表用户)", re.I)
_USER = re.compile(r"(?:User|用户)?\s*#?\s*(\d{1,9})", re.I)
_VERDICT_LABEL = re.compile(r"(?:Match\s+or\s+not|是否匹配|匹配与否|匹配)", re.I)
_REASON_LABEL = re.compile(r"(?:Reason|原因|理由)", re.I)
_YES, _NO = {"yes", "是", "是的", "匹配", "符合"}, {"no", "否", "不是", "不匹配", "不符合"}
_OTHER = re.compile(r"[/|\\\uff0f]|[,\uff0c]?\s*(?:or|and|或|和)?\s*(?:yes|no|是|否)(?:\W*$|\W+Reason)", re.I)
"""Behind a verdict: the form's second word, so that nothing was decided."""
_VERDICT_END = " \t.,;!*_`\u3002\uff0c\uff1b\uff01"
_MIN_PROFILE = 20
_LONGEST_PROFILE = 20_000
_LONGEST_LINE = 4000
_LONGEST_ANSWER = 200_000
"""Characters that are read of a line, of an answer."""
_SPECIAL, _ESCAPED = re.compile(r"([\\.^$*+?{}\[\]|()])"), r"\\\1"


class AnswerError(ValueError):
    """An answer that cannot be used; failures are counted by `cause`."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Category:
    """One group as the summarizer described it."""

    name: str
    features: str
    typical: int
    """Number of the typical user in the prompt's list, from 1."""


def find_categories(text: str) -> list[Category]:
    """All categories that a text has, well-formed as a whole or not. Reads line by line, in linear time."""
    categories: list[Category] = []
    name, features, part = "", [""], ""
    for line in filter(str.strip, text[:_LONGEST_ANSWER].splitlines()):
        if rest := _labelled(line, _CATEGORY_LABEL):
            name, features, part = rest, [], "name"
        elif (rest := _labelled(line, _FEATURES_LABEL)) is not None:
            features, part = [rest], "features"
        elif (rest := _labelled(line, _TYPICAL_LABEL)) is not None:
            user = _USER.match(rest.strip(_EMPHASIS))
            if user and _line(name) and _line(" ".join(features)):
                categories.append(Category(_line(name), _line(" ".join(features)), int(user[1])))
            name, features, part = "", [], ""
        elif part == "features":
            features.append(line)
    return categories


def parse_categories(text: str, groups: int, users: int) -> list[Category]:
    """Exactly `groups` categories whose typical users exist and differ.

    Raises:
        AnswerError: wrong_count, unknown_typical or same_typical.
    """
    # The messages go back to the model (and into the keys of the journal): they are prompts.
    categories = find_categories(text)
    if len(categories) != groups:
        raise AnswerError(
            "wrong_count", f"it has {len(categories)} complete categories (name, features, typical user), not {groups}"
        )
    unknown = [c.typical for c in categories if not 1 <= c.typical <= users]
    if unknown:
        raise AnswerError(
            "unknown_typical", f"typical users must be of the list, 1 to {users}; there is no User {unknown[0]}"
        )
    if len({c.typical for c in categories}) < groups:
        raise AnswerError(
            "same_typical", "every group needs a typical user of its own; one user is typical of two groups"
        )
    return categories


@dataclass(frozen=True)
class Verdict:
    """The matcher's answer (Eq. 3)."""

    matched: bool
    reason: str


def parse_verdict(text: str) -> Verdict:
    """Reads `Match or not: Yes` (or `No`) and the reason; other lines may stand before, and marks around.

    Raises:
        AnswerError: no_verdict; so is the form itself (`Yes/No`), and both a Yes and a No.
    """
    lines = [line for line in _unfenced(text[:_LONGEST_ANSWER]).splitlines() if line.strip()]
    verdicts: dict[bool, tuple[int, str]] = {}
    for number, line in enumerate(lines):
        if (rest := _labelled(line, _VERDICT_LABEL)) is not None and (verdict := _yes_or_no(rest)) is not None:
            verdicts.setdefault(verdict, (number, rest))
    if len(verdicts) != 1:
        raise AnswerError("no_verdict", 'it must begin with "Match or not: Yes" or "Match or not: No"')
    ((matched, (number, rest)),) = verdicts.items()
    return Verdict(matched, _reason(rest, lines[number + 1 :]))


def parse_profile(text: str) -> str:
    """The text of a profile.

    Raises:
        AnswerError: too_short, too_long.
    """
    if len(text) > _LONGEST_PROFILE:
        raise AnswerError("too_long", f"a profile must have fewer than {_LONGEST_PROFILE:,} characters")
    profile = _unfenced(text)
    if len(profile) < _MIN_PROFILE:
        raise AnswerError("too_short", f"a profile needs more than {_MIN_PROFILE} characters")
    return profile


def categories_regex(groups: int, users: int, names: Sequence[str] = ()) -> str:
    """Pattern of the form that `parse_categories` reads, for engines that enforce one; lines are short, for small
    models. With `names` (tags), groups are named and described by these alone.
    """
    user = "|".join(map(str, range(1, users + 1)))
    tag = one_of(names)
    name = rf"Fans of {tag} and {tag}" if names else r"[A-Za-z][^\n]{1,40}"
    features = rf"{tag}, {tag}, {tag}" if names else r"[A-Za-z][^\n]{1,80}"
    one = (rf"Category {g}: {name}\nFeatures: {features}\nTypical user: User ({user})" for g in range(1, groups + 1))
    return "User definitions and typical features:\\n" + "\\n".join(one)


def profile_regex(topics: Sequence[str], complaints: Sequence[str], lengths: Sequence[str]) -> str:
    """Pattern of `profile_form`: a small model chooses from lists of what is there."""
    topic = one_of(topics)
    return (
        rf"Likes: {topic}, {topic}, {topic}\nSkips: {topic}, {topic}\nPut off by: {one_of(complaints)}"
        rf"\nLengths: {one_of(lengths)} suits best"
    )


def profile_form(topics: Sequence[str], complaints: Sequence[str], lengths: Sequence[str]) -> str:
    """The same form for the prompt."""
    return (
        f"Likes: three of {', '.join(topics)}\nSkips: two of them\n"
        f"Put off by: one of {', '.join(complaints)}\nLengths: one of {', '.join(lengths)} suits best"
    )


def one_of(choices: Sequence[str]) -> str:
    """Pattern of a choice between texts."""
    return f"({'|'.join(_SPECIAL.sub(_ESCAPED, c) for c in choices)})"


VERDICT_REGEX = r"Match or not: (Yes|No)\nReason: [A-Za-z][^\n]{1,80}"


PROFILE_REGEX = r"[A-Z][^\n]{40,240}\."
"""For engines that enforce a form: one line that ends."""


def _labelled(line: str, label: re.Pattern[str]) -> str | None:
    """What follows a label and its colon in a line, whatever marks stand around the label; None without it."""
    line = line[:_LONGEST_LINE].lstrip(_EMPHASIS)
    m = label.match(line)
    if not m:
        return None
    rest = line[m.end() :].lstrip(_EMPHASIS)
    return rest[1:].strip(_EMPHASIS) if rest[:1] and rest[0] in _COLONS else None


def _yes_or_no(text: str) -> bool | None:
    """The verdict at the start of a text; None for neither, or for both (`Yes/No`)."""
    word = re.match(r"[A-Za-z]+|[\u4e00-\u9fff]+", text)
    if not word or _OTHER.match(text[word.end() :].lstrip(_EMPHASIS)):
        return None
    text = word[0].casefold()
    return True if text in _YES else False if text in _NO else None


def _reason(text: str, following: list[str]) -> str:
    """The reason: behind the verdict on its line, or in the lines that follow."""
    rest = re.sub(r"^(?:[A-Za-z]+|[\u4e00-\u9fff]+)", "", text).lstrip(_VERDICT_END)
    texts = [rest, *following] if rest.strip() else following
    if not texts:
        return ""
    first = _labelled(texts[0], _REASON_LABEL)
    return _line(" ".join([texts[0] if first is None else first, *texts[1:]])[:_LONGEST_LINE]) if texts else ""


def _line(text: str) -> str:
    return " ".join(text.replace("**", " ").split())


def _unfenced(text: str) -> str:
    text = text.strip()
    if not (text.startswith("```") and text.endswith("```") and "\n" in text):
        return text
    return text[text.index("\n") : -3].strip()
