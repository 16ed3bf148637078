"""What a person sees while a command runs: lines and progress on stderr, results on stdout."""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich import progress as rich_progress
from rich.console import Console

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)

_LINE_EVERY_S = 10.0
"""Without a terminal (the log of a job), progress is an occasional line."""


class OnProgress(Protocol):
    """Gets the number of finished items, the total, and further details if there are any."""

    def __call__(self, done: int, total: int, detail: str = "") -> None: ...  # noqa: D102


def quiet_libraries() -> None:
    """Keeps bars and notices of transformers, vLLM and DeepSpeed off the terminal; to be called before their import."""
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ.update({name: value for name, value in quiet.items() if name not in os.environ})
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def say(text: str) -> None:
    """Prints a line about what happens."""
    err.print(text, markup=False, soft_wrap=True)


def print_line(text: str) -> None:
    """Prints a line of the result."""
    out.print(text, markup=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Prints a result for scripts."""
    print(json.dumps(value, indent=1, default=str))


@contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """Shows the progress of one piece of work: a bar on a terminal, elsewhere a line every ten seconds."""
    if not err.is_terminal:
        yield _lines(title)
        return
    spinner, title_column = rich_progress.SpinnerColumn(), rich_progress.TextColumn("{task.description}")
    counts = rich_progress.BarColumn(), rich_progress.MofNCompleteColumn()
    times = rich_progress.TimeElapsedColumn(), rich_progress.TimeRemainingColumn()
    with rich_progress.Progress(spinner, title_column, *counts, *times, console=err, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int, detail: str = "") -> None:
            bar.update(task, completed=done, total=total, description=f"{title} {detail}".strip())

        yield show


def _lines(title: str) -> OnProgress:
    printed_at = time.monotonic()

    def show(done: int, total: int, detail: str = "") -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= _LINE_EVERY_S:
            printed_at = time.monotonic()
            say(f"         {title}: {done:,} of {total:,}" + (f", {detail}" if detail else ""))

    return show
