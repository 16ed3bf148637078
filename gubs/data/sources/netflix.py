"""The Netflix Prize as a source: ratings with dates, listed under a line with the film's number.

Files: `combined_data_*.txt` (many films, each a line `1:` and then lines `user,stars,date`), or `training_set/mv_*.txt`
(one film per file), and `movie_titles.csv` (number, year, title, which may have commas; ISO-8859-1). A film becomes a
video, and a rating an interaction of the click task.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources.columns import KINDS, convert
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import TextFormat, guess_encoding
from gubs.data.sources.log import ROWS, Done, Findings, Head, Log
from gubs.data.sources.reading import STARS_NOTE, Column, Sheet, build, clicks, read_sheet, tag_lists
from gubs.errors import InputError

_TITLES = "movie_titles.csv"
_PATTERNS = ("combined_data_*.txt", "training_set/mv_*.txt", "mv_*.txt")
_LINE = (Column("line", nullable=False),)
_LINES = TextFormat("\x1f", ("line",), quoted=False)

_NOTES = (
    "There are no watch times, so there is no sequential task: every rating is a click, and no exposure without a "
    "click is known.",
    "The films are described by title and year only: there are neither genres nor video files.",
    "The users are known by their id alone: no age, gender, occupation or interest tags.",
    "Ratings have dates without a time of day; those of one day are in the order of the files.",
    STARS_NOTE,
)


def open_source(settings: SourceSettings) -> Log:
    """A Netflix Prize folder.

    Raises:
        InputError: no ratings or titles in the folder, or titles that cannot be used.
    """
    root, bad = Path(settings.path), settings.max_bad_rows
    parts = [InputFile(str(path), path.relative_to(root).as_posix()) for path in _ratings(root)]
    titles, videos = _read_titles(root / _TITLES, bad)
    heads = [Head.sized(f) for f in parts]
    return _Ratings(parts, heads, bad, videos=videos, sheets=[titles], notes=_NOTES, text=_LINES)


def files(settings: SourceSettings) -> list[Path]:
    """The files that decide the tables."""
    root = Path(settings.path)
    return [*_ratings(root), root / _TITLES]


def _ratings(root: Path) -> list[Path]:
    for pattern in _PATTERNS:
        if paths := sorted(root.glob(pattern)):
            return paths
    raise InputError(f"{root}: no {' or '.join(_PATTERNS)}; source.path must be a folder of the Netflix Prize")


class _Ratings(Log):
    columns = _LINE

    def read(self, number: int, groups: range | None = None, rows: int = ROWS) -> Iterator[Sheet]:
        """See `Log`."""
        film = pa.scalar(None, pa.string())
        for sheet in super().read(number, groups, rows):
            film = _head_lines(sheet, film)
            _split(sheet)
            yield sheet

    def decided(self, findings: Findings) -> Self:
        """See `Log`; a film without ratings is not an error."""
        rated = {label: account for label, account in findings.accounts.items() if account.rows_in}
        return super().decided(replace(findings, accounts=rated))

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        del users
        rows.reject_duplicates("user_id", "video_id")
        return Done(clicks(rows.table, "user_id", "video_id"))


def _head_lines(sheet: Sheet, film: pa.Scalar) -> pa.Scalar:
    """Gives each line the film above it (`video_id`), which for the first lines is `film`; returns the last one.

    Headings are not rows: the account does not count them.
    """
    headings = pc.if_else(pc.ends_with(sheet.column("line"), ":"), sheet.column("line"), None)
    headings = pc.struct_field(pc.extract_regex(headings, r"^(?P<film>\d+):$"), "film")
    films = pc.fill_null(pc.fill_null_forward(headings.combine_chunks()), film)
    rating = np.asarray(headings.is_null())
    table = sheet.table.append_column("video_id", films)
    sheet.table, sheet.lines = table.filter(pa.array(rating)), sheet.lines[rating]
    sheet.rows_in -= int((~rating).sum())
    return films[-1] if len(films) else film


def _split(sheet: Sheet) -> None:
    """Makes ratings of lines: user_id, video_id, rating, timestamp."""
    parts = pc.extract_regex(sheet.column("line"), r"^(?P<user>\d+),(?P<stars>[1-5]),(?P<date>[\d-]+)$")
    sheet.reject(parts.is_null(), "neither FILM: nor USER,STARS,DATE", "line", malformed=True)
    parts = parts.drop_null()
    times, wrong = convert(pc.struct_field(parts, "date").combine_chunks(), "time")
    columns = {
        "user_id": pc.struct_field(parts, "user"),
        "video_id": sheet.column("video_id"),
        "rating": pc.struct_field(parts, "stars").cast(pa.float64()),
        "timestamp": times,
        "line": sheet.column("line"),
    }
    sheet.table = pa.table(columns)
    if wrong is not None:
        sheet.reject(wrong, KINDS["time"][1], "line", malformed=True)
    sheet.reject(sheet.column("video_id").is_null(), "no film above it", "line", malformed=True)
    sheet.table = sheet.table.drop_columns("line")


def _read_titles(path: Path, bad: float) -> tuple[Sheet, pa.Table]:
    """Films with the year behind the title, as MovieLens has it."""
    encoding = guess_encoding(path) if path.is_file() else "utf-8"
    sheet = read_sheet(path, _LINE, bad, text=replace(_LINES, encoding=encoding))
    parts = pc.extract_regex(sheet.column("line"), r"^(?P<film>\d+),(?P<year>\d{4}|NULL),(?P<title>.*)$")
    sheet.reject(parts.is_null(), "not FILM,YEAR,TITLE", "line", malformed=True)
    parts = parts.drop_null()
    year, title = pc.struct_field(parts, "year"), pc.utf8_trim_whitespace(pc.struct_field(parts, "title"))
    title = pc.if_else(pc.equal(title, ""), None, title)
    dated = pc.binary_join_element_wise(title, pc.binary_join_element_wise(" (", year, ")", ""), "")
    shown = pc.if_else(pc.equal(year, "NULL"), title, dated)
    sheet.table = pa.table({"video_id": pc.struct_field(parts, "film"), "title": shown})
    sheet.reject_duplicates("video_id")
    n = len(sheet.lines)
    columns = {"video_id": sheet.column("video_id"), "title": sheet.column("title"), "tags": tag_lists(n, [])}
    return sheet, build("videos", n, **columns)
