"""MovieLens ratings as a source: the 100K, 1M/10M and latest/20M/25M/32M layouts, told apart by the folder's files.

A film is a video and a rating an interaction of the click task (the user chose the film): clicked, liked from 4 stars,
disliked up to 2. There are no watch times, no exposures without a click and no pages.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gubs.config import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.formats import TextFormat, guess_encoding
from gubs.data.sources.reading import (
    Column,
    Sheet,
    assemble,
    build,
    constant,
    duplicated,
    facts,
    joined,
    read_sheet,
    tag_lists,
)
from gubs.errors import InputError
from gubs.records import Task

LIKED_FROM, DISLIKED_TO = 4.0, 2.0
"""Stars from which a rating is a like, and up to which it is a dislike (of 5)."""

GENRES = [
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
]
"""Flags at the end of a line of `u.item`, in order (100K `u.genre`)."""

AGES = {1: (16, "under 18"), 18: (21, "18-24"), 25: (30, "25-34"), 35: (40, "35-44")}
AGES |= {45: (47, "45-49"), 50: (53, "50-55"), 56: (60, "56 or older")}
"""Age codes of the 1M layout: an age in years about the middle of the range (16 and 60 at the open ends), the range."""

OCCUPATIONS = [
    *("other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service"),
    *("doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer"),
    *("retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman"),
    *("unemployed", "writer"),
]
"""Occupation codes of the 1M layout (its README), from 0."""

_RATINGS = (
    Column("user_id", "id", ("user_id", "userId"), nullable=False),
    Column("video_id", "id", ("video_id", "movieId"), nullable=False),
    Column("rating", "number", nullable=False, minimum=0.5, maximum=5),
    Column("timestamp", "time"),
)
_RATINGS_HEADER = ("user_id", "video_id", "rating", "timestamp")


@dataclass(frozen=True)
class _Layout:
    """The files of one edition."""

    ratings: str
    movies: str
    users: str | None
    text: TextFormat

    def format(self, *header: str, encoding: str = "utf-8") -> TextFormat:
        """How a file of this edition is written; the csv editions have header lines of their own."""
        names = () if self.text.quoted else header
        delimiter = "|" if self.text.delimiter == "\t" and header != _RATINGS_HEADER else self.text.delimiter
        return TextFormat(delimiter, names, self.text.quoted, encoding)


_LAYOUTS = (
    _Layout("u.data", "u.item", "u.user", TextFormat("\t", quoted=False)),
    _Layout("ratings.dat", "movies.dat", "users.dat", TextFormat("::", quoted=False)),
    _Layout("ratings.csv", "movies.csv", None, TextFormat(",")),
)


def read(settings: SourceSettings) -> SourceTables:
    """Reads a MovieLens folder.

    Raises:
        InputError: no known edition in the folder, or a file that cannot be used.
    """
    folder, bad = Path(settings.path), settings.max_bad_rows
    layout = _detect(folder)
    notes = [
        "There are no watch times, so there is no sequential task: every rating is a click, and no exposure "
        "without a click is known.",
        "The films are described by title and genres only: there are no video files.",
        f"liked means {LIKED_FROM:g} stars or more, disliked {DISLIKED_TO:g} or fewer; users have no interest tags.",
    ]
    ratings = _read_ratings(folder, layout, bad)
    movies, videos = _read_movies(folder, layout, bad)
    sheets, users = [ratings, movies], None
    if layout.users and (folder / layout.users).exists():
        reader = _users_100k if layout.users == "u.user" else _users_1m
        people, users = reader(folder / layout.users, layout, bad)
        sheets.append(people)
    else:
        notes.append("This edition has no demographics: age, gender and occupation are unknown.")
    if layout.users == "users.dat" and users is not None:
        notes.append("Ages are codes for ranges: `age` is about the middle of the range, `other` has the range itself.")
    return assemble(users, videos, _interactions(ratings.table), sheets, notes)


def _detect(folder: Path) -> _Layout:
    for layout in _LAYOUTS:
        for name in (layout.ratings, layout.ratings + ".gz"):
            if (folder / name).is_file():
                return layout
    known = ", ".join(layout.ratings for layout in _LAYOUTS)
    raise InputError(f"{folder}: no MovieLens edition here; source.path must be a folder with one of {known}")


def _find(folder: Path, name: str) -> Path:
    zipped = folder / (name + ".gz")
    return zipped if zipped.is_file() and not (folder / name).is_file() else folder / name


def _read_ratings(folder: Path, layout: _Layout, bad: float) -> Sheet:
    path = _find(folder, layout.ratings)
    sheet = read_sheet(path, _RATINGS, bad, text=layout.format(*_RATINGS_HEADER))
    sheet.reject(duplicated([sheet.column("user_id"), sheet.column("video_id")]), "duplicate", "video_id")
    return sheet


def _interactions(ratings: pa.Table) -> pa.Table:
    n, stars = ratings.num_rows, ratings["rating"]
    return build(
        "interactions",
        n,
        interaction_id=joined(ratings["user_id"], "-", ratings["video_id"]),
        user_id=ratings["user_id"],
        video_id=ratings["video_id"],
        task=constant(Task.CLICK.value, n, pa.string()),
        timestamp=ratings["timestamp"],
        clicked=constant(True, n, pa.bool_()),
        liked=pc.greater_equal(stars, LIKED_FROM),
        disliked=pc.less_equal(stars, DISLIKED_TO),
        rating=stars,
    )


def _read_movies(folder: Path, layout: _Layout, bad: float) -> tuple[Sheet, pa.Table]:
    path = _find(folder, layout.movies)
    flagged = layout.movies == "u.item"
    header = ("video_id", "title", "released", "video_released", "url", *GENRES) if flagged else ()
    header = header or ("video_id", "title", "genres")
    genres = [Column(g, "flag") for g in GENRES[1:]] if flagged else [Column("genres")]
    columns = [Column("video_id", "id", ("video_id", "movieId"), nullable=False), Column("title"), *genres]
    encoding = guess_encoding(path) if path.is_file() and path.suffix != ".gz" else "utf-8"
    sheet = read_sheet(path, columns, bad, text=layout.format(*header, encoding=encoding))
    sheet.reject(duplicated([sheet.column("video_id")]), "duplicate", "video_id")
    titles = sheet.column("title")
    titles = pc.if_else(pc.equal(titles, "unknown"), None, titles)
    tags = _flags(sheet) if flagged else _split(sheet.column("genres"))
    return sheet, build("videos", len(titles), video_id=sheet.column("video_id"), title=titles, tags=tags)


def _flags(sheet: Sheet) -> pa.Array:
    return tag_lists(len(sheet.lines), [pc.if_else(sheet.column(g), g, None) for g in GENRES[1:]])


def _split(genres: pa.ChunkedArray) -> pa.Array:
    listed = pc.if_else(pc.equal(genres, "(no genres listed)"), None, genres)
    lists = pc.split_pattern(listed, "|").combine_chunks()
    return pc.coalesce(lists, pa.scalar([], pa.list_(pa.string())))


def _users_100k(path: Path, layout: _Layout, bad: float) -> tuple[Sheet, pa.Table]:
    columns = [
        Column("user_id", "id", nullable=False),
        Column("age", "integer", minimum=0, maximum=120),
        Column("gender"),
        Column("occupation"),
        Column("zip code"),
    ]
    sheet = _people(path, columns, layout, bad)
    return sheet, _users(sheet, sheet.column("age"), sheet.column("occupation"), {})


def _users_1m(path: Path, layout: _Layout, bad: float) -> tuple[Sheet, pa.Table]:
    columns = [
        Column("user_id", "id", nullable=False),
        Column("gender"),
        Column("age", "integer"),
        Column("occupation", "integer", minimum=0, maximum=len(OCCUPATIONS) - 1),
        Column("zip code"),
    ]
    sheet = _people(path, columns, layout, bad)
    codes = pa.array(list(AGES), pa.int64())
    known = pc.is_in(sheet.column("age"), value_set=codes)
    sheet.reject(pc.and_(pc.invert(known), sheet.column("age").is_valid()), "unknown age code", "age", malformed=True)
    place = pc.index_in(sheet.column("age"), value_set=codes)
    ages = pc.take(pa.array([age for age, _ in AGES.values()]), place)
    ranges = pc.take(pa.array([text for _, text in AGES.values()]), place)
    jobs = pc.take(pa.array(OCCUPATIONS), sheet.column("occupation"))
    return sheet, _users(sheet, ages, jobs, {"age range": ranges})


def _people(path: Path, columns: list[Column], layout: _Layout, bad: float) -> Sheet:
    sheet = read_sheet(path, columns, bad, text=layout.format(*(c.name for c in columns)))
    sheet.reject(duplicated([sheet.column("user_id")]), "duplicate", "user_id")
    return sheet


def _users(
    sheet: Sheet, ages: pa.ChunkedArray, occupations: pa.ChunkedArray, other: dict[str, pa.ChunkedArray]
) -> pa.Table:
    n, gender = len(sheet.lines), sheet.column("gender")
    gender = pc.if_else(pc.equal(gender, "M"), "male", pc.if_else(pc.equal(gender, "F"), "female", gender))
    return build(
        "users",
        n,
        user_id=sheet.column("user_id"),
        age=ages,
        gender=gender,
        occupation=occupations,
        other=facts(n, other | {"zip code": sheet.column("zip code")}),
        tags=tag_lists(n, []),
    )
