"""Amazon books as a source: reviews with stars, or reading sequences without, told apart by the folder's files.

Reviews: `Books_rating.csv` and `books_data.csv` of the "Amazon Books Reviews" dump. Sequences: `train.csv`, `test.csv`
and `id2name4Rec.json`, where each line is a window that slides over a user's books. A book is a video, and a review or
a read an interaction of the click task.
"""

import ast
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.config import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.movielens import DISLIKED_TO, LIKED_FROM
from gubs.data.sources.reading import Column, Sheet, assemble, build, constant, duplicated, joined, read_sheet
from gubs.errors import InputError
from gubs.records import Task

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
            f"and books are not the same; put the files of one of them into a folder of their own"
        )
    if reviews:
        return _read_reviews(reviews[0], folder / "books_data.csv", bad)
    if windows:
        return _read_sequences(windows, folder / "id2name4Rec.json", bad)
    raise InputError(
        f"{folder}: neither Books_rating.csv nor train.csv here; source.path must be a folder with one of them"
    )


def _read_reviews(path: Path, books_path: Path, bad: float) -> SourceTables:
    reviews = read_sheet(path, _REVIEWS, bad)
    reviews.reject(reviews.column("user_id").is_null(), "no user", "user_id")
    key = [reviews.column(n) for n in ("user_id", "video_id", "timestamp")]
    reviews.reject(duplicated(key), "duplicate", "video_id")
    t, stars = reviews.table, reviews.column("rating")
    interactions = build(
        "interactions",
        t.num_rows,
        # the same user may review a book again, at another time
        interaction_id=joined(
            t["user_id"], "-", t["video_id"], "-", pc.fill_null(t["timestamp"].cast(pa.string()), "")
        ),
        user_id=t["user_id"],
        video_id=t["video_id"],
        task=constant(Task.CLICK.value, t.num_rows, pa.string()),
        timestamp=t["timestamp"],
        clicked=constant(True, t.num_rows, pa.bool_()),
        liked=pc.greater_equal(stars, LIKED_FROM),
        disliked=pc.less_equal(stars, DISLIKED_TO),
        rating=stars,
    )
    notes = [
        *_NOTES,
        f"liked means {LIKED_FROM:g} stars or more, disliked {DISLIKED_TO:g} or fewer.",
        "The texts of the reviews are left out (they would give away the stars), and so are the covers' addresses.",
    ]
    sheets = [reviews]
    categories: dict[str, list[str]] = {}
    if books_path.is_file():
        books, categories = _read_books(books_path, t["title"], bad)
        sheets.append(books)
    else:
        notes.append("There is no books_data.csv: the books have no categories.")
    return assemble(None, _reviewed(t, categories), interactions, sheets, notes)


def _read_books(path: Path, reviewed: pa.ChunkedArray, bad: float) -> tuple[Sheet, dict[str, list[str]]]:
    """Categories by title: the books' file has no ids."""
    books = read_sheet(path, _BOOKS, bad)
    title = books.column("title")
    books.reject(title.is_null(), "no title", "title")
    books.reject(duplicated([books.column("title")]), "duplicate", "title")
    wanted = pc.is_in(books.column("title"), value_set=reviewed.unique())
    books.reject(pc.invert(wanted), "not reviewed", "title")
    lists = [_categories(text) for text in books.column("categories").to_pylist()]
    books.reject(
        np.array([found is None for found in lists], bool), "not a list of texts", "categories", malformed=True
    )
    good = [found for found in lists if found is not None]
    return books, dict(zip(books.column("title").to_pylist(), good, strict=True))


def _categories(text: str | None) -> list[str] | None:
    """`['Fiction']` as written by Python; None where it is not such a list."""
    if text is None:
        return []
    try:
        found: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return [str(c) for c in found] if isinstance(found, list) else None


def _reviewed(reviews: pa.Table, categories: dict[str, list[str]]) -> pa.Table:
    first = reviews.filter(pa.array(~duplicated([reviews["video_id"]])))
    titles = first["title"].to_pylist()
    tags = pa.array([categories.get(t, []) if t else [] for t in titles], pa.list_(pa.string()))
    return build("videos", first.num_rows, video_id=first["video_id"], title=first["title"], tags=tags)


def _read_sequences(paths: list[Path], names_path: Path, bad: float) -> SourceTables:
    sheets = [read_sheet(p, _WINDOWS, bad) for p in paths]
    users, books, gaps = _merge(sheets)
    place = _places(users)
    ids = pc.binary_join_element_wise(pa.array(users, pa.string()), pa.array(place).cast(pa.string()), "-")
    interactions = build(
        "interactions",
        len(users),
        interaction_id=pa.chunked_array([ids]),
        user_id=pa.chunked_array([pa.array(users, pa.string())]),
        video_id=pa.chunked_array([pa.array(books, pa.string())]),
        task=constant(Task.CLICK.value, len(users), pa.string()),
        clicked=constant(True, len(users), pa.bool_()),
    )
    notes = [
        *_NOTES,
        "There are no stars: whether a user liked a book is unknown.",
        "A line is a window of up to 11 books that slides over what a user read; its time is that of its last book, so "
        "the times of the books before the first line are unknown: the interactions stand in order, without times.",
        f"{gaps} windows do not touch what came before: some books between them are unknown.",
    ]
    return assemble(None, _titles(names_path), interactions, sheets, notes)


def _merge(sheets: list[Sheet]) -> tuple[list[str], list[str], int]:
    """Joins each user's windows to one sequence: what a window has beyond the sequence so far is appended.

    Returns:
        Users and books of the reads, user by user in the order of their first window, and the number of windows that
        do not overlap with the user's sequence.
    """
    read: dict[str, list[str]] = {}
    gaps = 0
    for sheet in sheets:
        repeated = np.zeros(len(sheet.lines), bool)
        for i, user, items in _in_order(sheet):
            so_far = read.setdefault(user, [])
            known = _overlap(so_far, items)
            gaps += bool(so_far) and not known
            repeated[i] = known == len(items)
            so_far += items[known:]
        sheet.reject(repeated, "duplicate", "items")
    users = [u for u, items in read.items() for _ in items]
    return users, [b for items in read.values() for b in items], gaps


def _in_order(sheet: Sheet) -> Iterator[tuple[int, str, list[str]]]:
    """Windows by time, and in the file's order where times are equal or unknown."""
    times = sheet.column("timestamp").fill_null(0).to_numpy()
    users, items = sheet.column("user_id").to_pylist(), sheet.column("items").to_pylist()
    for i in np.argsort(times, kind="stable"):
        yield int(i), users[i], items[i]


def _overlap(so_far: list[str], window: list[str]) -> int:
    """Length of the longest beginning of the window that is an end of the sequence so far."""
    for n in range(min(len(so_far), len(window)), 0, -1):
        if so_far[-n:] == window[:n]:
            return n
    return 0


def _places(users: list[str]) -> np.ndarray:
    """Place of each read in its user's sequence, from 0; users stand in blocks."""
    _, first, block = np.unique(np.array(users, str), return_index=True, return_inverse=True)
    places: np.ndarray = np.arange(len(users)) - first[block]
    return places


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
    tags = pa.array([[]] * n, pa.list_(pa.string()))
    return build(
        "videos", n, video_id=pa.array(list(names), pa.string()), title=pa.array(titles, pa.string()), tags=tags
    )
