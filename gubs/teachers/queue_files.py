"""The human queue as files: written for people (CSV or JSONL) and read back; errors name every wrong row."""

import csv
import io
import json
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path

from gubs.artifacts import JsonObject, Run
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
"""A person fills in answer (the letter) and, optionally, comment, annotator and time (ISO 8601)."""

_OPTIONS = TASK_OPTIONS[Task.SEQUENTIAL]
_LISTED_PROBLEMS = 10


def queue_items(run: Run, settings: TeacherSettings, annotator: str = "") -> list[dict[str, str]]:
    """The open items with everything a person needs to decide them: one text per column."""
    ifvr = IFVR(run)
    queue = {row["interaction_id"]: row for row in open_items(run, annotator).to_pylist()}
    rows = by_id(ifvr.targets(Task.SEQUENTIAL), queue)
    cases = load_cases(ifvr, rows, settings.history_items, tastes=settings.profiles and run.has(PROFILES))
    files = _video_files(ifvr)
    return [_item(c, queue[c.target.interaction_id], files, settings.max_text) for c in cases]


def export_queue(run: Run, settings: TeacherSettings, file: Path, annotator: str = "") -> int:
    """Writes the open items to a .csv or .jsonl file; returns their number.

    Raises:
        InputError: the file has another ending. ArtifactError: there are no labels.
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
    """The answers in a file that `export_queue` wrote and people filled in, and the number of rows without an answer.

    Args:
        run: the run, with the queue.
        file: .csv (comma, semicolon or tab) or .jsonl.
        annotator: who answered, for rows that name nobody.

    Raises:
        InputError: the file cannot be read, or a row has an item that is not in the queue, an answer that is not an
            option, a malformed time, or no annotator; the message lists such rows, and nothing is imported.
    """
    queued = set(run.artifact(reasons.STAGE).table("queue")["interaction_id"].to_pylist())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    answers, problems, unanswered = [], [], 0
    for line, row in _rows(file):
        if not (row.get("answer") or "").strip():
            unanswered += 1
            continue
        if problem := _problem(row, queued, annotator):
            problems.append(f"  line {line}: {problem}")
        else:
            answers.append(_answer(row, annotator, row.get("time") or now, file.name))
    if problems:
        more = f"\n  and {len(problems) - _LISTED_PROBLEMS} more" if len(problems) > _LISTED_PROBLEMS else ""
        listed = "\n".join(problems[:_LISTED_PROBLEMS])
        raise InputError(f"{file}: {len(problems)} rows are wrong (nothing was imported):\n{listed}{more}")
    return answers, unanswered


def _item(case: Case, row: JsonObject, files: dict[str, str], limit: int) -> dict[str, str]:
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


def _attempt(number: int, attempt: JsonObject) -> str:
    verdict = {True: "sound", False: "not sound", None: "not judged"}[attempt["valid"]]
    criticism = f" {plain(attempt['criticism'], 2000)}" if attempt["criticism"] else ""
    return f"{number}. {attempt['option']}: {plain(attempt['rationale'], 2000)} [{verdict}]{criticism}"


def _video_files(ifvr: IFVR) -> dict[str, str]:
    """Video id -> the file to look at; the table of the frames, if there is one, has the files that were found."""
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
    """The rows of a file with their line numbers, from 1."""
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
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if missing := {"interaction_id", "answer"} - set(reader.fieldnames or []):
        raise InputError(f"{file}: lacks the column {' and '.join(sorted(missing))}")
    try:
        for row in reader:
            yield reader.line_num, {k: v or "" for k, v in row.items() if isinstance(v, str | None) and k}
    except csv.Error as e:
        raise InputError(f"{file}, line {reader.line_num}: {e}") from None


def _problem(row: dict[str, str], queued: Collection[str], annotator: str) -> str:
    key = (row.get("interaction_id") or "").strip()
    if key not in queued:
        return f"interaction_id {key!r} is not in the queue of this run"
    if read_option(row["answer"], _OPTIONS) is None:
        return f"answer {row['answer'].strip()!r} is none of {', '.join(_OPTIONS)}"
    if not ((row.get("annotator") or "").strip() or annotator):
        return "nobody is named in the column annotator: fill it in, or pass --name"
    try:
        if row.get("time"):
            datetime.fromisoformat(row["time"].strip())
    except ValueError:
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
