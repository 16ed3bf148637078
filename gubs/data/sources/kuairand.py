"""KuaiRand as a source: impressions with play times, from the prepared Parquet logs of KuaiRand-Pure, or the original
CSV logs of an edition.

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
from gubs.data.sources.files import InputFile
from gubs.data.sources.log import Done, Findings, Head, Log, Tally
from gubs.data.sources.reading import (
    Column,
    Sheet,
    bare_records,
    build,
    facts,
    joined,
    read_sheet,
    tag_lists,
)
from gubs.errors import InputError
from gubs.records import SCHEMAS, Task

CLICK_TAB = 0
SEQUENTIAL_TABS = (1, 2, 4, 6)
"""Tabs whose meaning is known from their play and click rates; see the module's docstring."""

INTEREST_TAGS = 5
"""Most interest tags per user."""

_LOGS = {"pure_log_*.parquet": "pure"} | {f"log_standard_*_{e}*.csv*": e for e in ("pure", "1k", "27k")}
"""Name patterns of the logs, best first, and their edition."""
_USERS, _VIDEOS = "user_features_{}.csv", "video_features_basic_{}.csv"
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

_NOTES = (
    "There are no titles and no video files: a video is known by tags, upload type, music type, author and duration.",
    "Topic tags, authors and music types are anonymous numbers.",
    "The two-minute filter cannot be applied: only views of pool videos are logged, so the time between a user's "
    "logged operations is not the time between the user's operations; the gaps are unknown.",
    "Leaving the app is not logged.",
    "is_click is kept for tab 0 only: in the single column it means a valid play, not a choice.",
    "Pages are not logged: the exposures of tab 0 have neither page nor position.",
)
_OTHER_EDITION = (
    "The like/hate rows of KuaiRand-27K are left out: their video ids belong to another edition, and their tab (hence "
    "their task) is unknown."
)


def open_source(settings: SourceSettings) -> Log:
    """A KuaiRand folder.

    Raises:
        InputError: no log in the folder, or a file that cannot be used.
    """
    folder, bad = Path(settings.path), settings.max_bad_rows
    paths, edition = _logs(folder)
    files = [InputFile.at(p) for p in paths]
    video_sheet, videos = _read_videos(folder / _VIDEOS.format(edition), bad)
    user_sheet, users = _read_users(folder / _USERS.format(edition), bad)
    sheets = [video_sheet, user_sheet]
    if (folder / _HISTORY).is_file():
        history = read_sheet(folder / _HISTORY, _HISTORY_COLUMNS, bad)
        history.reject_duplicates("user_id")
        sheets.append(history)
        topics = tag_lists(videos.num_rows, _topics(video_sheet)).to_pylist()
        topics = dict(zip(videos["video_id"].to_pylist(), topics, strict=True))
        users = _with_interests(users, history, topics)
    notes = (_OTHER_EDITION,) if list(folder.glob("kr27k_like_vs_hate*")) else ()
    return _Views(files, [Head.sized(f) for f in files], bad, users, videos, sheets, notes)


def _logs(folder: Path) -> tuple[list[Path], str]:
    """The logs with the first name pattern that matches, and their edition; a row that an earlier file has too is a
    duplicate.
    """
    for pattern, edition in _LOGS.items():
        if paths := list(folder.glob(pattern)):
            # Of the two prepared logs, `val` is the earlier one, and sorts last.
            return sorted(paths, key=lambda p: ("test" in p.name, p.name)), edition
    raise InputError(f"{folder}: no log here; source.path must be a folder with {' or '.join(_LOGS)}")


class _Views(Log):
    columns = _LOG

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        rows.reject_duplicates("user_id", "video_id", "time_ms")
        rows.reject(pc.less_equal(rows.column("duration_ms"), 0), "no duration", "duration_ms")
        in_use = pc.is_in(rows.column("tab"), value_set=pa.array([CLICK_TAB, *SEQUENTIAL_TABS], pa.int64()))
        rows.reject(pc.invert(in_use), "tab not used", "tab")
        interactions = _interactions(rows.table)
        if "interests" not in users.column_names:
            return Done(interactions)
        history = _earlier(users, interactions)
        counts = Counter(
            interested=pc.sum(pc.greater(pc.list_value_length(history.column("interests")), 0)).as_py() or 0
        )
        return Done(interactions, _tagged(users, history), rejects=history.rejects, counts=counts)

    def conclude(self, findings: Findings, tally: Tally) -> list[str]:
        """See `Log`."""
        notes, others = list(_NOTES), super().conclude(findings, tally)
        if self.users is not None and "interests" in self.users.column_names:
            notes.append(
                f"Interest tags of {tally.counts['interested']} users are the {INTEREST_TAGS} most frequent topics of "
                f"videos they liked or watched for long before the log; the earlier views themselves are left out, "
                f"since their tab, time and play rate are unknown."
            )
        return notes + others


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
    tags = tag_lists(n, [*_topics(sheet), *descriptions])
    seconds = pc.divide(t["video_duration"], 1000.0)
    return sheet, build("videos", n, video_id=t["video_id"], duration_s=seconds, tags=tags)


