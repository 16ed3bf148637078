"""KuaiRand-Pure as a source: impressions with play times, from the prepared Parquet logs or the original CSV logs.

Tab 0 is the two-column page, where `is_click` is a tap on a cover: the click task. Tabs 1, 2, 4 and 6 play in a single
column: the sequential task, where only the play rate counts. Other tabs are neither and are rejected. The logs are
Kuaishou's (Gao et al., "KuaiRand", CIKM 2022).
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.reading import Column, Sheet, assemble, build, duplicated, facts, joined, read_sheet, tag_lists
from gubs.errors import InputError
from gubs.records import Task

CLICK_TAB = 0
SEQUENTIAL_TABS = (1, 2, 4, 6)
"""Tabs whose meaning is known from their play and click rates; see the module's docstring."""

INTEREST_TAGS = 5
"""Most interest tags per user."""

_LOG_NAMES = ("pure_log_*.parquet", "log_standard_*_pure.csv*")
_USERS, _VIDEOS = "user_features_pure.csv", "video_features_basic_pure.csv"
_HISTORY = "pure_user_sequences.parquet"

_LOG = (
    Column("user_id", "id", nullable=False),
    Column("video_id", "id", nullable=False),
    Column("time_ms", "time", nullable=False),
    Column("is_click", "flag", nullable=False),
    Column("is_like", "flag", nullable=False),
    Column("is_hate", "flag", nullable=False),
    Column("play_time_ms", "number", nullable=False, minimum=0),
    Column("duration_ms", "number", nullable=False),
    Column("tab", "integer", nullable=False),
)

_FACTS = {
    "activity": "user_active_degree",
    "accounts followed": "follow_user_num_range",
    "fans": "fans_user_num_range",
    "friends": "friend_user_num_range",
    "days since registration": "register_days_range",
}
"""Names of a user's facts, and their columns. The 18 anonymous one-hot columns mean nothing to a reader."""

_NOTES = [
    "There are no titles and no video files: a video is known by tags, upload type, music type, author and duration.",
    "Topic tags, authors and music types are anonymous numbers.",
    "The two-minute filter cannot be applied: only views of pool videos are logged, so the time between a user's "
    "logged operations is not the time between the user's operations; the gaps are unknown.",
    "Leaving the app is not logged.",
    "is_click is kept for tab 0 only: in the single column it means a valid play, not a choice.",
    "Pages are not logged: the exposures of tab 0 have neither page nor position.",
]


def read(settings: SourceSettings) -> SourceTables:
    """Reads a KuaiRand-Pure folder.

    Raises:
        InputError: no log in the folder, or a file that cannot be used.
    """
    folder, bad = Path(settings.path), settings.max_bad_rows
    notes = list(_NOTES)
    logs = _read_logs(folder, bad)
    interactions = pa.concat_tables([_interactions(s.table) for s in logs])
    video_sheet, videos = _read_videos(folder / _VIDEOS, bad)
    topics = dict(zip(videos["video_id"].to_pylist(), _topics(video_sheet), strict=True))
    interests: dict[str, list[str]] = {}
    sheets = [*logs, video_sheet]
    if (folder / _HISTORY).is_file():
        history = read_sheet(folder / _HISTORY, _HISTORY_COLUMNS, bad)
        interests = _interests(history, topics, interactions, notes)
        sheets.append(history)
    user_sheet, users = _read_users(folder / _USERS, interests, bad)
    if list(folder.glob("kr27k_like_vs_hate*")):
        notes.append(
            "The like/hate rows of KuaiRand-27K are left out: their video ids belong to another edition, and their tab "
            "(hence their task) is unknown."
        )
    return assemble(users, videos, interactions, [*sheets, user_sheet], notes)


def _read_logs(folder: Path, bad: float) -> list[Sheet]:
    """Reads the logs with the first name pattern that matches; a row that an earlier file has too is a duplicate."""
    paths = next((matches for name in _LOG_NAMES if (matches := list(folder.glob(name)))), [])
    if not paths:
        raise InputError(f"{folder}: no log here; source.path must be a folder with {' or '.join(_LOG_NAMES)}")
    # Of the two prepared logs, `val` is the earlier one, and sorts last.
    sheets = [read_sheet(p, _LOG, bad) for p in sorted(paths, key=lambda p: ("test" in p.name, p.name))]
    rows = pa.concat_tables([s.table.select(["user_id", "video_id", "time_ms"]) for s in sheets])
    repeated = np.split(duplicated(rows.columns), np.cumsum([len(s.lines) for s in sheets])[:-1])
    for sheet, mask in zip(sheets, repeated, strict=True):
        sheet.reject(mask, "duplicate", "time_ms")
        sheet.reject(pc.less_equal(sheet.column("duration_ms"), 0), "no duration", "duration_ms")
        in_use = pc.is_in(sheet.column("tab"), value_set=pa.array([CLICK_TAB, *SEQUENTIAL_TABS], pa.int64()))
        sheet.reject(pc.invert(in_use), "tab not used", "tab")
    return sheets


def _interactions(log: pa.Table) -> pa.Table:
    click = pc.equal(log["tab"], CLICK_TAB)
    return build(
        "interactions",
        log.num_rows,
        interaction_id=joined(log["user_id"], "-", log["video_id"], "-", log["time_ms"]),
        user_id=log["user_id"],
        video_id=log["video_id"],
        task=pc.if_else(click, Task.CLICK.value, Task.SEQUENTIAL.value),
        timestamp=log["time_ms"],
        watch_s=pc.divide(log["play_time_ms"], 1000.0),
        play_rate=pc.min_element_wise(pc.divide(log["play_time_ms"], log["duration_ms"]), 1.0),
        clicked=pc.if_else(click, log["is_click"], None),
        liked=log["is_like"],
        disliked=log["is_hate"],
    )


