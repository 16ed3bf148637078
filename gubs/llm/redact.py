"""Keeps keys out of the journal, the logs and the errors, also where a server sends them back."""

import json
import os
import re
from collections.abc import Iterable, Sequence

from gubs.errors import SettingsError
from gubs.llm.settings import EndpointSettings

HIDDEN = "[hidden]"
_SHORTEST = 8
_KEY_LIKE = re.compile(r"(?i)(bearer\s+)[^\s\"',;}]+|\bsk-[\w-]{16,}")


class Secret:
    """A key on its way to an actor: it shows itself to nobody who prints it."""

    __slots__ = ("_value",)

    def __init__(self, value: str):
        self._value = value

    def reveal(self) -> str:
        """The key."""
        return self._value

    def __repr__(self) -> str:
        return f"Secret({HIDDEN})"


def read_keys(endpoints: dict[str, EndpointSettings]) -> dict[str, Secret]:
    """Keys from the environment, by endpoint.

    Raises:
        SettingsError: a variable that an endpoint names is not set.
    """
    keys = {}
    for name, endpoint in endpoints.items():
        if endpoint.api_key_env:
            value = os.environ.get(endpoint.api_key_env, "").strip()
            if not value:
                variable = endpoint.api_key_env
                raise SettingsError(
                    f"llm.endpoints.{name}: the environment variable {variable} with its key is not set"
                )
            keys[name] = Secret(value)
    return keys


class Redactor:
    """Replaces known keys in texts. Keys of fewer than eight characters (as `EMPTY`) are no secrets and stay."""

    def __init__(self, secrets: Iterable[Secret]):
        forms: set[str] = set()
        for secret in secrets:
            key = secret.reveal()
            if len(key) >= _SHORTEST:
                forms |= {key, json.dumps(key)[1:-1], json.dumps(key, ensure_ascii=False)[1:-1]}
        self._forms: Sequence[str] = sorted(forms, key=len, reverse=True)

    def known(self, text: str) -> str:
        """The text without our keys: for answers and prompts, where nothing else may change."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, HIDDEN)
        return text

    def message(self, text: str) -> str:
        """The text without our keys and without anything that looks like one: for errors and logs."""
        return _KEY_LIKE.sub(lambda m: (m[1] or "") + HIDDEN, self.known(text))
