"""The Yelp Open Dataset as a source: reviews with stars and times, places with categories, users.

Files, one JSON object per line: `yelp_academic_dataset_review.json`, and if they are there `..._business.json` and
`..._user.json` (also without the first part of the name, also as `.gz`). A place becomes a video, and a review an
interaction of the click task.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources.columns import CellRules
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import JsonLines
from gubs.data.sources.log import ROWS, Done, Head, Log
from gubs.data.sources.reading import STARS_NOTE, Column, Sheet, build, clicks, facts, read_blocks, read_raw, tag_lists
from gubs.errors import InputError

_NAMES = ("yelp_academic_dataset_{}.json", "{}.json", "yelp_academic_dataset_{}.json.gz", "{}.json.gz")
_RULES = CellRules(separators=",")

_NOTES = [
    "There are no watch times, so there is no sequential task: every review is a click, and no exposure without a "
    "click is known.",
    "A place is known by its name, its categories and its city; there are no video files.",
    "The texts of reviews, names of users, and all means and counts of stars, reviews and votes are left out: they are "
    "private, or come from what is to be predicted.",
    STARS_NOTE,
]

_REVIEWS = (
    Column("review_id", "id", nullable=False),
    Column("user_id", "id", nullable=False),
    Column("video_id", "id", ("business_id",), nullable=False),
    Column("rating", "number", ("stars",), nullable=False, minimum=1, maximum=5),
    Column("timestamp", "time", ("date",), nullable=False),
)
_PLACES = (
    Column("video_id", "id", ("business_id",), nullable=False),
    Column("name"),
    Column("city", "word", optional=True),
    Column("categories", "texts", optional=True),
)
_USERS = (Column("user_id", "id", nullable=False), Column("since", "word", ("yelping_since",), optional=True))


def open_source(settings: SourceSettings) -> Log:
    """A Yelp folder.

    Raises:
        InputError: no reviews in the folder, or a file that cannot be used.
    """
    folder, bad, notes = Path(settings.path), settings.max_bad_rows, list(_NOTES)
    path = _find(folder, "review")
    if path is None:
        raise InputError(
            f"{folder}: no {' or '.join(_NAMES).format(*['review'] * 4)}; source.path must be a Yelp folder"
        )
    reviews, sheets, videos, users = _file(path), [], None, None
    if (path := _find(folder, "business")) is not None:
        sheet, videos = _read_places(path, bad)
        sheets.append(sheet)
    else:
        notes.append("There is no file of places: they have neither names nor categories.")
    if (path := _find(folder, "user")) is not None:
        sheet, users = _read_users(path, bad)
        sheets.append(sheet)
    head = Head.sized(reviews)
    return _Reviews([reviews], [head], bad, users, videos, sheets, tuple(notes), unique="review_id")


class _Reviews(Log):
    def read(self, number: int, groups: range | None = None, rows: int = ROWS) -> Iterator[Sheet]:
        """See `Log`."""
        del groups
        return read_blocks(JsonLines(self.files[number], whole=False), _REVIEWS, _RULES, rows)

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        del users
        return Done(clicks(rows.table, "review_id"))


def _find(folder: Path, what: str) -> Path | None:
    paths = (folder / name.format(what) for name in _NAMES)
    return next((path for path in paths if path.is_file()), None)


def _file(path: Path) -> InputFile:
    if path.stat().st_size == 0:
        raise InputError(f"{path.name}: the file is empty; copy it again from its origin")
    return InputFile.at(path)


def _read(path: Path, columns: Sequence[Column], bad: float) -> Sheet:
    return read_raw(JsonLines(_file(path), whole=False), columns, bad, _RULES)


def _read_places(path: Path, bad: float) -> tuple[Sheet, pa.Table]:
    sheet = _read(path, _PLACES, bad)
    sheet.reject_duplicates("video_id")
    lists, cities = sheet.column("categories").to_pylist(), sheet.column("city").to_pylist()
    tags = [(listed or []) + ([city] if city else []) for listed, city in zip(lists, cities, strict=True)]
    n, name = len(sheet.lines), sheet.column("name")
    return sheet, build(
        "videos", n, video_id=sheet.column("video_id"), title=name, tags=pa.array(tags, pa.list_(pa.string()))
    )


def _read_users(path: Path, bad: float) -> tuple[Sheet, pa.Table]:
    sheet = _read(path, _USERS, bad)
    sheet.reject_duplicates("user_id")
    n = len(sheet.lines)
    other = facts(n, {"on Yelp since": pc.utf8_slice_codeunits(sheet.column("since"), 0, 4)})
    return sheet, build("users", n, user_id=sheet.column("user_id"), other=other, tags=tag_lists(n, []))
