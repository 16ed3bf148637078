"""Texts from outside, made safe to stand in a prompt.

A title may hold anything: line breaks, our own delimiters, chat markers, instructions to the model. Here it becomes one
line of plain characters that cannot end its field (JSON quotes), cannot open or close a tag (angle brackets become
look-alikes) and cannot be a chat marker. What it says stays readable; that it is data, the templates say.
"""

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

_LOOKALIKES = str.maketrans({"<": "‹", ">": "›", "`": "'", "{": "(", "}": ")"})
PICTURES = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Our own prompts put it where pictures belong; text from outside may not."""
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that show nothing: control, format (direction marks too), surrogates, private use, line ends."""


def plain(text: str, limit: int = 200) -> str:
    """One line of visible characters, at most `limit` of them (then it ends with …), without angle brackets."""
    normal = unicodedata.normalize("NFC", text)
    visible = "".join(" " if c == PICTURES or unicodedata.category(c) in _INVISIBLE else c for c in normal)
    line = " ".join(visible.split()).translate(_LOOKALIKES)
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def inline(text: Any, limit: int = 200) -> str:
    """A text as a quoted field: JSON string of `plain(text)`; `unknown` for None."""
    return "unknown" if text is None else json.dumps(plain(str(text), limit), ensure_ascii=False)


def record(values: Mapping[str, Any], limit: int = 200) -> str:
    """Several fields as one line of JSON; unknown (None, empty) ones are left out."""
    return json.dumps(
        {plain(k, 60): _clean(v, limit) for k, v in values.items() if v not in (None, "", [], {})}, ensure_ascii=False
    )


def unnamed(line: str) -> str:
    """A `record` without the names of its fields, as safe as it was: for small models, which need no words to know by
    place what is what, and for which every token is work.
    """
    return json.dumps(list(json.loads(line).values()), ensure_ascii=False)


def block(text: str, limit: int = 20000) -> str:
    """A longer text of several lines (a group profile): every line made `plain`, quoted by a leading bar.

    No line can look like a line of ours, since all of ours start without the bar.
    """
    lines = [plain(line, limit) for line in text.splitlines()]
    kept = "\n".join(f"| {line}" for line in lines if line)
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def _clean(value: Any, limit: int) -> Any:
    if isinstance(value, str):
        return plain(value, limit)
    if isinstance(value, Mapping):
        return {plain(str(k), 60): _clean(v, limit) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_clean(v, limit) for v in value]
    return value
