"""Your own logs as a source: `interactions`, `users` and `videos` tables as .csv, .tsv, .jsonl or .parquet files.

docs/your-own-logs.md has the rules with an example of each. Columns have the names of `records.SCHEMAS`, or are mapped
with `source.columns.OUR_NAME=THEIR_NAME`. Only `interactions` is required, with `user_id`, `video_id`, and what its
task needs:

- task: the `task` column if there is one; else what `infer_tasks` makes of the row.
- play_rate: the column if there is one, else `watch_s` / `duration_s`, where the duration is that of `interactions`, or
  of `videos` where `interactions` has none above 0. It is capped at 1. A sequential row without a play rate is useless
  and is rejected.
- units: those of `source.units`; else what the column's name says (`play_ms`); else seconds, and shares for play rates.
  Values that are not plausible in their unit are refused (`units.py`).
- timestamp: seconds, ms, us or ns since 1970 (told apart by size), or ISO 8601 text (UTC if it has no zone).
- prev_op_gap_s, next_op_gap_s: the columns if the log has them; else unknown, since a log rarely holds every operation
  of a user. To declare that yours does, map both to your timestamp column: they become the times between a user's rows.
- users: other columns become facts (`User.other`), beside those of the column `other`, a map or a JSON object.
- videos: `uri` and `cover_uri` may be relative to the folder; a file `STEM.mp4` in `source.videos_dir` belongs to the
  video STEM.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sys import maxsize
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources import log_rows
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import open_part
from gubs.data.sources.log import ROWS, Done, Findings, Head, Log, Tally
from gubs.data.sources.log_plan import USERS, VIDEOS, LogPlan, find_files, mapped, plan, widened
from gubs.data.sources.media import VIDEO_SUFFIXES, media_paths
from gubs.data.sources.reading import (
    Column,
    Sheet,
    build,
    empty_note,
    facts,
    null_note,
    read_blocks,
    refuse_empty,
    together,
)
from gubs.errors import InputError

Look = Callable[[str, Callable[[InputFile], Head], Sequence[InputFile]], list[Head]]
"""Calls a function with each file of a table, as `Work.run` does."""


def _here(phase: str, head: Callable[[InputFile], Head], files: Sequence[InputFile]) -> list[Head]:  # noqa: ARG001
    return [head(f) for f in files]


def open_source(settings: SourceSettings, look: Look = _here) -> "OwnLog":
    """Decides how your logs are read, and reads the tables of users and videos; `source.path` is as in `find_files`.

    Raises:
        InputError: no interactions, a file or column that cannot be used, or a setting that fits no column.
    """
    files, folder = find_files(settings.path)
    log = _planned(settings, files, folder, look)
    sheets, users, videos, video_sheet, notes = [], None, None, None, list[str]()
    if "users" in files:
        sheet, users, notes = _read_users(log)
        sheets.append(sheet)
    if "videos" in files:
        video_sheet, videos, more = _read_videos(log)
        sheets.append(video_sheet)
        notes += more + log_rows.unused_note(log.label("videos"), video_sheet.unused)
    notes += [note for sheet in sheets if (note := null_note(sheet.label, sheet.nulls))]
    return OwnLog(
        files=files["interactions"],
        heads=log.heads["interactions"],
        max_bad=settings.max_bad_rows,
        users=users,
        videos=videos,
        sheets=sheets,
        notes=tuple(notes),
        unique=_unique(log),
        plan=log,
        video_sheet=video_sheet,
    )


def _planned(settings: SourceSettings, files: Mapping[str, list[InputFile]], folder: str, look: Look) -> LogPlan:
    """The plan. The start of a file of interactions is enough, unless it does not name all columns needed."""
    heads = {}
    for table, parts in files.items():
        there = _here if len(parts) <= _FEW and _is_quick(table, parts) else look
        heads[table] = there(f"look at {table}", _HEADS[table], parts)
    try:
        return plan(settings, files, folder, heads)
    except InputError:
        if all(f.suffix != ".jsonl" for f in files["interactions"]):
            raise
    heads["interactions"] = look("look through interactions", Head.of, files["interactions"])
    return plan(settings, files, folder, heads)


_HEADS = {"interactions": Head.started, "users": Head.of, "videos": Head.of}
"""Users and videos are read whole and once, with facts under any name."""
_FEW = 16
"""This many quick looks take less time than starting workers."""


def _is_quick(table: str, files: Sequence[InputFile]) -> bool:
    """Whether a look at a file of the table reads only its start or its footer."""
    return table == "interactions" or all(f.suffix == ".parquet" for f in files)


def _unique(log: LogPlan) -> str | None:
    return "interaction_id" if "interaction_id" in log.names else None


@dataclass(frozen=True, kw_only=True)
class OwnLog(Log):
    """Your own logs."""

    plan: LogPlan
    video_sheet: Sheet | None
    choice: log_rows.Decided | None = None

    in_parts = True
    broadcast = ("video_id", "duration_s")

    @property
    def for_workers(self) -> Self:
        """The log as workers need it."""
        return replace(super().for_workers, video_sheet=None)

    def read(self, number: int, groups: range | None = None, rows: int = ROWS) -> Iterator[Sheet]:
        """See `Log`."""
        return log_rows.read(self.plan, number, groups, rows)

    def piece(self, sheet: Sheet, number: int) -> pa.Table:
        """See `Log`."""
        return log_rows.as_piece(self.plan, sheet, number)

    def findings(self, sheet: Sheet) -> Findings:
        """See `Log`."""
        return log_rows.findings(self.plan, sheet)

    def again(self, findings: Findings) -> Self | None:
        """See `Log`."""
        wider = widened(self.plan, findings.late)
        if wider is None:
            return None
        return replace(self, plan=wider, heads=wider.heads["interactions"], unique=_unique(wider))

    def decided(self, findings: Findings) -> Self:
        """See `Log`; also refused: clicks that could mean two things."""
        return replace(super().decided(findings), choice=log_rows.decide(self.plan, findings))

    def finish(self, rows: Sheet, users: pa.Table) -> Done:
        """See `Log`."""
        del users
        assert self.choice is not None
        return log_rows.finish(self.plan, self.choice, rows, self._durations(rows.column("video_id")))

    def _durations(self, video_ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Each row's duration by the table `videos`; null where it has none."""
        if self.videos is None or self.videos["duration_s"].null_count == self.videos.num_rows:
            return pa.chunked_array([pa.nulls(len(video_ids), pa.float64())])
        rows = pc.index_in(video_ids, value_set=self.videos["video_id"].combine_chunks())
        return pc.take(self.videos["duration_s"], rows)

    def conclude(self, findings: Findings, tally: Tally) -> list[str]:
        """See `Log`."""
        assert self.choice is not None
        log_rows.check_units(self.plan, tally.evidence, self.video_sheet)
        if not tally.kept.total() and tally.first_rejected is not None:
            log_rows.refuse_unlabelled(self.plan, tally.rejected, tally.first_rejected)
        return log_rows.log_notes(self.plan, findings, self.choice, tally.counts) + list(self.notes)

    def with_videos(self, seen: pa.Table) -> tuple[Self, list[str]]:
        """See `Log`; with the files of `source.videos_dir`."""
        log, notes = super().with_videos(seen)
        videos, more = _attach(log.videos, self.plan.settings.videos_dir)
        return replace(log, videos=videos), notes + more


