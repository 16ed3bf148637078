"""Progress of a batch of calls: the numbers, and their display in the terminal."""

import collections
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from gubs import console
from gubs.llm.calls import Answer, Cost


@dataclass
class Progress:
    """State of one batch."""

    total: int
    """Requests of the batch."""
    done: int = 0
    replayed: int = 0
    """Done requests that the journal answered."""
    failures: collections.Counter[str] = field(default_factory=collections.Counter)
    """Requests without a usable answer, by cause."""
    in_flight: int = 0
    """Attempts in flight."""
    waiting: int = 0
    """Requests neither done nor in flight (not sent yet, or in a pause before another attempt)."""
    cost: Cost = field(default_factory=Cost)
    """Of the calls made (not replayed), including re-asks."""
    retried: int = 0
    """Attempts made again since the client started."""
    copies: int = 0
    """Second copies of overdue requests since the client started."""
    began: float = field(default_factory=time.monotonic)
    note: str = ""
    """What the client waits for, if not for answers (a server that starts)."""

    def finished(self, answer: Answer) -> None:
        """Counts a request as done."""
        self.done += 1
        self.replayed += answer.replayed
        if answer.failure:
            self.failures[answer.failure] += 1


OnProgress = Callable[[Progress], None]


@contextmanager
def llm_progress() -> Iterator[OnProgress]:
    """Shows the progress of a batch of calls."""
    with console.progress("calls") as show:
        yield lambda p: show(p.done, p.total, _details(p))


def _details(p: Progress) -> str:
    pace = p.cost.tokens_out / max(time.monotonic() - p.began, 1e-9)
    parts = [p.note] if p.note else [f"{p.in_flight} in flight", f"{pace:.0f} tokens/s"]
    counts = ((p.replayed, "from the journal"), (p.retried, "retried"), (p.failures.total(), "failed"))
    parts += [f"{n} {name}" for n, name in counts if n]
    return ", ".join(parts + ([f"price {p.cost.money:.2f}"] if p.cost.money else []))
