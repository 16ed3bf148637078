"""The human queue as files: written for a person (CSV or JSONL), and read back, with every wrong row named."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gubs.artifacts import Run
from gubs.data.ifvr import IFVR, PROFILES
from gubs.errors import InputError
from gubs.prompts.answers import read_option
from gubs.prompts.fields import inline, plain
from gubs.prompts.options import option_lines
from gubs.records import TASK_OPTIONS, Task
from gubs.teachers import reasons
from gubs.teachers.annotations import HumanAnswer, open_items
from gubs.teachers.cases import Case, by_id, load_cases
from gubs.teachers.settings import TeacherSettings

COLUMNS = (
    "interaction_id",
    "question",
    "profile",
    "views",
    "title",
    "length",
    "tags",
    "played",
    "video_file",
    "teacher",
    "answer",
    "comment",
    "annotator",
    "time",
)
"""A person fills in answer (the letter), and if wanted comment, annotator and time (ISO 8601)."""

_OPTIONS = TASK_OPTIONS[Task.SEQUENTIAL]
_SHOWN_PROBLEMS = 10


def queue_items(run: Run, settings: TeacherSettings, annotator: str = "") -> list[dict[str, str]]:
    """What is open, with all a person needs to decide it: one text per column."""
    ifvr = IFVR(run)
    queue = {row["interaction_id"]: row for row in open_items(run, annotator).to_pylist()}
    rows = by_id(ifvr.targets(Task.SEQUENTIAL), queue)
    cases = load_cases(ifvr, rows, settings.history_items, tastes=settings.profiles and run.has(PROFILES))
    files = _video_files(ifvr)
    return [_item(c, queue[c.target.interaction_id], files, settings.max_text) for c in cases]


def export_queue(run: Run, settings: TeacherSettings, file: Path, annotator: str = "") -> int:
    """Writes what is open to a .csv or .jsonl file; returns the number of items.

    Raises:
        InputError: another kind of file. ArtifactError: there are no labels.
    """
    kind = _kind(file)
    items = queue_items(run, settings, annotator)
    if kind == "jsonl":
        text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    else:
        sheet = io.StringIO()
        writer = csv.DictWriter(sheet, COLUMNS)
        writer.writeheader()
        writer.writerows(items)
        text = "\ufeff" + sheet.getvalue()  # so that spreadsheets read it as UTF-8
    file.write_text(text, encoding="utf-8", newline="")
    return len(items)


def read_answers(run: Run, file: Path, annotator: str = "") -> tuple[list[HumanAnswer], int]:
    """The answers in a file that `export_queue` wrote and people filled in, and the number of rows left open.

    Args:
        run: its queue says which items there are.
        file: .csv (comma, semicolon or tab) or .jsonl.
        annotator: who answered, for rows that do not say.

    Raises:
        InputError: a row names an item that is not in the queue, an answer that is no option, or nobody; all such rows
            are listed, and none of the file is taken.
    """
    known = set(run.artifact(reasons.STAGE).table("queue")["interaction_id"].to_pylist())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    answers, problems, left_open = [], [], 0
    for line, row in _rows(file):
        if not (row.get("answer") or "").strip():
            left_open += 1
            continue
        if problem := _problem(row, known, annotator):
            problems.append(f"  line {line}: {problem}")
        else:
            answers.append(_answer(row, annotator, row.get("time") or now, file.name))
    if problems:
        more = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        shown = "\n".join(problems[:_SHOWN_PROBLEMS])
        raise InputError(f"{file}: {len(problems)} rows cannot be taken (nothing was imported):\n{shown}{more}")
    return answers, left_open


def _item(case: Case, row: dict[str, Any], files: dict[str, str], limit: int) -> dict[str, str]:
    video = case.video
    return {
        "interaction_id": case.target.interaction_id,
        "question": f"Why was it skipped?\n{option_lines(Task.SEQUENTIAL)}",
        "profile": case.person.profile(limit),
        "views": "\n".join(case.person.views(limit)),
        "title": inline(video.title, limit),
        "length": "" if video.duration_s is None else f"{video.duration_s:.0f} s",
        "tags": json.dumps([plain(t) for t in video.tags or []], ensure_ascii=False),
        "played": "" if case.target.play_rate is None else f"{case.target.play_rate:.0%}",
        "video_file": files.get(video.video_id, ""),
        "teacher": "\n".join(_attempt(i, a) for i, a in enumerate(row["attempts"] or [], 1)) or f"({row['cause']})",
        "answer": "",
        "comment": "",
        "annotator": "",
        "time": "",
    }


def _attempt(number: int, attempt: dict[str, Any]) -> str:
    verdict = {True: "sound", False: "not sound", None: "not judged"}[attempt["valid"]]
    said = f"{number}. {attempt['option']}: {plain(attempt['rationale'], 2000)} [{verdict}]"
    return said + (f" {plain(attempt['criticism'], 2000)}" if attempt["criticism"] else "")


def _video_files(ifvr: IFVR) -> dict[str, str]:
    """Video id -> the file to look at; the frames' table knows where files were found."""
    if not ifvr.run.has("frames"):
        return ifvr.video_files
    table = ifvr.run.artifact("frames").table("frames", ["video_id", "uri"])
    return {v: u for v, u in zip(table["video_id"].to_pylist(), table["uri"].to_pylist(), strict=True) if u}


def _kind(file: Path) -> str:
    kind = file.suffix.lower().lstrip(".")
    if kind not in ("csv", "jsonl"):
        raise InputError(f"{file}: must end in .csv or .jsonl")
    return kind


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line or row number as a person counts, row) of a file."""
    kind = _kind(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{file} cannot be read: {e}") from None
    yield from _json_rows(file, text) if kind == "jsonl" else _csv_rows(file, text)


def _json_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise InputError(f"{file}, line {number}: not JSON ({e})") from None
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number}: must be a JSON object")
        yield number, {str(k): "" if v is None else str(v) for k, v in row.items()}


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    header = text.split("\n", 1)[0]
    mark = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)
    missing = {"interaction_id", "answer"} - set(reader.fieldnames or [])
    if missing:
        raise InputError(f"{file}: lacks the column {' and '.join(sorted(missing))}")
    try:
        for row in reader:
            yield reader.line_num, {k: v or "" for k, v in row.items() if isinstance(v, str | None) and k}
    except csv.Error as e:
        raise InputError(f"{file}, line {reader.line_num}: {e}") from None


def _problem(row: dict[str, str], known: Iterable[str], annotator: str) -> str:
    key = (row.get("interaction_id") or "").strip()
    if key not in known:
        return f"interaction_id {key!r} is not in the queue of this run"
    if read_option(row["answer"], _OPTIONS) is None:
        return f"answer {row['answer'].strip()!r} is none of {', '.join(_OPTIONS)}"
    if not ((row.get("annotator") or "").strip() or annotator):
        return "nobody is named in the column annotator: fill it in, or pass --name"
    if row.get("time") and not _is_time(row["time"]):
        return f"time {row['time']!r} is not of the form 2025-01-31T12:00:00+00:00"
    return ""


def _answer(row: dict[str, str], annotator: str, time: str, source: str) -> HumanAnswer:
    return HumanAnswer(
        interaction_id=row["interaction_id"].strip(),
        annotator=(row.get("annotator") or "").strip() or annotator,
        option=str(read_option(row["answer"], _OPTIONS)),
        time=datetime.fromisoformat(time.strip()).astimezone(UTC).isoformat(timespec="seconds"),
        comment=(row.get("comment") or "").strip() or None,
        source=source,
    )


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text.strip())
    except ValueError:
        return False
    return True
