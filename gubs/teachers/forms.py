"""The forms in which teachers answer: JSON schemas, and checks beyond them.

The paper's annotator answers in the UFM's own form. Here it gives the same two parts as JSON: reasoning models also put
their hidden reasoning in a leading `<think>` part, which endpoints separate from the answer. The UFM's form is composed
of the two parts afterwards (`gubs.prompts.answers.as_answer`).
"""

from collections.abc import Sequence

from gubs.artifacts import JsonObject
from gubs.prompts.fields import plain
from gubs.records import Option

_CHARS_PER_WORD = 7
_TAG_CHARS = 40


class BlankTextError(ValueError):
    """A text that the form requires has no visible character."""

    def __init__(self, name: str):
        super().__init__(f'"{name}" must not be blank')
        self.cause = f"no_{name}"


def thought_form(options: Sequence[Option], max_chars: int) -> JsonObject:
    """Chain of thought, then the option."""
    return _object(think=_text(max_chars), answer={"type": "string", "enum": [o.value for o in options]})


def label_form(options: Sequence[Option], max_chars: int) -> JsonObject:
    """Rationale, then the option."""
    return _object(rationale=_text(max_chars), option={"type": "string", "enum": [o.value for o in options]})


def verdict_form(max_chars: int) -> JsonObject:
    """Criticism, then yes or no."""
    return _object(criticism=_text(max_chars), valid={"type": "string", "enum": ["yes", "no"]})


def profile_form(max_chars: int) -> JsonObject:
    """A user's profile and interest tags."""
    tags = {"type": "array", "items": _text(_TAG_CHARS), "minItems": 1, "maxItems": 8}
    return _object(profile=_text(max_chars), tags=tags)


def checked(value: JsonObject) -> JsonObject:
    """The parser of all forms: texts are stripped and may not be blank, tags become plain and unique.

    Raises:
        BlankTextError: a text is blank.
    """
    clean = {name: part.strip() if isinstance(part, str) else part for name, part in value.items()}
    if "tags" in clean:
        clean["tags"] = list(dict.fromkeys(filter(None, (plain(t, _TAG_CHARS) for t in clean["tags"]))))
    for name, part in clean.items():
        if not part or (isinstance(part, str) and not plain(part)):
            raise BlankTextError(name)
    return clean


PARSER = f"{__name__}:{checked.__name__}"
"""The name of `checked` in requests."""


def words(max_chars: int) -> int:
    """Number of words to ask for, so that a text stays within `max_chars` characters."""
    return max(10, max_chars // _CHARS_PER_WORD // 10 * 10)


def _text(max_chars: int) -> JsonObject:
    return {"type": "string", "minLength": 1, "maxLength": max_chars}


def _object(**properties: JsonObject) -> JsonObject:
    return {
        "type": "object",
        "properties": properties,  # in this order: a model has to reason before it decides
        "required": list(properties),
        "additionalProperties": False,
    }
