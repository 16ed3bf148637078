"""MicroLens (100K, 50K, 1M) as a source: short videos with titles, covers and video files, and who commented on them.

Files, matched by the ends of their names: `*_pairs.csv` (user, item, timestamp) or `*_pairs.tsv` (user, then the items
in order), `*_title_en.csv` or `*_titles.csv` (item, title), `tags_to_summary.csv` (item, category), and folders with
`ID.mp4` and `ID.jpg`.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import TextFormat
from gubs.data.sources.log import Done, Head, Log
from gubs.data.sources.media import COVER_SUFFIXES, VIDEO_SUFFIXES, media_paths
from gubs.data.sources.reading import (
    Column,
    Sheet,
    build,
    click_sequences,
    clicks,
    read_sheet,
    tag_lists,
)
from gubs.errors import InputError

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


def open_source(settings: SourceSettings) -> Log:
    """A MicroLens folder; the videos may be elsewhere (`source.videos_dir`).

    Raises:
        InputError: no pairs or titles in the folder, or a file that cannot be used.
    """
    folder, bad = Path(settings.path), settings.max_bad_rows
    notes = list(_NOTES)
    path = _one(folder, "*_pairs.csv", "*_pairs.tsv")
    pairs, listed = InputFile.at(path), path.suffix == ".tsv"
    kind = _Lists if listed else _Pairs
    text = TextFormat("\t", ("user_id", "items"), quoted=False) if listed else None
    if listed:
        notes.append("Only the order of a user's pairs is known, not their times.")
    titles = _read_values(_one(folder, "*_title_en.csv", "*_titles.csv"), bad)
    sheets, tags = [titles], None
    if (folder / "tags_to_summary.csv").is_file():
        categories = _read_values(folder / "tags_to_summary.csv", bad)
        rows = pc.index_in(titles.column("video_id"), value_set=categories.column("video_id").combine_chunks())
        tags = pc.take(categories.column("value"), rows)
        sheets.append(categories)
    else:
        notes.append("There is no tags_to_summary.csv: the videos have no category.")
    videos = _videos(titles, tags, folder, settings.videos_dir, notes)
    return kind([pairs], [Head.sized(pairs)], bad, videos=videos, sheets=sheets, notes=tuple(notes), text=text)


class _Pairs(Log):
    columns = _PAIRS

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        del users
        rows.reject_duplicates("user_id", "timestamp", "video_id")
        return Done(clicks(rows.table, "user_id", "video_id", "timestamp"))


class _Lists(Log):
    columns = _LISTS
    fan_out = 8

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        del users
        rows.reject_duplicates("user_id")
        return Done(click_sequences(rows.column("user_id"), pc.split_pattern_regex(rows.column("items"), r"\s+")))


def _one(folder: Path, *patterns: str) -> Path:
    """The only file that matches the first pattern with a match."""
    for pattern in patterns:
        matches = sorted(folder.glob(pattern))
        if len(matches) > 1:
            names = ", ".join(p.name for p in matches)
            raise InputError(f"{folder}: several files match {pattern} ({names}); keep one of them")
        if matches:
            return matches[0]
    raise InputError(f"{folder}: no file {' or '.join(patterns)}; source.path must be a MicroLens folder")


def _read_values(path: Path, bad: float) -> Sheet:
    """A file of `item,value` lines with or without a header; values may contain commas without being quoted."""
    sheet = read_sheet(path, (Column("line", nullable=False),), bad, text=TextFormat("\x1f", ("line",), quoted=False))
    parts = pc.extract_regex(sheet.column("line"), r'^"?(?P<id>[^",\s]+)"?\s*,(?P<value>.*)$')
    sheet.reject(parts.is_null(), "too few values", "line", malformed=True)
    parts = parts.drop_null()
    value = pc.utf8_trim_whitespace(pc.struct_field(parts, "value"))
    quoted = pc.match_substring_regex(value, r'^".*"$')
    bare = pc.replace_substring(pc.utf8_slice_codeunits(value, 1, -1), '""', '"')
    value = pc.if_else(quoted, bare, value)
    value = pc.if_else(pc.equal(value, ""), None, value)
    sheet.table = pa.table({"video_id": pc.struct_field(parts, "id"), "value": value})
    header = pc.is_in(pc.utf8_lower(sheet.column("video_id")), value_set=pa.array(_HEADER_WORDS))
    sheet.reject(pc.and_(header, pa.chunked_array([pa.array(sheet.lines == 1)])), "header line")
    sheet.reject_duplicates("video_id")
    return sheet


def _videos(titles: Sheet, tags: pa.ChunkedArray | None, folder: Path, videos_dir: str, notes: list[str]) -> pa.Table:
    ids = titles.column("video_id")
    video_folders = [Path(videos_dir)] if videos_dir else _folders(folder, "*videos")
    videos = media_paths(ids, video_folders, VIDEO_SUFFIXES, "source.videos_dir")
    covers = media_paths(ids, _folders(folder, "*covers*"), COVER_SUFFIXES, "source.path")
    for column, kind in ((videos, "video"), (covers, "cover")):
        notes.append(f"{len(column) - column.null_count} of {len(column)} videos have a {kind} file.")
    lists, title = tag_lists(len(ids), [] if tags is None else [tags]), titles.column("value")
    return build("videos", len(ids), video_id=ids, title=title, uri=videos, cover_uri=covers, tags=lists)


def _folders(folder: Path, pattern: str) -> list[Path]:
    return sorted(p for p in folder.glob(pattern) if p.is_dir())
