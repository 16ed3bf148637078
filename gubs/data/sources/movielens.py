"""MovieLens ratings as a source: the 100K, 1M/10M and latest/20M/25M/32M layouts, told apart by the folder's files.

A film becomes a video, and a rating becomes an interaction of the click task (the user chose the film): clicked, liked
from 4 stars, disliked up to 2. There are no watch times, no exposures without a click and no pages.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.partition import hashes
from gubs.data.settings import SourceSettings
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import TextFormat, guess_encoding
from gubs.data.sources.log import Done, Findings, Head, Log, first_times
from gubs.data.sources.reading import (
    STARS_NOTE,
    Column,
    Sheet,
    build,
    clicks,
    constant,
    facts,
    read_sheet,
    tag_lists,
)
from gubs.errors import InputError
from gubs.records import Task

GENRES = [
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
]
"""Flags at the end of a line of `u.item`, in order (`u.genre` of 100K)."""

AGES = {1: (16, "under 18"), 18: (21, "18-24"), 25: (30, "25-34"), 35: (40, "35-44")}
AGES |= {45: (47, "45-49"), 50: (53, "50-55"), 56: (60, "56 or older")}
"""Age codes of the 1M layout: an age in years near the middle of the range (16 and 60 at the open ends), the range."""

OCCUPATIONS = [
    *("other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service"),
    *("doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer"),
    *("retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman"),
    *("unemployed", "writer"),
]
"""Occupation codes of the 1M layout (its README), from 0."""

_UNSEEN_SEED = 20_261_127
_DRAWS = 8
"""Films drawn for each that is needed: some are known to the user, or drawn twice."""

_CLICKS_NOTE = (
    "There are no watch times, so there is no sequential task: every rating is a click, and no exposure without a "
    "click is known."
)

_UNSEEN_NOTE = (
    "There are no watch times, so there is no sequential task. Ratings are clicks without stars; "
    "{} film(s) per rating that the user has not rated count as shown and not clicked."
)

_RATINGS = (
    Column("user_id", "id", ("user_id", "userId"), nullable=False),
    Column("video_id", "id", ("video_id", "movieId"), nullable=False),
    Column("rating", "number", nullable=False, minimum=0.5, maximum=5),
    Column("timestamp", "time"),
)
_RATINGS_HEADER = ("user_id", "video_id", "rating", "timestamp")

_USERS_100K = (
    Column("user_id", "id", nullable=False),
    Column("age", "integer", minimum=0, maximum=120),
    *(Column("gender"), Column("occupation"), Column("zip code")),
)
_USERS_1M = (
    Column("user_id", "id", nullable=False),
    Column("gender"),
    Column("age", "integer"),
    Column("occupation", "integer", minimum=0, maximum=len(OCCUPATIONS) - 1),
    Column("zip code"),
)


@dataclass(frozen=True)
class _Layout:
    ratings: str
    movies: str
    users: str | None
    text: TextFormat
    coded: bool = False
    """Whether ages and occupations are codes."""

    def format(self, *header: str, encoding: str = "utf-8") -> TextFormat:
        """How a file of this edition is written; the files of the csv editions have header lines."""
        names = () if self.text.quoted else header
        delimiter = "|" if self.text.delimiter == "\t" and header != _RATINGS_HEADER else self.text.delimiter
        return TextFormat(delimiter, names, self.text.quoted, encoding)


_LAYOUTS = (
    _Layout("u.data", "u.item", "u.user", TextFormat("\t", quoted=False)),
    _Layout("ratings.dat", "movies.dat", "users.dat", TextFormat("::", quoted=False), coded=True),
    _Layout("ratings.csv", "movies.csv", None, TextFormat(",")),
)


def open_source(settings: SourceSettings) -> Log:
    """A MovieLens folder.

    Raises:
        InputError: no known edition in the folder, or a file that cannot be used.
    """
    folder, bad = Path(settings.path), settings.max_bad_rows
    layout = _detect(folder)
    notes = [
        _UNSEEN_NOTE.format(settings.unseen) if settings.unseen else _CLICKS_NOTE,
        "The films are described by title and genres only: there are no video files.",
    ]
    notes += [STARS_NOTE, "The users have no interest tags."]
    movies, videos = _read_movies(folder, layout, bad)
    sheets, users = [movies], None
    if layout.users and (folder / layout.users).exists():
        demographics, users = _read_users(folder / layout.users, layout, bad)
        sheets.append(demographics)
        if layout.coded:
            notes.append("Ages are codes for ranges: `age` is near the middle of the range, `other` has the range.")
    else:
        notes.append("This edition has no demographics: age, gender and occupation are unknown.")
    file = InputFile.at(_find(folder, layout.ratings))
    text = layout.format(*_RATINGS_HEADER)
    log = _Ratings([file], [Head.sized(file)], bad, users, videos, sheets, tuple(notes), text=text)
    return _Unseen(**vars(log), each=settings.unseen) if settings.unseen else log


class _Ratings(Log):
    columns = _RATINGS

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        del users
        rows.reject_duplicates("user_id", "video_id")
        return Done(clicks(rows.table, "user_id", "video_id"))


@dataclass(frozen=True)
class _Unseen(_Ratings):
    """Ratings as clicks without stars, and films that were shown and not clicked (`source.unseen`)."""

    each: int = 1
    """Films per rating."""
    first: pa.Table | None = None
    """Each film and the time of its first rating, in the order of these times; known once all rows are read."""

    fan_out: ClassVar[int] = 2

    def findings(self, sheet: Sheet) -> Findings:
        """See `Log`."""
        return replace(super().findings(sheet), first=first_times(sheet.table))

    def decided(self, findings: Findings) -> Self:
        """See `Log`."""
        assert findings.first is not None
        first = findings.first.sort_by([("timestamp", "ascending"), ("video_id", "ascending")])
        return replace(super().decided(findings), first=first)

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        assert self.first is not None
        done = super().finish(rows, users)
        return replace(done, interactions=with_unseen(done.interactions, self.first, self.each))


def with_unseen(interactions: pa.Table, first: pa.Table, each: int) -> pa.Table:
    """Ratings as clicks without stars, and for each some films that the user never rated, at the same time. They are
    drawn from those that somebody had rated by then; a user's draws depend on no other user's.

    Args:
        interactions: all clicks of some users, schema `interactions`; to those without a time nothing is added.
        first: each film and the time of its first rating, in the order of these times.
        each: films per click; fewer where the user has rated nearly all that there were.
    """
    frame = interactions.select(["user_id", "video_id", "timestamp"]).to_pandas()
    place = pd.Index(first["video_id"].to_pandas()).get_indexer(frame["video_id"])
    available = np.searchsorted(
        first["timestamp"].to_numpy(), frame["timestamp"].fillna(-np.inf).to_numpy(), side="right"
    )
    added, films = list[int](), list[int]()
    for user, rows in frame.groupby("user_id", sort=False).indices.items():
        rng = np.random.default_rng([_UNSEEN_SEED, int(hashes(pa.array([user]))[0])])
        drawn = rng.integers(np.maximum(available[rows], 1)[:, None], size=(len(rows), _DRAWS * each))
        taken = set(place[rows].tolist())
        for row, some in zip(rows[available[rows] > 0].tolist(), drawn[available[rows] > 0].tolist(), strict=True):
            new = [film for film in dict.fromkeys(some) if film not in taken][:each]
            taken.update(new)
            added += [row] * len(new)
            films += new
    clicked = interactions.take(pa.array(added, pa.int64()))
    unseen = _not_clicked(clicked["user_id"], first["video_id"].take(pa.array(films, pa.int64())), clicked["timestamp"])
    return pa.concat_tables([_starless(interactions), unseen])


def _starless(interactions: pa.Table) -> pa.Table:
    """Interactions without stars, likes and dislikes."""
    for name in ("rating", "liked", "disliked"):
        column = interactions.schema.field(name)
        place = interactions.schema.get_field_index(name)
        interactions = interactions.set_column(place, column, pa.nulls(interactions.num_rows, column.type))
    return interactions


def _not_clicked(users: pa.ChunkedArray, films: pa.ChunkedArray, times: pa.ChunkedArray) -> pa.Table:
    """Exposures without a click."""
    n = len(users)
    return build(
        "interactions",
        n,
        interaction_id=pc.binary_join_element_wise(users, films, "unseen", "-"),
        user_id=users,
        video_id=films,
        task=constant(Task.CLICK.value, n, pa.string()),
        timestamp=times,
        clicked=constant(False, n, pa.bool_()),
    )


def _detect(folder: Path) -> _Layout:
    for layout in _LAYOUTS:
        for name in (layout.ratings, layout.ratings + ".gz"):
            if (folder / name).is_file():
                return layout
    names = ", ".join(layout.ratings for layout in _LAYOUTS)
    raise InputError(f"{folder}: no MovieLens edition is there; source.path must be a folder with one of {names}")


def _find(folder: Path, name: str) -> Path:
    zipped = folder / (name + ".gz")
    return zipped if zipped.is_file() and not (folder / name).is_file() else folder / name


def _read_movies(folder: Path, layout: _Layout, bad: float) -> tuple[Sheet, pa.Table]:
    path = _find(folder, layout.movies)
    flagged = layout.movies == "u.item"
    header = ("released", "video_released", "url", *GENRES) if flagged else ("genres",)
    genres = [Column(g, "flag") for g in GENRES[1:]] if flagged else [Column("genres")]
    columns = [Column("video_id", "id", ("video_id", "movieId"), nullable=False), Column("title"), *genres]
    encoding = guess_encoding(path) if path.is_file() and path.suffix != ".gz" else "utf-8"
    sheet = read_sheet(path, columns, bad, text=layout.format("video_id", "title", *header, encoding=encoding))
    sheet.reject_duplicates("video_id")
    titles = sheet.column("title")
    titles = pc.if_else(pc.equal(titles, "unknown"), None, titles)
    if flagged:
        tags = tag_lists(len(sheet.lines), [pc.if_else(sheet.column(g), g, None) for g in GENRES[1:]])
    else:
        listed = pc.if_else(pc.equal(sheet.column("genres"), "(no genres listed)"), None, sheet.column("genres"))
        tags = pc.coalesce(pc.split_pattern(listed, "|").combine_chunks(), pa.scalar([], pa.list_(pa.string())))
    return sheet, build("videos", len(titles), video_id=sheet.column("video_id"), title=titles, tags=tags)


def _read_users(path: Path, layout: _Layout, bad: float) -> tuple[Sheet, pa.Table]:
    expected = _USERS_1M if layout.coded else _USERS_100K
    sheet = read_sheet(path, expected, bad, text=layout.format(*(c.name for c in expected)))
    sheet.reject_duplicates("user_id")
    age, age_codes = sheet.column("age"), pa.array(list(AGES), pa.int64())
    if layout.coded:
        unknown = pc.and_(pc.is_null(pc.index_in(age, value_set=age_codes)), age.is_valid())
        sheet.reject(unknown, "unknown age code", "age", malformed=True)
    n, age, occupation = len(sheet.lines), sheet.column("age"), sheet.column("occupation")
    other: dict[str, pa.ChunkedArray] = {}
    if layout.coded:
        index = pc.index_in(age, value_set=age_codes)
        age = pc.take(pa.array([years for years, _ in AGES.values()]), index)
        occupation = pc.take(pa.array(OCCUPATIONS), occupation)
        other["age range"] = pc.take(pa.array([text for _, text in AGES.values()]), index)
    other["zip code"] = sheet.column("zip code")
    gender = sheet.column("gender")
    gender = pc.if_else(pc.equal(gender, "M"), "male", pc.if_else(pc.equal(gender, "F"), "female", gender))
    columns = {"user_id": sheet.column("user_id"), "age": age, "gender": gender, "occupation": occupation}
    return sheet, build("users", n, **columns, other=facts(n, other), tags=tag_lists(n, []))
