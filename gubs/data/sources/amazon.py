"""Amazon books as a source: reviews with stars, or reading sequences without, told apart by the folder's files.

Reviews: `Books_rating.csv` and `books_data.csv` of the "Amazon Books Reviews" dump. Sequences: `train.csv`, `test.csv`
and `id2name4Rec.json`, where each line is a window that slides over a user's books. A book becomes a video, and a
review or a read becomes an interaction of the click task.
"""

import ast
import html
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.reading import (
    STARS_NOTE,
    Column,
    Sheet,
    assemble,
    build,
    click_sequences,
    clicks,
    duplicated,
    read_sheet,
    tag_lists,
)
from gubs.errors import InputError

_NOTES = [
    "The users are known by their id alone: no age, gender, occupation or interest tags.",
    "There are no watch times, so there is no sequential task: every record is a click, and no exposure without a "
    "click is known.",
    "Books have no video files.",
]

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


def read(settings: SourceSettings) -> SourceTables:
    """Reads a folder of reviews, or one of reading sequences.

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
    if reviews:
        return _read_reviews(reviews[0], folder / "books_data.csv", bad)
    if windows:
        return _read_sequences(windows, folder / "id2name4Rec.json", bad)
    raise InputError(
        f"{folder}: neither Books_rating.csv nor train.csv is there; source.path must be a folder with one of them"
    )


def _read_reviews(path: Path, books_path: Path, bad: float) -> SourceTables:
    reviews = read_sheet(path, _REVIEWS, bad)
    reviews.reject(reviews.column("user_id").is_null(), "no user", "user_id")
    reviews.reject_duplicates("user_id", "timestamp", "video_id")
    interactions = clicks(reviews.table, "user_id", "video_id", "timestamp")
    notes = [
        *_NOTES,
        STARS_NOTE,
        "The texts of the reviews are left out (they would give away the stars), and so are the covers' addresses.",
    ]
    sheets = [reviews]
    categories: dict[str, list[str]] = {}
    if books_path.is_file():
        books, categories = _read_books(books_path, reviews.column("title"), bad)
        sheets.append(books)
    else:
        notes.append("There is no books_data.csv: the books have no categories.")
    return assemble(None, _reviewed_books(reviews.table, categories), interactions, sheets, notes)


def _read_books(path: Path, reviewed: pa.ChunkedArray, bad: float) -> tuple[Sheet, dict[str, list[str]]]:
    """The sheet of the books that were reviewed, and their categories by title, since the file has no ids."""
    books = read_sheet(path, _BOOKS, bad)
    books.reject(books.column("title").is_null(), "no title", "title")
    books.reject_duplicates("title")
    books.reject(pc.invert(pc.is_in(books.column("title"), value_set=reviewed.unique())), "not reviewed", "title")
    lists = [_categories(text) for text in books.column("categories").to_pylist()]
    unreadable = np.array([categories is None for categories in lists], bool)
    books.reject(unreadable, "not a list of texts", "categories", malformed=True)
    valid = [categories for categories in lists if categories is not None]
    return books, dict(zip(books.column("title").to_pylist(), valid, strict=True))


def _categories(text: str | None) -> list[str] | None:
    """Parses `['Fiction']`, as written by Python; None if it is no list."""
    if text is None:
        return []
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return [str(v) for v in values] if isinstance(values, list) else None


def _reviewed_books(reviews: pa.Table, categories: dict[str, list[str]]) -> pa.Table:
    first = reviews.filter(pa.array(~duplicated([reviews["video_id"]])))
    titles = first["title"].to_pylist()
    tags = pa.array([categories.get(t, []) if t else [] for t in titles], pa.list_(pa.string()))
    return build("videos", first.num_rows, video_id=first["video_id"], title=first["title"], tags=tags)


def _read_sequences(paths: list[Path], names_path: Path, bad: float) -> SourceTables:
    sheets = [read_sheet(p, _WINDOWS, bad) for p in paths]
    sequences, gaps = _merge(sheets)
    users = pa.chunked_array([pa.array(list(sequences), pa.string())])
    books = pa.chunked_array([pa.array(list(sequences.values()), pa.list_(pa.string()))])
    notes = [
        *_NOTES,
        "There are no stars: whether a user liked a book is unknown.",
        "A line is a window of up to 11 books that slides over what a user read; its time is that of its last book, so "
        "the times of the books before the first line are unknown: the interactions are in order, without times.",
        f"{gaps} windows do not overlap with those before: some books between them are unknown.",
    ]
    return assemble(None, _titles(names_path), click_sequences(users, books), sheets, notes)


def _merge(sheets: list[Sheet]) -> tuple[dict[str, list[str]], int]:
    """Joins each user's windows to one sequence: what a window has beyond the sequence so far is appended.

    Returns:
        The books of each user, in the order of the users' first windows, and the number of windows that do not overlap
        with the user's sequence.
    """
    sequences: dict[str, list[str]] = {}
    gaps = 0
    for sheet in sheets:
        repeated = np.zeros(len(sheet.lines), bool)
        for i, user, window in _in_order(sheet):
            sequence = sequences.setdefault(user, [])
            overlap = _overlap(sequence, window)
            gaps += bool(sequence) and not overlap
            repeated[i] = overlap == len(window)
            sequence += window[overlap:]
        sheet.reject(repeated, "duplicate", "items")
    return sequences, gaps


def _in_order(sheet: Sheet) -> Iterator[tuple[int, str, list[str]]]:
    """Position, user and books of the windows, by time, and in the file's order if times are equal or unknown."""
    times = sheet.column("timestamp").fill_null(0).to_numpy()
    users, items = sheet.column("user_id").to_pylist(), sheet.column("items").to_pylist()
    for i in np.argsort(times, kind="stable"):
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