def _read_users(log: LogPlan) -> tuple[Sheet, pa.Table, list[str]]:
    """The sheet, the users, and notes."""
    columns = mapped("users", log.settings.columns)
    ours = {n for c in columns for n in c.names}
    header = dict.fromkeys(n for head in log.heads["users"] for n in head.header)
    more = [n for n in header if n not in ours and n != "other" and not n.startswith("(unnamed")]
    columns += [Column(f"other {n}", "word", (n,), optional=True) for n in more]
    sheet, notes = _read_table(log, "users", columns)
    sheet.reject_duplicates("user_id")
    other = _facts_of_column(sheet, re.compile(log.rules.missing))
    t, n = sheet.table, len(sheet.lines)
    filled = {c.name: t[c.name] for c in USERS}
    filled["other"] = facts(n, other | {name: t[f"other {name}"] for name in more})
    filled["tags"] = _or_empty(t["tags"])
    return sheet, build("users", n, **filled), notes


def _read_table(log: LogPlan, table: str, columns: Sequence[Column]) -> tuple[Sheet, list[str]]:
    """All files of a table as one sheet; some may have no rows."""
    opened = (open_part(f, names=head.header) for f, head in zip(log.files[table], log.heads[table], strict=True))
    sheets = [sheet for raw in opened for sheet in read_blocks(raw, columns, log.rules, maxsize)]
    for sheet in sheets:
        sheet.max_bad = log.settings.max_bad_rows
        sheet.check_quality()
    whole = together(sheets, log.label(table))
    whole.max_bad = log.settings.max_bad_rows
    refuse_empty(whole.label, whole.rows_in, len(sheets))
    return whole, empty_note(table, {sheet.label: sheet.rows_in for sheet in sheets})


