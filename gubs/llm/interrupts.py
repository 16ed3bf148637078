"""Ctrl-C and SIGTERM while calls are in flight: the first asks to finish them, the second ends the wait at once.

A call that is dropped in flight is paid for and asked again by the next run.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Remembers the first signal instead of raising an exception in the middle of something."""

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first signal."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which signals are held (nowhere but in the main thread, which gets them)."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {name: signal.signal(name, self._receive) for name in _SIGNALS}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
