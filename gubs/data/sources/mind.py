"""MIND as a source: news with categories, and pages of news that users were shown, with what they clicked.

Files: `behaviors.tsv` (impression, user, time, news clicked before, news shown as `N1-0 N2-1`) and `news.tsv` (id,
category, subcategory, title, ...), neither with a header; in the folder, or in subfolders of it (`MINDsmall_train`,
`MINDsmall_dev`). An impression is a page of the click task. The data are Microsoft's (Wu et al., "MIND", ACL 2020).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import TextFormat
from gubs.data.sources.log import Done, Findings, Head, Log, Tally
from gubs.data.sources.reading import (
    Column,
    Sheet,
    build,
    constant,
    duplicated,
    joined,
    read_sheet,
    tag_lists,
)
from gubs.errors import InputError
from gubs.records import Task

INTEREST_TAGS = 5
"""Most interest tags per user."""

_BEHAVIORS, _NEWS = "behaviors.tsv", "news.tsv"
_TIME = "%m/%d/%Y %I:%M:%S %p"
_SHOWN = r"^\S+-[01](\s+\S+-[01])*$"

_NOTES = (
    "There are no watch times, so there is no sequential task: what was shown is the click task.",
    "News have no video files; abstracts, addresses and entities are left out.",
    "The zone of the times is unknown; they are taken for UTC.",
)

_PAGES = (
    Column("impression", "id", nullable=False),
    Column("user_id", "id", nullable=False),
    Column("time", "word", nullable=False),
    Column("history"),
    Column("shown", nullable=False),
)

_ARTICLES = (
    Column("video_id", "id", nullable=False),
    Column("category", "word"),
    Column("subcategory", "word"),
    Column("title"),
)
_UNREAD = ("abstract", "url", "title_entities", "abstract_entities")


def open_source(settings: SourceSettings) -> Log:
    """A folder of MIND, or a folder of such folders.

    Raises:
        InputError: no behaviors.tsv, or news that cannot be used.
    """
    folders, bad = _folders(Path(settings.path)), settings.max_bad_rows
    labels = ["" if len(folders) == 1 else f"{f.name}/" for f in folders]
    parts = [InputFile(str(f / _BEHAVIORS), label + _BEHAVIORS) for f, label in zip(folders, labels, strict=True)]
    news, videos = _read_news(folders, labels, bad)
    text = TextFormat("\t", tuple(c.name for c in _PAGES), quoted=False)
    heads = [Head.sized(f) for f in parts]
    return _Pages(parts, heads, bad, videos=videos, sheets=news, notes=_NOTES, text=text, unique="impression")


def files(settings: SourceSettings) -> list[Path]:
    """The files that decide the tables."""
    return [folder / name for folder in _folders(Path(settings.path)) for name in (_BEHAVIORS, _NEWS)]


def _folders(root: Path) -> list[Path]:
    folders = [root] if (root / _BEHAVIORS).is_file() else sorted(p.parent for p in root.glob(f"*/{_BEHAVIORS}"))
    if not folders:
        raise InputError(f"{root}: no {_BEHAVIORS} in it or a subfolder; source.path must be a folder of MIND")
    return folders


class _Pages(Log):
    columns = _PAGES
    fan_out = 32
    broadcast = ("video_id", "tags")

    def check(self, sheet: Sheet) -> None:
        """See `Log`; `time` becomes `timestamp`. The test part of MIND has no clicks, and is refused."""
        unlabelled = pc.invert(pc.match_substring_regex(sheet.column("shown"), _SHOWN))
        sheet.reject(unlabelled, "not news with -0 or -1 (clicked)", "shown", malformed=True)
        times = pd.to_datetime(sheet.column("time").to_pandas(), format=_TIME, errors="coerce", utc=True)
        sheet.reject(times.isna().to_numpy(), "not a time as 11/15/2019 8:55:22 AM", "time", malformed=True)
        stamps = pa.array(times.dropna(), pa.timestamp("ms", "UTC")).cast(pa.int64())
        sheet.table = sheet.table.drop_columns("time").append_column("timestamp", stamps)

    def ids(self, rows: pa.Table) -> pa.Array:
        """Impressions, which each file numbers anew."""
        return joined(rows["file"], "-", rows["impression"]).combine_chunks()

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`; all that is known of users is in the pages."""
        del users
        assert self.videos is not None
        folders = pa.array([f.label.removesuffix(_BEHAVIORS) for f in self.files])
        pages = joined(pc.take(folders, rows.column("file")), rows.column("impression"))
        topics = dict(zip(self.videos["video_id"].to_pylist(), self.videos["tags"].to_pylist(), strict=True))
        readers, earlier = _users(rows.table, topics)
        return Done(_shown(rows, pages), readers, counts=Counter(earlier=earlier))

    def conclude(self, findings: Findings, tally: Tally) -> list[str]:
        """See `Log`."""
        interests = (
            f"Interest tags of users are the {INTEREST_TAGS} most frequent subcategories of what they had clicked "
            f"before their first page; these {tally.counts['earlier']:,} clicks themselves are left out, since their "
            f"times are unknown."
        )
        return [*super().conclude(findings, tally), interests]


