"""The forms in which teachers answer: JSON schemas, and what is checked beyond them.

The paper's annotator answers in the UFM's own form. Here it gives the same two parts as JSON, since a `<think>` part at
the head of an answer is also how reasoning models mark what is not meant to be read, and endpoints keep that apart;
the UFM's form is written from the two parts afterwards (`gubs.prompts.answers.as_answer`).
"""

from collections.abc import Sequence
from typing import Any

from gubs.prompts.fields import plain
from gubs.records import Option

_CHARS_PER_WORD = 7
_TAG_CHARS = 40


class BlankTextError(ValueError):
    """A text that the form requires has no visible character."""

    def __init__(self, name: str):
        super().__init__(f'"{name}" must not be blank')
        self.cause = f"no_{name}"


def thought_form(options: Sequence[Option], max_chars: int) -> dict[str, Any]:
    """Chain of thought, then the option."""
    return _object(think=_text(max_chars), answer={"type": "string", "enum": [o.value for o in options]})


def label_form(options: Sequence[Option], max_chars: int) -> dict[str, Any]:
    """Rationale, then the option."""
    return _object(rationale=_text(max_chars), option={"type": "string", "enum": [o.value for o in options]})


def verdict_form(max_chars: int) -> dict[str, Any]:
    """Criticism, then yes or no."""
    return _object(criticism=_text(max_chars), valid={"type": "string", "enum": ["yes", "no"]})


def profile_form(max_chars: int) -> dict[str, Any]:
    """A user's profile and interest tags."""
    tags = {"type": "array", "items": _text(_TAG_CHARS), "minItems": 1, "maxItems": 8}
    return _object(profile=_text(max_chars), tags=tags)


def checked(value: dict[str, Any]) -> dict[str, Any]:
    """The parser of all forms: texts are stripped and may not be blank, tags become plain and lose their doubles.

    Raises:
        BlankTextError: a text is blank.
    """
    clean = {k: v.strip() if isinstance(v, str) else v for k, v in value.items()}
    if "tags" in clean:
        tags = (plain(t, _TAG_CHARS) for t in clean["tags"])
        clean["tags"] = list(dict.fromkeys(t for t in tags if t))
    for name, text in clean.items():
        if not text or (isinstance(text, str) and not plain(text)):
            raise BlankTextError(name)
    return clean


PARSER = f"{__name__}:{checked.__name__}"
"""`checked`, as requests name it."""


def words(max_chars: int) -> int:
    """Words to ask for, so that a text stays within a number of characters."""
    return max(10, max_chars // _CHARS_PER_WORD // 10 * 10)


def _text(max_chars: int) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": max_chars}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,  # in this order: the reasons come before the verdict
        "required": list(properties),
        "additionalProperties": False,
    }
