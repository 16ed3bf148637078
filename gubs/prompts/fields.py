"""Makes texts from outside safe for a prompt.

A title may hold anything: line breaks, our delimiters, chat markers, instructions to the model. Here it becomes one
line of plain characters that cannot end its field (JSON quotes), cannot open or close a tag (angle brackets become
look-alikes) and cannot be a chat marker, in angle or square brackets. It stays readable; the templates tell the model
that it is data.
"""

import json
import re
import unicodedata
from collections.abc import Mapping

_LOOKALIKES = str.maketrans({"<": "‹", ">": "›", "`": "'", "{": "(", "}": ")"})
_QUIET = str.maketrans({"<": "‹", ">": "›"})
_READ = 4
"""How many times its limit is read of a text: more than invisible characters take up in any honest text."""
PICTURES = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Our prompts put it where pictures belong; texts from outside may not contain it."""
_MARKER = re.compile(r"\[(/?[A-Z][A-Z_]{2,30})\]")
"""Chat markers in square brackets: [INST], [/INST], [TOOL_CALLS] and their kind."""
_JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiners: part of the spelling between letters (Persian, Hindi) and of some emoji."""
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of invisible characters: control, format (direction marks), surrogates, private use, line ends."""


def plain(text: str, limit: int = 200) -> str:
    """One line of at most `limit` visible characters (a longer text ends with …), without angle brackets."""
    line = _harmless(text[: _READ * limit]).translate(_LOOKALIKES)
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def inline(text: object, limit: int = 200) -> str:
    """A text as a quoted field: JSON string of `plain(text)`; `unknown` for None."""
    return "unknown" if text is None else json.dumps(plain(str(text), limit), ensure_ascii=False)


def record(values: Mapping[str, object], limit: int = 200, limits: Mapping[str, int] | None = None) -> str:
    """Several fields as one line of JSON, without unknown ones (None, empty).

    Args:
        values: field name -> value.
        limit: characters per text.
        limits: the same for single fields, by name.
    """
    limits = limits or {}
    present = {k: v for k, v in values.items() if v not in (None, "", [], {}, ())}
    return json.dumps({plain(k, 60): _clean(v, limits.get(k, limit)) for k, v in present.items()}, ensure_ascii=False)


def unnamed(line: str) -> str:
    """A `record` without its field names, just as safe: for small models, which recognize fields by their place and for
    which every token costs.
    """
    return json.dumps(list(json.loads(line).values()), ensure_ascii=False)


def block(text: str, limit: int = 20000) -> str:
    """A text of several lines (a group profile): every line is made `plain` and quoted by a leading bar.

    So no line can look like one of ours, which start without the bar.
    """
    lines = [plain(line, limit) for line in text[: _READ * limit].splitlines() if line]
    quoted = "\n".join(f"| {line}" for line in lines if line)
    return quoted if len(quoted) <= limit else quoted[: limit - 1] + "…"


def quoted_answer(text: str, limit: int) -> str:
    """A model's own answer, to be shown to it again: line by line as harmless as `plain`, but JSON stays JSON."""
    lines = (_harmless(line).translate(_QUIET) for line in text[:limit].splitlines())
    return "\n".join(line for line in lines if line)


def _harmless(text: str) -> str:
    """One line of visible characters without chat markers."""
    normal = text if text.isascii() else unicodedata.normalize("NFC", text)
    visible = normal if normal.isprintable() and PICTURES not in normal else _visible(normal)
    line = " ".join(visible.split())
    return _MARKER.sub(r"(\1)", line) if "[" in line else line


def _visible(text: str) -> str:
    return "".join(
        " " if c == PICTURES or (unicodedata.category(c) in _INVISIBLE and not _joins(text, i)) else c
        for i, c in enumerate(text)
    )


def _joins(text: str, i: int) -> bool:
    """Whether the character is a joiner between two letters or two pictures."""
    sides = text[i - 1 : i], text[i + 1 : i + 2]
    return text[i] in _JOINERS and all(s and unicodedata.category(s)[0] in "LMS" for s in sides)


def _clean(value: object, limit: int) -> object:
    if isinstance(value, str):
        return plain(value, limit)
    if isinstance(value, Mapping):
        return {plain(str(k), 60): _clean(v, limit) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_clean(v, limit) for v in value]
    return value
