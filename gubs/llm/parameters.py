"""Which parameters an endpoint takes: all at first; what it refuses is renamed or left out."""

import re

from gubs.artifacts import JsonObject
from gubs.llm.structured import UNSUPPORTED
from gubs.llm.wire import AttemptError

_LIMITS = ("max_tokens", "max_completion_tokens")
"""Two names of one parameter."""
_STRUCTURE = ("response_format", "structured_outputs", "guided_")
_OPTIONAL = ("temperature", "top_p", "seed")
"""Reasoning models take some of them at their default only."""


class Parameters:
    """What was learned from an endpoint's refusals."""

    def __init__(self) -> None:
        self._left_out: set[str] = set()
        self._renamed: dict[str, str] = {}

    def fit(self, parameters: JsonObject) -> JsonObject:
        """The parameters as the endpoint takes them."""
        return {self._renamed.get(n, n): value for n, value in parameters.items() if n not in self._left_out}

    def adapt(self, sent: JsonObject, fault: AttemptError) -> str:
        """Learns from a refusal of the fields `sent`; what will be different, or "" if it is about something else."""
        if not UNSUPPORTED.search(fault.message):
            return ""
        refused = next((n for n in (*_LIMITS, *_OPTIONAL) if n in sent and _names(fault, n)), "")
        if refused in _OPTIONAL:
            self._left_out.add(refused)
            return f"without {refused}"
        if not refused or (self._renamed and refused not in self._renamed):  # neither name is taken
            return ""
        other = self._renamed.setdefault(refused, _LIMITS[1 - _LIMITS.index(refused)])
        return f"with {other} for {refused}"


def named(sent: JsonObject, fault: AttemptError) -> list[str]:
    """The fields of a request that a refusal names; any refusal may speak of a model or of messages."""
    if fault.parameter:
        return [fault.parameter]
    return [n for n in sent if n not in ("model", "messages") and _names(fault, n)]


def may_be_about_structure(sent: JsonObject, fault: AttemptError) -> bool:
    """Whether another way to ask for structure may help: the refusal names that field, or none."""
    names = named(sent, fault)
    return not names or any(n.startswith(_STRUCTURE) for n in names)


def _names(fault: AttemptError, parameter: str) -> bool:
    if fault.parameter:
        return fault.parameter == parameter
    return bool(re.search(rf"(?<!\w){re.escape(parameter)}(?!\w)", fault.message))
