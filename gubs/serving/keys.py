"""API keys: hashed at rest, compared in constant time, each with a rate limit.

A key has 256 random bits, so a plain SHA-256 of it cannot be guessed back.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gubs.errors import SettingsError

_PREFIX = "gubs_"
_LOOK_S = 1.0
"""Between two looks whether the file of the keys has changed."""
_log = logging.getLogger("ray.serve")


class ApiKey(BaseModel):
    """One client's key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    candidates_per_minute: float = Field(6000.0, gt=0)

    @property
    def salt(self) -> str:
        """Sets the prompts of this key apart in an engine's cache; nobody can tell the key, or its hash, from it."""
        return _digest(self.sha256)[:16]


def read_keys(path: str | Path) -> list[ApiKey]:
    """The keys in a file.

    Raises:
        SettingsError: it is missing, unreadable or has no key.
    """
    try:
        keys = [_key_of(row) for row in json.loads(Path(path).read_text())]
    except (OSError, ValueError, ValidationError) as e:
        raise SettingsError(
            f"cannot read API keys from {path}: {str(e).splitlines()[0]}; `gubs serve key` makes one"
        ) from None
    if not keys:
        raise SettingsError(f"{path} has no API key; `gubs serve key` makes one")
    return keys


def _key_of(row: object) -> ApiKey:
    if isinstance(row, dict):
        row = {name: value for name, value in row.items() if name != "admin"}  # earlier versions wrote it, to no effect
    return ApiKey.model_validate(row)


def add_key(path: str | Path, name: str, candidates_per_minute: float) -> str:
    """Makes a key, adds its hash to a file that only the owner reads, and returns it: it is nowhere else."""
    path = Path(path)
    keys = read_keys(path) if path.exists() else []
    if any(k.name == name for k in keys):
        raise SettingsError(f"{path} has a key named {name!r} already")
    key = _PREFIX + secrets.token_urlsafe(32)
    keys.append(ApiKey(name=name, sha256=_digest(key), candidates_per_minute=candidates_per_minute))
    temporary = path.with_suffix(".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        json.dump([k.model_dump() for k in keys], f, indent=1)
    temporary.rename(path)
    return key


class KeyRing:
    """Recognises keys and keeps each within its rate: a bucket of one minute's candidates that fills steadily."""

    def __init__(self, keys: Sequence[ApiKey], clock: Callable[[], float] = time.monotonic, replicas: int = 1):
        """Fills the buckets.

        Args:
            keys: the keys.
            clock: seconds.
            replicas: how many rings share the keys' rates; this one admits an equal part of each.
        """
        self._keys, self._clock, self._replicas = list(keys), clock, replicas
        self._left: dict[str, tuple[float, float]] = {}
        """Name of a key -> candidates in its bucket, and since when. A key that has not asked yet has a full one."""

    def find(self, header: str | None) -> ApiKey | None:
        """The key of an Authorization header (`Bearer KEY`); None if it is none of ours. Compares with every key."""
        scheme, _, key = (header or "").partition(" ")
        digest = _digest(key.strip())
        matching = [k for k in self._keys if hmac.compare_digest(k.sha256, digest)]
        return matching[0] if matching and scheme.lower() == "bearer" else None

    def wait(self, key: ApiKey, candidates: int) -> float:
        """Takes so many candidates from the key's bucket; returns 0, or the seconds after which it may ask again.

        More than a bucket holds are admitted when it is full. They leave it below zero, so that the key waits until
        they are made up for: over the minutes it gets its rate and no more.
        """
        most, now = key.candidates_per_minute / self._replicas, self._clock()
        left, since = self._left.get(key.name, (most, now))
        left = min(most, left + (now - since) * most / 60)
        missing = min(candidates, most) - left
        self._left[key.name] = (left if missing > 0 else left - candidates, now)
        return max(0.0, missing / (most / 60))


class KeyFile(KeyRing):
    """The keys of a file as it is now: one that is added or taken away counts within a second or so."""

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.monotonic, replicas: int = 1):
        """Reads the file. Raises `SettingsError`; see `read_keys`."""
        super().__init__(read_keys(path), clock, replicas)
        self._path, self._stamp, self._looked = Path(path), _stamp(path), clock()

    def find(self, header: str | None) -> ApiKey | None:
        """See `KeyRing.find`."""
        if self._clock() - self._looked >= _LOOK_S:
            self._looked = self._clock()
            self._read_again()
        return super().find(header)

    def _read_again(self) -> None:
        """Reads the file if it has changed. One that cannot be read changes nothing: the keys before it go on."""
        if (stamp := _stamp(self._path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except SettingsError as e:
            _log.error("the keys stay as they were: %s", e)


def _stamp(path: str | Path) -> tuple[int, ...]:
    """Differs if a file was changed, or another put in its place; empty if it cannot be looked at."""
    try:
        stat = Path(path).stat()
    except OSError:
        return ()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
