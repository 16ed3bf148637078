"""Models' answers about groups, parsed; an `AnswerError` says what is wrong, for the re-ask and the counts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CATEGORY = re.compile(
    r"^\W*Category\s+(\d+)\W*?:[ \t*]*(?P<name>.+?)\s*"
    r"^\W*Features\W*?:(?P<features>.*?)"
    r"^\W*Typical user\W*?:[ \t*]*(?:User\s*)?#?(?P<user>\d+)",
    re.M | re.S | re.I,
)
_VERDICT = re.compile(r"\s*Match or not\s*:\s*(Yes|No)\b[.\s]*(?:Reason\s*:(.*))?", re.S | re.I)
_FENCE = re.compile(r"^```\w*\n(.*)\n```$", re.S)
_MIN_PROFILE = 20
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
    """All categories that a text has, well-formed as a whole or not."""
    parts = ((_line(m["name"]), _line(m["features"]), int(m["user"])) for m in _CATEGORY.finditer(text))
    return [Category(name, features, user) for name, features, user in parts if name and features]


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
    """Reads `Match or not: Yes/No` and the reason.

    Raises:
        AnswerError: no_verdict.
    """
    m = _VERDICT.match(_unfenced(text))
    if not m:
        raise AnswerError("no_verdict", 'it must begin with "Match or not: Yes" or "Match or not: No"')
    return Verdict(m[1].casefold() == "yes", _line(m[2] or ""))


def parse_profile(text: str) -> str:
    """The text of a profile.

    Raises:
        AnswerError: too_short.
    """
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


def _line(text: str) -> str:
    return " ".join(text.replace("**", " ").split())


def _unfenced(text: str) -> str:
    text = text.strip()
    m = _FENCE.match(text)
    return m[1].strip() if m else text