def _facts_of_column(sheet: Sheet, missing: re.Pattern[str]) -> dict[str, pa.ChunkedArray]:
    """The facts in the column `other`, a map or a JSON object as text; rows where it is neither are rejected."""

    def fact(value: object) -> str | None:
        return None if value is None or missing.match(str(value)) else str(value)

    objects = [_json_object(text) for text in sheet.column("other").to_pylist()]
    sheet.reject(np.array([o is None for o in objects], bool), "not a JSON object", "other", malformed=True)
    valid = [o for o in objects if o is not None]
    return {
        name: pa.chunked_array([pa.array([fact(o.get(name)) for o in valid], pa.string())])
        for name in dict.fromkeys(name for o in valid for name in o)
    }


def _json_object(text: str | None) -> dict[str, object] | None:
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _read_videos(log: LogPlan) -> tuple[Sheet, pa.Table, list[str]]:
    """The sheet, the videos, and notes."""
    sheet, notes = _read_table(log, "videos", mapped("videos", log.settings.columns))
    sheet.reject_duplicates("video_id")
    log_rows.convert_units(sheet, "videos", log.stated)
    t = sheet.table
    columns = {c.name: t[c.name] for c in VIDEOS} | {n: _absolute(t[n], log.folder) for n in ("uri", "cover_uri")}
    columns["duration_s"] = pc.if_else(pc.greater(t["duration_s"], 0), t["duration_s"], None)
    columns["tags"] = _or_empty(t["tags"])
    return sheet, build("videos", t.num_rows, **columns), notes


def _absolute(paths: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    def full(path: str) -> str:
        return f"{folder.rstrip('/')}/{path}" if "://" in folder else str((Path(folder) / path).resolve())

    texts = [p if p is None or "://" in p else full(p) for p in paths.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _or_empty(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([x or [] for x in lists.to_pylist()], pa.list_(pa.string()))])


def _attach(videos: pa.Table, videos_dir: str) -> tuple[pa.Table, list[str]]:
    """Adds the files of `videos_dir` to the records without a `uri`; notes how many have none."""
    if videos_dir:
        paths = media_paths(videos["video_id"], [Path(videos_dir)], VIDEO_SUFFIXES, "source.videos_dir")
        uris = pc.coalesce(videos["uri"], paths)
        videos = videos.set_column(videos.schema.get_field_index("uri"), videos.schema.field("uri"), uris)
    missing = videos["uri"].null_count
    return videos, [f"{missing} of {videos.num_rows} videos have no video file."] if missing else []
