"""Agent4Rec's layout as a source: train.txt, valid.txt and test.txt, one user and the items they chose per line.

A line is a user's id and then the ids of the films, separated by spaces; `movie_detail.csv` has titles and genres. The
three files divide each user's films, by a rule that is not documented; there are neither ratings nor times.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.reading import Column, assemble, build, clicks, read_sheet
from gubs.errors import InputError

PARTS = ("train", "valid", "test")
_FILMS = "movie_detail.csv"
_COLUMNS = (Column("video_id", "id", ("movie_id",), nullable=False), Column("title", "text"), Column("genres"))
_NOTES = [
    "There are no ratings and no times: every record is a click, and what was not chosen is unknown.",
    "The users are known by their id alone: no age, gender, occupation or interest tags.",
]


def open_source(settings: SourceSettings) -> SourceTables:
    """Reads a folder, which is small, into memory.

    Raises:
        InputError: a file is missing, a line is not made of ids, or two files name the same user and item.
    """
    folder = Path(settings.path)
    users, films, parts = [], [], []
    for part in PARTS:
        for user, items in _lines(folder / f"{part}.txt"):
            users += [user] * len(items)
            films += items
            parts += [part] * len(items)
    table = pa.table({"user_id": users, "video_id": films})
    if len(table.group_by(["user_id", "video_id"]).aggregate([])) < len(table):
        raise InputError(f"{folder}: a user has the same film twice; each must be in one of {', '.join(PARTS)}")
    sheets = [read_sheet(folder / _FILMS, _COLUMNS, settings.max_bad_rows)] if (folder / _FILMS).is_file() else []
    videos = None
    if sheets:
        sheet = sheets[0]
        sheet.reject_duplicates("video_id")
        tags = pc.split_pattern(sheet.column("genres"), "|").combine_chunks()
        tags = pc.coalesce(tags, pa.scalar([], pa.list_(pa.string())))
        columns = {"video_id": sheet.column("video_id"), "title": sheet.column("title"), "tags": tags}
        videos = build("videos", len(sheet.lines), **columns)
    tables = assemble(None, videos, clicks(table, "user_id", "video_id"), sheets, _NOTES)
    tables.parts = pa.table({"interaction_id": tables.interactions["interaction_id"], "part": parts})
    return tables


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    if not path.is_file():
        raise InputError(f"{path.parent}: no {path.name}; source.path must be a folder with {', '.join(PARTS)}.txt")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = line.split()
        if not all(word.isdigit() for word in words):
            raise InputError(f"{path.name}: row {number}: must be a user's id and ids of items, all whole numbers")
        if words:
            lines.append((words[0], words[1:]))
    return lines
