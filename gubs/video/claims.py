"""The claims of a run of the frame stage. Imports next to nothing, since every run starts an actor with it."""

from collections import Counter
from collections.abc import Sequence


class Claims:
    """An actor that assigns each content to one batch, and counts the workers that have tried each batch."""

    def __init__(self, done: set[str]):
        self._done, self._owner, self._attempts = done, dict[str, int](), Counter[int]()

    def begin(self, batch: int) -> int:
        """Registers that a worker starts a batch; returns the number of the attempt, from 1."""
        self._attempts[batch] += 1
        return self._attempts[batch]

    def claim(self, batch: int, hashes: Sequence[str]) -> list[bool]:
        """For each content, whether this batch decodes it: it is new, or an earlier attempt of the batch claimed it."""
        return [h not in self._done and self._owner.setdefault(h, batch) == batch for h in hashes]
