"""`gubs annotate review`: the human queue in the terminal, item by item; people can stop and resume at any time.

Each answer is appended to a file and synced before the next item is shown. The file is imported when the session ends;
if it is killed, the next session imports the file.
"""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.prompt import Prompt
from rich.text import Text

from gubs.artifacts import JsonObject, Run
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
    settings: JsonObject,
    teachers: TeacherSettings,
    name: str,
    *,
    file: Path | None = None,
    console: Console = err,
    read_key: Callable[[], str] | None = None,
) -> tuple[int, int]:
    """Shows the items that this person has not answered yet, and asks for an answer to each.

    Args:
        run: the run, with labels and their queue.
        settings: all settings of the run, for the artifact's manifest.
        teachers: decides how much of a history is shown.
        name: the person's name, recorded with each answer.
        file: where answers are stored before the import; default `human/NAME.jsonl` in the run's folder.
        console: where items are shown.
        read_key: asks for one of `KEYS`; for tests.

    Returns:
        The number of answers in this session, and of items that this person has left open.

    Raises:
        InputError: the run is remote and `file` is not given, or the file does not hold answers.
    """
    file = file or default_file(run, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    _cut_half_line(file)
    _import(run, settings, file, name)
    items = queue_items(run, teachers, name)
    answered = 0
    try:
        for number, item in enumerate(items, 1):
            show(item, f"{number} of {len(items)}", console)
            key = (read_key or (lambda: _ask(console)))()
            if key == QUIT:
                break
            if key != SKIP:
                _append(file, item["interaction_id"], key, name)
                answered += 1
    finally:
        if answered:
            _import(run, settings, file, name)
    return answered, len(items) - answered


def default_file(run: Run, name: str) -> Path:
    """The file of one person's answers.

    Raises:
        InputError: the run is remote, or the name cannot be a file name.
    """
    if "://" in run.uri:
        raise InputError(f"{run.uri} is remote: pass a local file for your answers with --file")
    if not name or not all(c.isalnum() or c in " -_." for c in name) or name.startswith("."):
        raise InputError(f"the name {name!r} cannot be used: letters, digits, blanks, -, _ and . only, no dot in front")
    return Path(run.path("human", f"{name}.jsonl"))


def show(item: dict[str, str], place: str, console: Console) -> None:
    """Prints one item; text from the data is never interpreted as markup."""
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


def _cut_half_line(file: Path) -> None:
    """Cuts off a last line that a power cut left incomplete."""
    data = file.read_bytes() if file.exists() else b""
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(file, end)


def _import(run: Run, settings: JsonObject, file: Path, name: str) -> None:
    if file.exists():
        answers, _ = read_answers(run, file, name)
        add_answers(run, settings, answers)