def _shown(pages: Sheet, ids: pa.ChunkedArray) -> pa.Table:
    """One exposure for each news of each page."""
    lists = pc.split_pattern_regex(pages.column("shown"), r"\s+").combine_chunks()
    rows = pa.array(pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64))
    starts = np.searchsorted(rows, np.arange(len(lists)))
    position = np.arange(len(rows)) - starts[rows]
    parts = pc.extract_regex(pc.list_flatten(lists), r"^(?P<news>\S+)-(?P<clicked>[01])$")
    n, page = len(rows), ids.take(rows)
    return build(
        "interactions",
        n,
        interaction_id=joined(page, "-", pa.chunked_array([pa.array(position)])),
        user_id=pages.column("user_id").take(rows),
        video_id=pc.struct_field(parts, "news"),
        task=constant(Task.CLICK.value, n, pa.string()),
        timestamp=pages.column("timestamp").take(rows),
        page_id=page,
        position=pa.array(position),
        clicked=pc.equal(pc.struct_field(parts, "clicked"), "1"),
    )


def _read_news(folders: Sequence[Path], labels: Sequence[str], bad: float) -> tuple[list[Sheet], pa.Table]:
    """The news of all folders; those that an earlier folder has too are duplicates."""
    text = TextFormat("\t", (*(c.name for c in _ARTICLES), *_UNREAD), quoted=False)
    places = zip(folders, labels, strict=True)
    sheets = [read_sheet(InputFile(str(f / _NEWS), label + _NEWS), _ARTICLES, bad, text=text) for f, label in places]
    repeated = duplicated(pa.concat_tables([s.table.select(["video_id"]) for s in sheets]).columns)
    borders = np.cumsum([len(s.lines) for s in sheets])[:-1]
    for sheet, mask in zip(sheets, np.split(repeated, borders), strict=True):
        sheet.reject(mask, "duplicate", "video_id")
    news = pa.concat_tables([s.table for s in sheets])
    category, subcategory = news["category"], news["subcategory"]
    finer = pc.if_else(pc.fill_null(pc.equal(category, subcategory), False), None, subcategory)
    tags = tag_lists(news.num_rows, [category, finer])
    return sheets, build("videos", news.num_rows, video_id=news["video_id"], title=news["title"], tags=tags)


def _users(pages: pa.Table, topics: dict[str, list[str]]) -> tuple[pa.Table, int]:
    """Users with interest tags from the history of their first page, and how many clicks those histories have.

    Later histories may hold clicks of the pages themselves, which are to be predicted.
    """
    times = pages.select(["user_id", "timestamp"]).to_pandas()
    first = times.sort_values("timestamp", kind="stable").drop_duplicates("user_id").sort_values("user_id").index
    first_pages = pages.take(pa.array(first))
    clicked = [history.split() if history else [] for history in first_pages["history"].to_pylist()]
    tags = pa.array([_favourites(news, topics) for news in clicked], pa.list_(pa.string()))
    return build("users", first_pages.num_rows, user_id=first_pages["user_id"], tags=tags), sum(map(len, clicked))


def _favourites(news: Sequence[str], topics: dict[str, list[str]]) -> list[str]:
    """The most frequent finest topics, equally frequent ones by name."""
    counts = Counter(topics[n][-1] for n in news if topics.get(n))
    return sorted(counts, key=lambda topic: (-counts[topic], topic))[:INTEREST_TAGS]
