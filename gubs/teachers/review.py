"""`gubs annotate review`: the human queue in the terminal, an item at a time, to be left and taken up again at will.

Each answer is appended to a file and synced before the next item is shown, and the file is imported when the session
ends, however it ends; a session that was killed is imported by the next one.
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.prompt import Prompt
from rich.text import Text

from gubs.artifacts import Run
from gubs.console import err
from gubs.errors import InputError
from gubs.records import TASK_OPTIONS, Task
from gubs.teachers.annotations import add_answers
from gubs.teachers.queue_files import queue_items, read_answers
from gubs.teachers.settings import TeacherSettings

SKIP, QUIT = "s", "q"
KEYS = [*(o.value for o in TASK_OPTIONS[Task.SEQUENTIAL]), SKIP, QUIT]

_FIELDS = ("profile", "views", "title", "length", "tags", "played", "video_file", "teacher")


def review(
    run: Run,
    settings: Mapping[str, Any],
    teachers: TeacherSettings,
    name: str,
    *,
    file: Path | None = None,
    console: Console = err,
    read_key: Callable[[], str] | None = None,
) -> tuple[int, int]:
    """Shows what this person has not answered yet, and asks.

    Args:
        run: its labels have the queue.
        settings: of the run, for the artifact's manifest.
        teachers: how much of a history is shown.
        name: who answers; kept with each answer.
        file: where answers are kept first; default `human/NAME.jsonl` in the run's folder.
        console: where to show.
        read_key: asks for one of `KEYS`; for tests.

    Returns:
        Answers given now, and items this person has left open.

    Raises:
        InputError: the run is remote and `file` is not given, or the file holds something else.
    """
    file = file or default_file(run, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    _mend(file)
    _import(run, settings, file, name)
    items = queue_items(run, teachers, name)
    given = 0
    try:
        for number, item in enumerate(items, 1):
            show(item, f"{number} of {len(items)}", console)
            key = (read_key or (lambda: _ask(console)))()
            if key == QUIT:
                break
            if key != SKIP:
                _append(file, item["interaction_id"], key, name)
                given += 1
    finally:
        if given:
            _import(run, settings, file, name)
    return given, len(items) - given


def default_file(run: Run, name: str) -> Path:
    """The file of one person's answers.

    Raises:
        InputError: the run is remote, or the name cannot be a file's name.
    """
    if "://" in run.uri:
        raise InputError(f"{run.uri} is remote: say where your answers are to be kept with --file")
    if not name or not all(c.isalnum() or c in " -_." for c in name) or name.startswith("."):
        raise InputError(f"the name {name!r} cannot be used: letters, digits, blanks, - and _ only")
    return Path(run.path("human", f"{name}.jsonl"))


def show(item: dict[str, str], place: str, console: Console) -> None:
    """One item; what comes from outside is shown as it is, never read as markup."""
    text = Text()
    for field in _FIELDS:
        if item[field]:
            text.append(f"{field.replace('_', ' ')}\n", style="bold")
            text.append("".join(f"  {line}\n" for line in item[field].split("\n")))
    console.print(Panel(text, title=Text(f"{place}: {item['interaction_id']}"), title_align="left"))
    console.print(item["question"], markup=False)


def _ask(console: Console) -> str:
    return Prompt.ask(f"answer ({SKIP} = skip, {QUIT} = quit)", choices=KEYS, case_sensitive=False, console=console)


def _append(file: Path, item: str, key: str, name: str) -> None:
    row = {
        "interaction_id": item,
        "answer": key.upper(),
        "annotator": name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with file.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def _mend(file: Path) -> None:
    """Cuts off a line that a power cut left half-written."""
    data = file.read_bytes() if file.exists() else b""
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(file, end)


def _import(run: Run, settings: Mapping[str, Any], file: Path, name: str) -> None:
    if file.exists():
        answers, _ = read_answers(run, file, name)
        add_answers(run, settings, answers)
