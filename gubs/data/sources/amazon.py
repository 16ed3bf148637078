"""Amazon books as a source: reviews with stars, or reading sequences without, told apart by the folder's files.

Reviews: `Books_rating.csv` and `books_data.csv` of the "Amazon Books Reviews" dump. Sequences: `train.csv`, `test.csv`
and `id2name4Rec.json`, where each line is a window that slides over a user's books. A book becomes a video, and a
review or a read becomes an interaction of the click task.
"""

import ast
import html
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources.files import InputFile
from gubs.data.sources.log import Done, Findings, Head, Log, Tally, first_seen, places
from gubs.data.sources.reading import (
    STARS_NOTE,
    Column,
    Sheet,
    build,
    click_sequences,
    clicks,
    duplicated,
    read_sheet,
    tag_lists,
)
from gubs.errors import InputError

_NOTES = (
    "The users are known by their id alone: no age, gender, occupation or interest tags.",
    "There are no watch times, so there is no sequential task: every record is a click, and no exposure without a "
    "click is known.",
    "Books have no video files.",
)
_REVIEW_NOTES = (
    *_NOTES,
    STARS_NOTE,
    "The texts of the reviews are left out (they would give away the stars), and so are the covers' addresses.",
)
_WINDOW_NOTES = (
    *_NOTES,
    "There are no stars: whether a user liked a book is unknown.",
    "A line is a window of up to 11 books that slides over what a user read; its time is that of its last book, so "
    "the times of the books before the first line are unknown: the interactions are in order, without times.",
)

_REVIEWS = (
    Column("video_id", "id", ("Id",), nullable=False),
    Column("user_id", "id", ("User_id",)),
    Column("title", "text", ("Title",)),
    Column("rating", "number", ("review/score", "review_score"), nullable=False, minimum=1, maximum=5),
    Column("timestamp", "time", ("review/time", "review_time")),
)

_BOOKS = (Column("title", "text", ("Title",)), Column("categories"))

_WINDOWS = (
    Column("user_id", "id", nullable=False),
    Column("items", "texts", ("item_ids",), nullable=False),
    Column("timestamp", "time"),
)


def open_source(settings: SourceSettings) -> Log:
    """A folder of reviews, or one of reading sequences.

    Raises:
        InputError: neither kind of file in the folder, or a file that cannot be used.
    """
    folder, bad = Path(settings.path), settings.max_bad_rows
    reviews = [p for n in ("Books_rating.csv", "Books_rating.csv.gz") if (p := folder / n).is_file()]
    windows = [p for n in ("train.csv", "test.csv") if (p := folder / n).is_file()]
    if windows and reviews:
        raise InputError(
            f"{folder}: has both reviews ({reviews[0].name}) and reading sequences ({windows[0].name}), whose users "
            f"and books differ; put the files of one of them into a folder of their own"
        )
    if not windows and not reviews:
        raise InputError(
            f"{folder}: neither Books_rating.csv nor train.csv is there; source.path must be a folder with one of them"
        )
    files = [InputFile.at(p) for p in reviews[:1] or windows]
    heads = [Head.sized(f) for f in files]
    if windows:
        return _Windows(files, heads, bad, videos=_titles(folder / "id2name4Rec.json"), notes=_WINDOW_NOTES)
    if (path := folder / "books_data.csv").is_file():
        return _Reviews(files, heads, bad, notes=_REVIEW_NOTES, books=_read_books(path, bad))
    missing = "There is no books_data.csv: the books have no categories."
    return _Reviews(files, heads, bad, notes=(*_REVIEW_NOTES, missing))


@dataclass(frozen=True, kw_only=True)
class _Reviews(Log):
    books: Sheet | None = None

    columns = _REVIEWS

    @property
    def for_workers(self) -> Self:
        """The log as workers need it."""
        return replace(super().for_workers, books=None)

    def check(self, sheet: Sheet) -> None:
        """See `Log`."""
        sheet.reject(sheet.column("user_id").is_null(), "no user", "user_id")

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        del users
        rows.reject_duplicates("user_id", "timestamp", "video_id")
        seen = rows.table.select(["video_id", "title"]).append_column("place", pa.array(places(rows.table)))
        return Done(clicks(rows.table, "user_id", "video_id", "timestamp"), videos=first_seen(seen))

    def with_videos(self, seen: pa.Table) -> tuple[Self, list[str]]:
        """See `Log`; a book's title is that of its first review."""
        categories = {} if self.books is None else _categories_by_title(self.books, seen["title"])
        reviews = seen.sort_by("place")
        first = reviews.filter(pa.array(~duplicated([reviews["video_id"]])))
        tags = [categories.get(t, []) if t else [] for t in first["title"].to_pylist()]
        lists = pa.array(tags, pa.list_(pa.string()))
        videos = build("videos", first.num_rows, video_id=first["video_id"], title=first["title"], tags=lists)
        return replace(self, videos=videos, sheets=[] if self.books is None else [self.books]), []


