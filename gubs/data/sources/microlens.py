"""MicroLens (100K, 50K, 1M) as a source: short videos with titles, covers and video files, and who commented on them.

Files, found by the ends of their names: `*_pairs.csv` (user, item, timestamp) or `*_pairs.tsv` (user, then the items
in order), `*_title_en.csv` or `*_titles.csv` (item, title), `tags_to_summary.csv` (item, category), and folders with
`ID.mp4` and `ID.jpg`.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gubs.config import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.formats import TextFormat
from gubs.data.sources.media import COVER_SUFFIXES, VIDEO_SUFFIXES, media_by_stem, paths_of
from gubs.data.sources.reading import (
    Column,
    Sheet,
    assemble,
    build,
    constant,
    duplicated,
    expand,
    joined,
    read_sheet,
    tag_lists,
)
from gubs.errors import InputError
from gubs.records import Task

_NOTES = [
    "A pair is a public comment of a user on a video. It counts as a click, and no exposure without a comment is "
    "known; there are no watch times, so there is no sequential task.",
    "Whether a user liked or disliked a video is unknown.",
    "The users are known by their id alone: no age, gender, occupation or interest tags.",
    "Counts of likes and views, and the texts of comments, are left out: they come from what is to be predicted.",
]

_PAIRS = (
    Column("user_id", "id", ("user", "userID", "user_id"), nullable=False),
    Column("video_id", "id", ("item", "videoID", "item_id", "video_id"), nullable=False),
    Column("timestamp", "time"),
)

_LISTS = (Column("user_id", "id", nullable=False), Column("items", nullable=False))

_HEADER_WORDS = ("item", "itemid", "item_id", "video", "videoid", "video_id", "id")


def read(settings: SourceSettings) -> SourceTables:
    """Reads a MicroLens folder; the videos may lie elsewhere (`source.videos_dir`).

    Raises:
        InputError: no pairs or titles in the folder, or a file that cannot be used.
    """
    folder, bad = Path(settings.path), settings.max_bad_rows
    notes = list(_NOTES)
    pairs, interactions = _read_pairs(folder, bad, notes)
    titles = _read_values(_one(folder, "*_title_en.csv", "*_titles.csv"), bad)
    sheets, tags = [pairs, titles], None
    if (folder / "tags_to_summary.csv").is_file():
        categories = _read_values(folder / "tags_to_summary.csv", bad)
        place = pc.index_in(titles.column("video_id"), value_set=categories.column("video_id").combine_chunks())
        tags = pc.take(categories.column("value"), place)
        sheets.append(categories)
    else:
        notes.append("There is no tags_to_summary.csv: the videos have no category.")
    videos = _videos(titles, tags, folder, settings.videos_dir, notes)
    return assemble(None, videos, interactions, sheets, notes)


def _one(folder: Path, *patterns: str) -> Path:
    """The one file that fits the first pattern that any file fits."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise InputError(
                f"{folder}: several files {pattern} ({', '.join(p.name for p in found)}); keep one of them"
            )
        if found:
            return found[0]
    raise InputError(f"{folder}: no file {' or '.join(patterns)}; source.path must be a MicroLens folder")


def _read_pairs(folder: Path, bad: float, notes: list[str]) -> tuple[Sheet, pa.Table]:
    path = _one(folder, "*_pairs.csv", "*_pairs.tsv")
    if path.suffix == ".csv":
        sheet = read_sheet(path, _PAIRS, bad)
        sheet.reject(duplicated([sheet.column(c.name) for c in _PAIRS]), "duplicate", "video_id")
        table = sheet.table
        known = pc.fill_null(table["timestamp"].cast(pa.string()), "")
        return sheet, _clicks(table, joined(table["user_id"], "-", table["video_id"], "-", known))
    sheet = read_sheet(path, _LISTS, bad, text=TextFormat("\t", ("user_id", "items"), quoted=False))
    sheet.reject(duplicated([sheet.column("user_id")]), "duplicate", "user_id")
    items, rows, place = expand(pc.split_pattern_regex(sheet.column("items"), r"\s+"))
    users = pc.take(sheet.column("user_id"), pa.array(rows))
    table = pa.table({"user_id": users, "video_id": items, "timestamp": pa.nulls(len(items), pa.int64())})
    notes.append("Only the order of a user's pairs is known, not their times.")
    return sheet, _clicks(table, joined(users, "-", pa.chunked_array([pa.array(place)])))


def _clicks(table: pa.Table, ids: pa.ChunkedArray) -> pa.Table:
    return build(
        "interactions",
        table.num_rows,
        interaction_id=ids,
        user_id=table["user_id"],
        video_id=table["video_id"],
        task=constant(Task.CLICK.value, table.num_rows, pa.string()),
        timestamp=table["timestamp"],
        clicked=constant(True, table.num_rows, pa.bool_()),
    )


def _read_values(path: Path, bad: float) -> Sheet:
    """A file of `item,value` lines with or without a header, whose values may hold commas without being quoted."""
    sheet = read_sheet(path, (Column("line", nullable=False),), bad, text=TextFormat("\x1f", ("line",), quoted=False))
    parts = pc.extract_regex(sheet.column("line"), r'^"?(?P<id>[^",\s]+)"?\s*,(?P<value>.*)$')
    sheet.reject(parts.is_null(), "too few values", "line", malformed=True)
    parts = pc.extract_regex(sheet.column("line"), r'^"?(?P<id>[^",\s]+)"?\s*,(?P<value>.*)$')
    value = pc.utf8_trim_whitespace(pc.struct_field(parts, "value"))
    quoted = pc.match_substring_regex(value, r'^".*"$')
    bare = pc.replace_substring(pc.utf8_slice_codeunits(value, 1, -1), '""', '"')
    value = pc.if_else(quoted, bare, value)
    value = pc.if_else(pc.equal(value, ""), None, value)
    sheet.table = pa.table({"video_id": pc.struct_field(parts, "id"), "value": value})
    header = pc.is_in(pc.utf8_lower(sheet.column("video_id")), value_set=pa.array(_HEADER_WORDS))
    sheet.reject(pc.and_(header, pa.chunked_array([pa.array(sheet.lines == 1)])), "header line")
    sheet.reject(duplicated([sheet.column("video_id")]), "duplicate", "video_id")
    return sheet


def _videos(titles: Sheet, tags: pa.ChunkedArray | None, folder: Path, videos_dir: str, notes: list[str]) -> pa.Table:
    ids = titles.column("video_id")
    films = media_by_stem(_folders(folder, videos_dir, "*videos"), VIDEO_SUFFIXES, "source.videos_dir")
    covers = media_by_stem(_folders(folder, "", "*covers*"), COVER_SUFFIXES, "source.path")
    uris, pictures = paths_of(ids, films), paths_of(ids, covers)
    for column, what in ((uris, "video"), (pictures, "cover")):
        notes.append(f"{len(column) - column.null_count} of {len(column)} videos have a {what} file.")
    lists = tag_lists(len(ids), [] if tags is None else [tags])
    return build(
        "videos", len(ids), video_id=ids, title=titles.column("value"), uri=uris, cover_uri=pictures, tags=lists
    )


def _folders(folder: Path, given: str, pattern: str) -> list[Path]:
    return [Path(given)] if given else sorted(p for p in folder.glob(pattern) if p.is_dir())
