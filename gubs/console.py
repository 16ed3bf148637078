"""What a person sees while a command runs: lines and progress on stderr, results on stdout."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from gubs.llm.progress import Progress as Calls

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)

_LINE_EVERY_S = 10.0
"""Without a terminal (a job's log), progress is a line now and then."""

OnProgress = Callable[[int, int], None]
"""Called with (done, total)."""


def say(text: str) -> None:
    """One line about what is going on."""
    err.print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """A result for scripts, on stdout."""
    print(json.dumps(value, indent=1, default=str))


@contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """Shows progress of one piece of work: a bar on a terminal, a line every ten seconds elsewhere."""
    if err.is_terminal:
        with _bar() as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _liner(title)


@contextmanager
def llm_progress() -> Iterator["Callable[[Calls], None]"]:
    """Shows how far a batch of LLM calls is."""
    if err.is_terminal:
        with _bar() as bar:
            task = bar.add_task("calls", total=None)
            yield lambda p: bar.update(task, completed=p.done, total=p.total, description=_story(p))
    else:
        last = time.monotonic()

        def line(p: "Calls") -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY_S:
                last = time.monotonic()
                say(f"         {p.done:,} of {p.total:,} calls, {_story(p)}")

        yield line


@contextmanager
def training_progress(title: str) -> Iterator[Callable[[int, int, Mapping[str, Any]], None]]:
    """Shows how far a training is: steps, and the figures of the last one."""
    if err.is_terminal:
        with _bar() as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total, f: bar.update(
                task, completed=done, total=total, description=f"{title} {_figures(f)}"
            )
    else:
        last = time.monotonic()

        def line(done: int, total: int, figures: Mapping[str, Any]) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY_S:
                last = time.monotonic()
                say(f"         {title}: step {done:,} of {total:,}, {_figures(figures)}")

        yield line


def _figures(figures: Mapping[str, Any]) -> str:
    shown = {"reward": "reward", "loss": "loss", "accuracy": "accuracy", "health/kl": "KL", "seconds/step": "s a step"}
    return ", ".join(f"{text} {figures[k]:.3g}" for k, text in shown.items() if figures.get(k) is not None)


def _story(p: "Calls") -> str:
    parts = [p.note] if p.note else [f"{p.in_flight} in flight", f"{p.tokens_per_s:.0f} tokens/s"]
    parts += [
        f"{n} {name}"
        for n, name in ((p.replayed, "from the journal"), (p.retried, "retried"), (p.failed, "failed"))
        if n
    ]
    return ", ".join(parts + ([f"price {p.money:.2f}"] if p.money else []))


def _bar() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, transient=True)


def _liner(title: str) -> OnProgress:
    last = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            say(f"{title}: {done:,} of {total:,}")

    return line
