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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables
from gubs.data.sources.log_plan import USERS, VIDEOS, Head, Plan, find_files, mapped, plan
from gubs.data.sources.log_rows import (
    Findings,
    as_piece,
    check_labelled,
    check_units,
    convert_units,
    decide,
    finish,
    identities,
    log_notes,
    read_pieces,
    repeated_ids,
    unused_note,
)
from gubs.data.sources.media import VIDEO_SUFFIXES, media_paths
from gubs.data.sources.reading import (
    Column,
    Sheet,
    assemble,
    build,
    facts,
    null_note,
    read_sheet,
    together,
)


def read(settings: SourceSettings) -> SourceTables:
    """Reads your logs into memory; `source.path` is as in `find_files`.

    Raises:
        InputError: no interactions, a file or column that cannot be used, or a setting that fits no column.
    """
    files, folder = find_files(settings.path)
    heads = {table: [Head.of(f) for f in parts] for table, parts in files.items()}
    log = plan(settings, files, folder, heads)
    described = Described.read(log)
    pieces, findings = [], Findings()
    for number in range(len(files["interactions"])):
        for sheet in read_pieces(log, number):
            pieces.append(as_piece(log, sheet, number))
            findings += Findings.of(log, sheet)
    decided = decide(log, findings)
    rows = pa.concat_tables(pieces)
    result = finish(log, decided, rows, repeated_ids(identities(rows)), described.durations(rows["video_id"]))
    check_units(log, result.evidence, described.video_sheet)
    check_labelled(log, result)
    notes = log_notes(log, findings, decided, result.counts)
    notes += described.notes
    tables = assemble(described.users, described.videos, result.interactions, described.sheets, notes)
    rejects = [*findings.rejects, *result.rejects]
    tables.rejects = pa.concat_tables([*rejects, tables.rejects])
    tables.files = result.file_counts(log, findings) | tables.files
    tables.videos = attach(tables.videos, settings.videos_dir, tables.notes)
    return tables


@dataclass(frozen=True)
class Described:
    """What the files of users and videos say; small beside the interactions."""

    users: pa.Table | None
    videos: pa.Table | None
    sheets: list[Sheet]
    video_sheet: Sheet | None
    notes: list[str]

    @classmethod
    def read(cls, log: Plan) -> "Described":
        """Reads them."""
        sheets, users, videos, video_sheet, notes = [], None, None, None, list[str]()
        if "users" in log.files:
            sheet, users = _read_users(log)
            sheets.append(sheet)
        if "videos" in log.files:
            video_sheet, videos = _read_videos(log)
            sheets.append(video_sheet)
            notes += unused_note(log.label("videos"), video_sheet.unused)
        notes += [note for sheet in sheets if (note := null_note(sheet.label, sheet.nulls))]
        return cls(users, videos, sheets, video_sheet, notes)

    def durations(self, video_ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Each row's duration by the table `videos`; null where it has none."""
        if self.videos is None or self.videos["duration_s"].null_count == self.videos.num_rows:
            return pa.chunked_array([pa.nulls(len(video_ids), pa.float64())])
        rows = pc.index_in(video_ids, value_set=self.videos["video_id"].combine_chunks())
        return pc.take(self.videos["duration_s"], rows)


def _read_users(log: Plan) -> tuple[Sheet, pa.Table]:
    columns = mapped("users", log.settings.columns)
    ours = {n for c in columns for n in c.names}
    header = dict.fromkeys(n for head in log.heads["users"] for n in head.header)
    more = [n for n in header if n not in ours and n != "other" and not n.startswith("(unnamed")]
    columns += [Column(f"other {n}", "word", (n,), optional=True) for n in more]
    sheet = _read_table(log, "users", columns)
    sheet.reject_duplicates("user_id")
    other = _facts_of_column(sheet, re.compile(log.rules.missing))
    t, n = sheet.table, len(sheet.lines)
    filled = {c.name: t[c.name] for c in USERS}
    filled["other"] = facts(n, other | {name: t[f"other {name}"] for name in more})
    filled["tags"] = _or_empty(t["tags"])
    return sheet, build("users", n, **filled)


def _read_table(log: Plan, table: str, columns: Sequence[Column]) -> Sheet:
    """All files of a table as one sheet."""
    bad = log.settings.max_bad_rows
    sheets = [read_sheet(f, columns, bad, rules=log.rules) for f in log.files[table]]
    sheet = together(sheets, log.label(table))
    sheet.max_bad = bad
    return sheet


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


def _read_videos(log: Plan) -> tuple[Sheet, pa.Table]:
    sheet = _read_table(log, "videos", mapped("videos", log.settings.columns))
    sheet.reject_duplicates("video_id")
    convert_units(sheet, "videos", log.stated)
    t = sheet.table
    columns = {c.name: t[c.name] for c in VIDEOS} | {n: _absolute(t[n], log.folder) for n in ("uri", "cover_uri")}
    columns["duration_s"] = pc.if_else(pc.greater(t["duration_s"], 0), t["duration_s"], None)
    columns["tags"] = _or_empty(t["tags"])
    return sheet, build("videos", t.num_rows, **columns)


def _absolute(paths: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    def full(path: str) -> str:
        return f"{folder.rstrip('/')}/{path}" if "://" in folder else str((Path(folder) / path).resolve())

    texts = [p if p is None or "://" in p else full(p) for p in paths.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _or_empty(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([x or [] for x in lists.to_pylist()], pa.list_(pa.string()))])


def attach(videos: pa.Table, videos_dir: str, notes: list[str]) -> pa.Table:
    """Adds the files of `videos_dir` to the records without a `uri`; notes how many have none."""
    if videos_dir:
        paths = media_paths(videos["video_id"], [Path(videos_dir)], VIDEO_SUFFIXES, "source.videos_dir")
        uris = pc.coalesce(videos["uri"], paths)
        videos = videos.set_column(videos.schema.get_field_index("uri"), videos.schema.field("uri"), uris)
    if missing := videos["uri"].null_count:
        notes.append(f"{missing} of {videos.num_rows} videos have no video file.")
    return videos
