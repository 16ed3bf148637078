"""How far a batch of calls is: the numbers for a progress display, which the command line renders."""

import collections
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gubs.llm.calls import Answer


@dataclass
class Progress:
    """State of one batch."""

    total: int
    """Requests of the batch."""
    done: int = 0
    replayed: int = 0
    """Of the done ones: answered by the journal."""
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    """Requests without a usable answer, by cause."""
    in_flight: int = 0
    """Attempts on the wire."""
    waiting: int = 0
    """Requests neither done nor on the wire (not sent yet, or in a pause before another attempt)."""
    calls: int = 0
    """Calls made (not replayed), with re-asks."""
    retried: int = 0
    """Attempts that were made again, since the client started."""
    copies: int = 0
    """Second copies of overdue requests, since the client started."""
    tokens_in: int = 0
    tokens_out: int = 0
    money: float = 0.0
    began: float = field(default_factory=time.monotonic)
    note: str = ""
    """What is being waited for, where it is something else than answers (a server that starts)."""

    @property
    def failed(self) -> int:
        """Requests without a usable answer."""
        return sum(self.failures.values())

    @property
    def elapsed_s(self) -> float:
        """Seconds since the batch began."""
        return time.monotonic() - self.began

    @property
    def tokens_per_s(self) -> float:
        """Output tokens a second."""
        return self.tokens_out / max(self.elapsed_s, 1e-9)

    def finished(self, answer: Answer) -> None:
        """Counts a request as done."""
        self.done += 1
        self.replayed += answer.replayed
        if answer.failure:
            self.failures[answer.failure] += 1


OnProgress = Callable[[Progress], None]