def _read_videos(path: Path, bad: float) -> tuple[Sheet, pa.Table]:
    columns = [
        Column("video_id", "id", nullable=False),
        Column("video_duration", "number", minimum=0),
        *(Column(n, "text") for n in ("video_type", "upload_type", "tag")),
        *(Column(n, "integer") for n in ("author_id", "music_type")),
    ]
    sheet = read_sheet(path, columns, bad)
    sheet.reject_duplicates("video_id")
    n, t = len(sheet.lines), sheet.table
    uploads = pc.if_else(pc.equal(t["upload_type"], "UNKNOWN"), None, t["upload_type"])
    uploads = pc.utf8_lower(pc.replace_substring_regex(uploads, r"([a-z])([A-Z])", r"\1 \2"))
    descriptions = [
        pc.if_else(pc.equal(t["video_type"], "AD"), "advertisement", None),
        joined("upload: ", uploads),
        joined("music type ", t["music_type"]),
        joined("author ", t["author_id"]),
    ]
    more = tag_lists(n, descriptions).to_pylist()
    tags = pa.array([a + b for a, b in zip(_topics(sheet), more, strict=True)], pa.list_(pa.string()))
    seconds = pc.divide(t["video_duration"], 1000.0)
    return sheet, build("videos", n, video_id=t["video_id"], duration_s=seconds, tags=tags)


def _topics(videos: Sheet) -> list[list[str]]:
    """Topic tags per video: `39,68` becomes `tag 39`, `tag 68`."""
    texts = videos.column("tag").to_pylist()
    return [[f"tag {t.strip()}" for t in (text or "").split(",") if t.strip().isdigit()] for text in texts]


def _read_users(path: Path, interests: dict[str, list[str]], bad: float) -> tuple[Sheet, pa.Table]:
    columns = [
        Column("user_id", "id", nullable=False),
        *(Column(n) for n in _FACTS.values()),
        *(Column(n, "integer") for n in ("is_live_streamer", "is_video_author")),
    ]
    sheet = read_sheet(path, columns, bad)
    sheet.reject_duplicates("user_id")
    t = sheet.table
    other = {name: _readable(t[column]) for name, column in _FACTS.items()}
    videos = pc.equal(t["is_video_author"], 1)
    live = pc.equal(t["is_live_streamer"], 1)  # -124 elsewhere
    both = pc.if_else(pc.and_(videos, live), "videos and live streams", pc.if_else(videos, "videos", "live streams"))
    other["makes"] = pc.if_else(pc.or_(videos, live), both, None)
    n = t.num_rows
    tags = pa.array([interests.get(u, []) for u in t["user_id"].to_pylist()], pa.list_(pa.string()))
    return sheet, build("users", n, user_id=t["user_id"], other=facts(n, other), tags=tags)


def _readable(ranges: pa.ChunkedArray) -> pa.ChunkedArray:
    """`[10,100)` becomes `10 to under 100`; `1w` (w = ten thousand) becomes `10k`; UNKNOWN becomes null."""
    text = pc.if_else(pc.equal(ranges, "UNKNOWN"), None, ranges)
    text = pc.replace_substring_regex(text, r"^\((\w+),(\w+)\]$", r"over \1, up to \2")
    text = pc.replace_substring_regex(text, r"^\[(\w+),(\w+)\)$", r"\1 to under \2")
    text = pc.replace_substring_regex(text, r"(\d)w\b", r"\10k")  # RE2: group 1, then a zero
    text = pc.replace_substring_regex(text, r"^(\d+)\+$", r"over \1")
    return pc.replace_substring(text, "_", " ")


_HISTORY_COLUMNS = (
    Column("user_id", "id", nullable=False),
    Column("last_time_ms", "time", nullable=False),
    Column("like_seq", "texts"),
    Column("long_watch_seq", "texts"),
)


def _interests(
    history: Sheet, topics: dict[str, list[str]], interactions: pa.Table, notes: list[str]
) -> dict[str, list[str]]:
    """Interest tags: the most frequent topics of the videos a user liked or watched for long before the log begins.

    The earlier views have neither times nor tabs nor play rates, so they cannot be interactions. A user whose earlier
    history reaches into the log gets no tags, since they could give away what is to be predicted.
    """
    history.reject_duplicates("user_id")
    starts = interactions.group_by("user_id").aggregate([("timestamp", "min")])
    rows = pc.index_in(history.column("user_id"), value_set=starts["user_id"].combine_chunks())
    first = pc.take(starts["timestamp_min"], rows)
    history.reject(pc.greater_equal(history.column("last_time_ms"), first), "history overlaps the log", "last_time_ms")
    interests = {
        row["user_id"]: _favourites((row["like_seq"] or []) + (row["long_watch_seq"] or []), topics)
        for row in history.table.to_pylist()
    }
    notes.append(
        f"Interest tags of {sum(map(bool, interests.values()))} users are the {INTEREST_TAGS} most frequent topics of "
        f"videos they liked or watched for long before the log; the earlier views themselves are left out, since their "
        f"tab, time and play rate are unknown."
    )
    return interests


def _favourites(videos: list[str], topics: dict[str, list[str]]) -> list[str]:
    counts = Counter(tag for v in videos for tag in topics.get(v, []))
    return sorted(counts, key=lambda tag: (-counts[tag], tag))[:INTEREST_TAGS]
