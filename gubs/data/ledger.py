"""The ledger of a run of the frame stage. It imports next to nothing, for its actor starts with each run."""

from collections import Counter
from collections.abc import Sequence


class Ledger:
    """Who decodes what: an actor that gives each content to one batch, and counts the workers a batch has cost."""

    def __init__(self, done: set[str]):
        self._done, self._owner, self._attempts = done, dict[str, int](), Counter[int]()

    def begin(self, batch: int) -> int:
        """A worker starts a batch; returns which attempt that is, from 1."""
        self._attempts[batch] += 1
        return self._attempts[batch]

    def claim(self, batch: int, hashes: Sequence[str]) -> list[bool]:
        """Of each content, whether that batch is to decode it: it is new, or its own from an attempt before."""
        return [h not in self._done and self._owner.setdefault(h, batch) == batch for h in hashes]
