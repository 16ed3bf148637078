"""Keeps keys out of the journal, the logs and the errors, even if a server sends them back."""

import json
import os
import re
from collections.abc import Iterable

from pydantic import SecretStr

from gubs.errors import SettingsError
from gubs.llm.settings import EndpointSettings

HIDDEN = "[hidden]"
_SHORTEST = 8
_KEY_LIKE = re.compile(r"(?i)(bearer\s+)[^\s\"',;}]+|\bsk-[\w-]{16,}")


def read_keys(endpoints: dict[str, EndpointSettings]) -> dict[str, SecretStr]:
    """Keys from the environment, by endpoint.

    Raises:
        SettingsError: a variable that an endpoint names is not set.
    """
    keys = {}
    for name, endpoint in endpoints.items():
        if variable := endpoint.api_key_env:
            value = os.environ.get(variable, "").strip()
            if not value:
                raise SettingsError(f"llm.endpoints.{name}: set the environment variable {variable} to its key")
            keys[name] = SecretStr(value)
    return keys


class Redactor:
    """Replaces keys in texts. Keys of fewer than eight characters (`EMPTY`) are not secrets and stay."""

    def __init__(self, secrets: Iterable[SecretStr]):
        forms: set[str] = set()
        for secret in secrets:
            key = secret.get_secret_value()
            if len(key) >= _SHORTEST:
                forms |= {key, json.dumps(key)[1:-1], json.dumps(key, ensure_ascii=False)[1:-1]}
        self._forms = sorted(forms, key=len, reverse=True)

    def hide_keys(self, text: str) -> str:
        """The text without our keys: for answers and prompts, where nothing else may change."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, HIDDEN)
        return text

    def hide_all(self, text: str) -> str:
        """The text without our keys and without anything that looks like one: for errors and logs."""
        return _KEY_LIKE.sub(lambda m: (m[1] or "") + HIDDEN, self.hide_keys(text))
