"""The UFM's answers: `<think>...</think><answer>X</answer>`, written and strictly read.

Reading never raises and takes linear time (no regular expression looks at a whole answer), since the rewards read every
sample of every step.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from gubs.records import Option

_THINK, _THINK_END, ANSWER, ANSWER_END = TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TAG_LIKE = re.compile(r"<(?=[/|!A-Za-z])")
_AFTER_LETTER = ".:),;=/-–—．。：）、，"
"""Punctuation between an option's letter and its text, Western and Chinese."""
_QUOTES = "\"'“”‘’「」"
_OPENING = " \t\r\n*_`#([{（【" + _QUOTES
"""Allowed before a letter: emphasis, brackets, quotes."""
_CLOSING = " \t\r\n*_`)]}）】"
_LEAD = re.compile(r"(?:(?:my|the|final)\s+)*(?:option|answer|choice)\b(?:\s+is\b)?\s*[:=]?\s*", re.IGNORECASE)
"""Words before a letter, at the start of a text."""
_LONGEST_CHOICE = 1000


class Failure(StrEnum):
    """Why an answer does not have the required form."""

    EMPTY = "empty"
    TRUNCATED = "truncated"
    """It ends inside a part, or the token limit cut it off."""
    NO_THINK = "no_think"
    """The thinking part is missing, blank or not closed."""
    NO_ANSWER = "no_answer"
    """The answer part is missing."""
    OUT_OF_ORDER = "out_of_order"
    REPEATED_TAG = "repeated_tag"
    TEXT_BEFORE_THINK = "text_before_think"
    TEXT_BETWEEN = "text_between"
    TEXT_AFTER_ANSWER = "text_after_answer"
    BAD_OPTION = "bad_option"
    """The form is right, but the answer names no option of the question, or several."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer says."""

    option: Option | None
    """The option that the answer part names. Set even if the form is broken elsewhere (text after the answer, for
    example), as long as there is exactly one answer part: the choice can be rewarded without the form."""
    think: str
    """The thinking part; empty if the form is broken."""
    failure: Failure | None

    @property
    def ok(self) -> bool:
        """Right form, and an option of the question."""
        return self.failure is None

    @property
    def well_formed(self) -> bool:
        """Right form, whatever the answer part names (r_format of Eq. 4)."""
        return self.failure in (None, Failure.BAD_OPTION)


def read_answer(text: str, options: Collection[Option], *, finished: bool = True) -> Reading:
    """Reads an answer.

    Args:
        text: the model's output. White space around and between the two parts is allowed, anything else is not.
        options: options of the question (`TASK_OPTIONS[task]`).
        finished: the model ended the answer; False if the token limit cut it off.
    """
    body = text.strip()
    think, failure = _read_form(body)
    choice = _answer_part(body)
    option = None if choice is None else read_option(choice, options)
    if failure is None and option is None:
        failure = Failure.BAD_OPTION
    elif failure is not None and not finished:
        failure = Failure.TRUNCATED
    return Reading(option, think, failure)


def read_option(text: str, options: Collection[Option]) -> Option | None:
    """The option that a text names, as a person would read it: `B`, `b`, `(B)`, `**B**`, `Option B`, `B - because`,
    `B, ...`, `B Content`.

    The text may use other words than ours, but may not name another option (`A. or B`).
    """
    text = text.strip()
    if len(text) > _LONGEST_CHOICE:
        return None
    text = _LEAD.sub("", text.lstrip(_OPENING), 1).lstrip(_OPENING)
    letter, rest = text[:1], text[1:]
    option = next((o for o in options if letter.upper() == o.value), None)
    after = rest.lstrip(_CLOSING)
    if option is None or not after or not rest.strip(_CLOSING + _QUOTES):
        return option
    if not _follows_a_letter(letter, after, spaced=after != rest):
        return None
    others = {o.value for o in options} - {option.value}
    return None if any(_names(word, others, letter.islower()) for word in after.split()) else option


def as_answer(think: str, option: Option) -> str:
    """An answer in the required form. Tags and chat markers inside the thinking get a look-alike bracket.

    Raises:
        ValueError: the thinking is empty.
    """
    thought = quiet_tags(think).strip()
    if not thought:
        raise ValueError("an answer needs its thinking")
    return f"{_THINK}{thought}{_THINK_END}{ANSWER}{option.value}{ANSWER_END}"


def answer_without_thought(option: Option) -> str:
    """An answer with an empty thought: what a policy that was distilled is made to write."""
    return f"{_THINK}{_THINK_END}{ANSWER}{option.value}{ANSWER_END}"


def quiet_tags(text: str) -> str:
    """The text with `‹` for every `<` that could open a tag or a chat marker; "< 5 s" stays."""
    return _TAG_LIKE.sub("‹", text)


def _read_form(body: str) -> tuple[str, Failure | None]:
    """The thinking part, or what is wrong with the form."""
    think, think_end, answer, answer_end = (body.find(tag) for tag in TAGS)
    if failure := _parts_failure(body, think, think_end, answer, answer_end):
        return "", failure
    if body[:think]:
        return "", Failure.TEXT_BEFORE_THINK
    if body[think_end + len(_THINK_END) : answer].strip():
        return "", Failure.TEXT_BETWEEN
    if body[answer_end + len(ANSWER_END) :]:
        return "", Failure.TEXT_AFTER_ANSWER
    thought = body[think + len(_THINK) : think_end].strip()
    return thought, None if thought else Failure.NO_THINK


def _parts_failure(body: str, think: int, think_end: int, answer: int, answer_end: int) -> Failure | None:
    """Why there are not both parts, once each and in order (arguments: positions of the tags, -1 = absent)."""
    if not body:
        return Failure.EMPTY
    if any(body.count(tag) > 1 for tag in TAGS):
        return Failure.REPEATED_TAG
    if think < 0:
        return Failure.NO_THINK
    if think_end < 0:
        return Failure.TRUNCATED if answer < 0 else Failure.NO_THINK
    if answer < 0:
        return Failure.NO_ANSWER
    if answer_end < 0:
        return Failure.TRUNCATED
    return None if think < think_end < answer < answer_end else Failure.OUT_OF_ORDER


def _answer_part(body: str) -> str | None:
    """The text of the answer part, if there is exactly one."""
    if body.count(ANSWER) != 1 or body.count(ANSWER_END) != 1:
        return None
    start, end = body.find(ANSWER) + len(ANSWER), body.find(ANSWER_END)
    return body[start:end] if start <= end else None


def _follows_a_letter(letter: str, after: str, *, spaced: bool) -> bool:
    """Whether the text after a letter makes it a choice. A word may follow after a space; after an A it must begin a
    sentence, since "A user leaves" has an article and no choice.
    """
    if after[0] in _AFTER_LETTER:
        return True
    return spaced and (letter.upper() != "A" or after[0].isupper())


def _names(word: str, letters: Collection[str], lower: bool) -> bool:
    """Whether a word is one of the letters (`lower`: also in lower case); a bare "A" counts as the article."""
    bare = word.strip("()[]*,;/" + _AFTER_LETTER)
    named = bare.upper() if lower else bare
    return named in letters and (named != "A" or word.upper() != "A")