def _read_books(path: Path, bad: float) -> Sheet:
    books = read_sheet(path, _BOOKS, bad)
    books.reject(books.column("title").is_null(), "no title", "title")
    books.reject_duplicates("title")
    return books


def _categories_by_title(books: Sheet, reviewed: pa.ChunkedArray) -> dict[str, list[str]]:
    """The categories of the books that were reviewed, by title, since the file has no ids; rejects the others."""
    books.reject(pc.invert(pc.is_in(books.column("title"), value_set=reviewed.unique())), "not reviewed", "title")
    lists = [_categories(text) for text in books.column("categories").to_pylist()]
    unreadable = np.array([categories is None for categories in lists], bool)
    books.reject(unreadable, "not a list of texts", "categories", malformed=True)
    valid = [categories for categories in lists if categories is not None]
    return dict(zip(books.column("title").to_pylist(), valid, strict=True))


def _categories(text: str | None) -> list[str] | None:
    """Parses `['Fiction']`, as written by Python; None if it is not a list."""
    if text is None:
        return []
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return [str(v) for v in values] if isinstance(values, list) else None


class _Windows(Log):
    columns = _WINDOWS
    fan_out = 4

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        del users
        sequences, gaps = _merge(rows)
        readers = pa.chunked_array([pa.array(list(sequences), pa.string())])
        books = pa.chunked_array([pa.array(list(sequences.values()), pa.list_(pa.string()))])
        return Done(click_sequences(readers, books), counts=Counter(gaps=gaps))

    def conclude(self, findings: Findings, tally: Tally) -> list[str]:
        """See `Log`."""
        missing = (
            f"{tally.counts['gaps']} windows do not overlap with those before: some books between them are unknown."
        )
        return [*super().conclude(findings, tally), missing]


def _merge(windows: Sheet) -> tuple[dict[str, list[str]], int]:
    """Joins each user's windows into one sequence: what a window has beyond the sequence so far is appended.

    Returns:
        The books of each user, in the order of the users' first windows, and the number of windows that do not overlap
        with the user's sequence.
    """
    sequences: dict[str, list[str]] = {}
    gaps = 0
    repeated = np.zeros(len(windows.lines), bool)
    for i, user, window in _in_order(windows):
        sequence = sequences.setdefault(user, [])
        overlap = _overlap(sequence, window)
        gaps += bool(sequence) and not overlap
        repeated[i] = overlap == len(window)
        sequence += window[overlap:]
    windows.reject(repeated, "duplicate", "items")
    return sequences, gaps


def _in_order(windows: Sheet) -> Iterator[tuple[int, str, list[str]]]:
    """Position, user and books of the windows, by file and time, and in the file's order if times are equal or
    unknown.
    """
    times, files = windows.column("timestamp").fill_null(0).to_numpy(), windows.column("file").to_numpy()
    users, items = windows.column("user_id").to_pylist(), windows.column("items").to_pylist()
    for i in np.lexsort((times, files)):
        yield int(i), users[i], items[i]


def _overlap(sequence: list[str], window: list[str]) -> int:
    """Length of the longest beginning of the window that ends the sequence."""
    lengths = range(min(len(sequence), len(window)), 0, -1)
    return next((n for n in lengths if sequence[-n:] == window[:n]), 0)


def _titles(path: Path) -> pa.Table:
    if not path.is_file():
        raise InputError(f"{path.name}: no such file; put it beside train.csv, since it holds the books' titles")
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as e:
        raise InputError(f"{path.name}: row {e.lineno}: not JSON ({e.msg}); copy it again from its origin") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path.name}: byte {e.start}: not UTF-8; save the file as UTF-8") from None
    if not isinstance(names, dict):
        raise InputError(f"{path.name}: row 1: must be an object of book id to title; copy it again from its origin")
    titles = [html.unescape(str(t)).strip() or None for t in names.values()]  # the dump has &amp; and &quot;
    n = len(names)
    ids = pa.array(list(names), pa.string())
    return build("videos", n, video_id=ids, title=pa.array(titles, pa.string()), tags=tag_lists(n, []))