def _topics(videos: Sheet) -> list[pa.ChunkedArray]:
    """Topic tags: of `39,68`, `tag 39` in the first column and `tag 68` in the second."""
    lists = pc.split_pattern(videos.column("tag").fill_null(""), ",").combine_chunks()
    most = pc.max(pc.list_value_length(lists)).as_py() or 0
    items = pc.utf8_trim_whitespace(pc.list_slice(lists, 0, most, return_fixed_size_list=True).values) if most else []
    topics = [pa.chunked_array([items[i::most]]) for i in range(most)]
    return [joined("tag ", pc.if_else(pc.utf8_is_digit(t), t, None)) for t in topics]


def _read_users(path: Path, bad: float) -> tuple[Sheet, pa.Table]:
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
    return sheet, build("users", n, user_id=t["user_id"], other=facts(n, other), tags=tag_lists(n, []))


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


def _with_interests(users: pa.Table, history: Sheet, topics: dict[str, list[str]]) -> pa.Table:
    """The users with what their history tells: `interests`, its last time, its line; and users who have nothing else
    (`described` is false).

    Interests are the most frequent topics of the videos a user liked or watched for long before the log begins. The
    earlier views have neither times nor tabs nor play rates, so they cannot be interactions.
    """
    ids = history.column("user_id").combine_chunks()
    more = ids.filter(pc.invert(pc.is_in(ids, value_set=users["user_id"].combine_chunks())))
    everyone = pa.concat_tables([users, bare_records("users", "user_id", more, None)])
    rows = pc.index_in(everyone["user_id"], value_set=ids)
    views = history.table.select(["like_seq", "long_watch_seq"]).to_pylist()
    interests = [_favourites((v["like_seq"] or []) + (v["long_watch_seq"] or []), topics) for v in views]
    columns = {
        "described": pa.array(np.arange(everyone.num_rows) < users.num_rows),
        "interests": pc.take(pa.array(interests, pa.list_(pa.string())), rows),
        "last_time_ms": pc.take(history.column("last_time_ms"), rows),
        "history_line": pc.take(pa.array(history.lines), rows),
    }
    for name, column in columns.items():
        everyone = everyone.append_column(name, column)
    return everyone


def _earlier(users: pa.Table, interactions: pa.Table) -> Sheet:
    """The histories that end before the log begins. Interests from a longer one could give away what is to be
    predicted.
    """
    with_history = users.filter(users["history_line"].is_valid())
    history = Sheet(_HISTORY, with_history, with_history["history_line"].to_numpy(), with_history.num_rows)
    starts = interactions.group_by("user_id").aggregate([("timestamp", "min")])
    rows = pc.index_in(with_history["user_id"], value_set=starts["user_id"].combine_chunks())
    first = pc.take(starts["timestamp_min"], rows)
    history.reject(pc.greater_equal(history.column("last_time_ms"), first), "history overlaps the log", "last_time_ms")
    return history


def _tagged(users: pa.Table, history: Sheet) -> pa.Table:
    """The described users, those with a history with its interests as tags."""
    described = users.filter(users["described"])
    rows = pc.index_in(described["user_id"], value_set=history.column("user_id").combine_chunks())
    tags = pc.take(history.column("interests"), rows).combine_chunks()
    columns = {n: described[n] for n in SCHEMAS["users"].names}
    return build("users", described.num_rows, **columns | {"tags": pc.coalesce(tags, pa.scalar([], tags.type))})


def _favourites(videos: list[str], topics: dict[str, list[str]]) -> list[str]:
    counts = Counter(tag for v in videos for tag in topics.get(v, []))
    return sorted(counts, key=lambda tag: (-counts[tag], tag))[:INTEREST_TAGS]
