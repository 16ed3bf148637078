"""The rows of your own logs: what must be known of all of them, and what becomes of each.

Functions over blocks, for `logs.OwnLog`. `read` gives rows with valid cells; their findings add up, and
`decide` takes the sum; `finish` then makes interactions of all rows of some users.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import reduce
from operator import add

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.sources import units
from gubs.data.sources.formats import open_part
from gubs.data.sources.log import Done, Findings, places
from gubs.data.sources.log_plan import GAPS, RATE, TIMES, LogPlan
from gubs.data.sources.reading import (
    Account,
    Sheet,
    build,
    codes,
    duplicated,
    empty_note,
    joined,
    null_note,
    read_blocks,
)
from gubs.data.sources.units import Example, UnitEvidence
from gubs.errors import InputError
from gubs.records import Task

CLICK_FEED, AUTOPLAY = 0.1, 0.9
"""Share of the rows without a click that were played all the same: up to the first, a log without tasks and pages is a
feed of covers that play when they are clicked; from the second, its videos play by themselves."""


def read(log: LogPlan, number: int, groups: range | None = None, rows: int = 1 << 20) -> Iterator[Sheet]:
    """A file of the interactions in sheets of about `rows` rows, with valid cells, in seconds and shares.

    Args:
        log: the plan.
        number: the file's place among the interactions' files.
        groups: only these row groups.
        rows: of a sheet.

    Raises:
        InputError: a column cannot be read at all.
    """
    raw = open_part(log.files["interactions"][number], groups, log.heads["interactions"][number].header)
    for sheet in read_blocks(raw, log.columns, log.rules, rows):
        convert_units(sheet, "interactions", log.stated)
        given = pc.utf8_lower(sheet.column("task"))
        valid = pc.or_(pc.is_in(given, value_set=pa.array([task.value for task in Task])), pc.is_null(given))
        sheet.reject(pc.invert(valid), "unknown task", "task", malformed=True)
        yield sheet


def as_piece(log: LogPlan, sheet: Sheet, number: int) -> pa.Table:
    """The rows of a sheet with their file and line, as `finish` takes them."""
    own = {"file": pa.nulls(len(sheet.lines), pa.int32()).fill_null(number), "line": pa.array(sheet.lines, pa.int64())}
    schema = log.piece_schema
    return pa.table([own[n] if n in own else sheet.column(n) for n in schema.names], schema=schema)


def findings(log: LogPlan, sheet: Sheet) -> Findings:
    """The findings of a sheet."""
    counts = Counter(asdict(Unclicked.of(sheet.table))) if "clicked" in log.names else Counter[str]()
    late = {sheet.label: sheet.late} if sheet.late else {}
    return Findings({sheet.label: sheet.account()}, counts, tuple(sheet.unused), late, tuple(sheet.rejects))


@dataclass(frozen=True)
class Decided:
    """What the findings decide for every row."""

    click_feed: bool
    """Whether rows with `clicked`, but without a page or task, are exposures."""
    notes: tuple[str, ...] = ()


def decide(log: LogPlan, findings: Findings) -> Decided:
    """Decides what the rows mean.

    Raises:
        InputError: clicks could mean two things.
    """
    click_feed, notes = _is_click_feed(log, Unclicked(**findings.counts))
    return Decided(click_feed, tuple(notes))


def _check_stated(stated: units.Stated, names: Mapping[str, str], videos: Sheet | None) -> None:
    """Refuses a unit of a column that no file has."""
    has = {"interactions": names, "videos": videos.names if videos else {}}
    there = {column for table, column in stated if column in has[table]}
    if absent := sorted({column for _, column in stated} - there):
        name = absent[0].removesuffix("_s")
        raise InputError(
            f"source.units.{name}: no file has this column; map yours with source.columns.{absent[0]}=NAME"
        )


def convert_units(sheet: Sheet, table: str, stated: units.Stated) -> None:
    """Brings times to seconds and play rates to shares, from the units that are stated or that the names tell."""
    for ours in (*TIMES, RATE):
        theirs = sheet.names.get(ours)
        if theirs is None:
            continue
        allowed = units.RATE_UNITS if ours == RATE else units.TIME_UNITS
        unit = stated.get((table, ours)) or units.named_unit(theirs)
        if unit is not None and unit in allowed:
            _replace(sheet, ours, units.converted(sheet.column(ours), unit))


def _replace(sheet: Sheet, name: str, column: pa.ChunkedArray) -> None:
    sheet.table = sheet.table.set_column(sheet.table.column_names.index(name), name, column)


def unused_note(label: str, names: Sequence[str]) -> list[str]:
    """Which columns of a table are not used; nothing if all are."""
    return [f"Columns of {label} that are not used: {', '.join(names)}."] if names else []


_LOSSES = {
    "timestamp": "the rows are taken to be in order of time, and repeated rows cannot be told from repeated views",
    "prev_op_gap_s": "the time since a user's previous operation is unknown, and the noise filter cannot use it",
    "next_op_gap_s": "the time until a user's next operation is unknown, and the noise filter cannot use it",
    "exited_app": "whether the user left the app is unknown, and the noise filter cannot use it",
}


def log_notes(log: LogPlan, findings: Findings, decided: Decided, counts: Counter[str]) -> list[str]:
    """What the log lacks, and what was done about it."""
    notes = [
        f"No column {name!r}: {lost}." for name, lost in _LOSSES.items() if name not in log.names.keys() | log.derived
    ]
    notes += empty_note(
        "interactions", {h.label: findings.accounts[h.label].rows_in for h in log.heads["interactions"]}
    )
    notes += [*unused_note(log.label("interactions"), findings.unused), *decided.notes]
    if counts["untimed"]:
        notes.append(f"{counts['untimed']} interactions have no time.")
    if log.derived:
        notes.append("The log is declared complete: the gaps are the times between a user's rows.")
    if counts["over"]:
        notes.append(f"{counts['over']} play rates above 1 (repeated views) are capped at 1.")
    nulls = reduce(add, findings.accounts.values(), Account()).nulls
    return notes + [note for note in [null_note(log.label("interactions"), nulls)] if note]


def unit_evidence(log: LogPlan, sheet: Sheet) -> UnitEvidence:
    """The evidence of some users' rows, which have been cleared of repeats."""
    own = [c for c in (*TIMES, RATE) if c in log.names or c not in GAPS]
    sizes = units.Evidence.of(sheet.table.select(own), sheet.column("video duration"))
    labels, files = sheet.labels, sheet.column("file")
    assert labels is not None
    examples = {}
    for column in own:
        positive = np.flatnonzero(pc.greater(sheet.column(column), 0).fill_null(False).to_numpy())
        if len(positive):
            row = int(positive[np.argmin(places(sheet.table)[positive])])
            name, value = log.names.get(column, column), sheet.column(column)[row].as_py()
            examples[column] = Example(files[row].as_py(), int(sheet.lines[row]), labels[row].as_py(), name, value)
    return UnitEvidence(sizes, examples)


def check_units(log: LogPlan, evidence: UnitEvidence, videos: Sheet | None) -> None:
    """Refuses units that no column has, and values that are not plausible in theirs.

    Raises:
        InputError: with the reason and the setting for each column.
    """
    _check_stated(log.stated, log.names, videos)
    sizes, examples = evidence.sizes, {("interactions", c): e for c, e in evidence.examples.items()}
    if videos is not None and (row := pc.index(pc.greater(videos.column("duration_s"), 0), True).as_py()) >= 0:
        lengths = videos.column("duration_s")
        sizes += units.Evidence(video_duration=units.Sizes.of(lengths))
        label = videos.label if videos.labels is None else videos.labels[row].as_py()
        name = videos.names.get("duration_s", "duration_s")
        examples["videos", "duration_s"] = Example(0, int(videos.lines[row]), label, name, lengths[row].as_py())
    if objections := units.objections(sizes, log.stated):
        reasons = "; ".join(f"{_shown(o.column, examples[o.table, o.column])}: {o.reason}" for o in objections)
        raise InputError(f"{reasons}. Set {', '.join(dict.fromkeys(o.remedy for o in objections))}")


def _shown(column: str, example: Example) -> str:
    unit = "" if column == RATE else " s"
    return f"{example.label}: column {example.name!r} (row {example.line} has {example.value:g}{unit})"


def finish(log: LogPlan, decided: Decided, sheet: Sheet, durations: pa.ChunkedArray) -> Done:
    """Makes interactions of all rows of some users, in the order of the log.

    Args:
        log: the plan.
        decided: what the rows mean.
        sheet: rows of pieces.
        durations: of the rows' videos by the table `videos`.

    Raises:
        InputError: a time is missing in a log that is declared complete.
    """
    sheet.table = sheet.table.append_column("video duration", durations)
    _replace(sheet, "task", infer_tasks(sheet.table, decided.click_feed))
    untimed = _reject_repeats(sheet, log)
    evidence = unit_evidence(log, sheet)
    if log.derived:
        _add_gaps(sheet)
    rates, over = play_rates(sheet.table, sheet.column("video duration"))
    _replace(sheet, RATE, rates)
    _reject_unlabelled(sheet)
    if "interaction_id" not in log.names:
        _number(sheet, len(log.files["interactions"]))
    t = sheet.table
    columns = {n: t[n] for n in t.column_names if n not in ("file", "line", "duration_s", "video duration")}
    interactions = build("interactions", t.num_rows, **columns)
    return Done(interactions, counts=Counter(untimed=untimed, over=over), evidence=evidence)


def _number(sheet: Sheet, files: int) -> None:
    """Ids for a log without any: the line, with the number of its file before it if there are several."""
    lines = pa.chunked_array([pa.array(sheet.lines)])
    ids = joined(lines) if files == 1 else joined(sheet.column("file"), "-", lines)
    sheet.table = sheet.table.append_column("interaction_id", ids)


def _reject_repeats(sheet: Sheet, log: LogPlan) -> int:
    """Rejects rows that repeat an earlier one; a click and the view that it starts are two records. Returns how many
    rows have no time.
    """
    if "timestamp" not in log.names:
        return 0
    key = [sheet.column(n) for n in ("user_id", "video_id", "timestamp", "task")]
    timed = np.asarray(sheet.column("timestamp").is_valid())
    sheet.reject(duplicated(key) & timed, "duplicate", "timestamp")
    return int((~timed).sum())


def play_rates(block: pa.Table, durations: pa.ChunkedArray) -> tuple[pa.ChunkedArray, int]:
    """The watched share of each video, from the log or computed, null if it is unknown; and how many were above 1.

    Args:
        block: play_rate, watch_s and duration_s of the log; a duration of 0 counts as unknown.
        durations: of the rows' videos by the table `videos`.
    """
    duration = pc.coalesce(pc.if_else(pc.greater(block["duration_s"], 0), block["duration_s"], None), durations)
    rates = pc.coalesce(block["play_rate"], pc.divide(block["watch_s"], duration))
    capped = pc.min_element_wise(rates, 1.0, skip_nulls=False)
    capped = capped if isinstance(capped, pa.ChunkedArray) else pa.chunked_array([capped])
    return capped, pc.sum(pc.greater(rates, 1)).as_py() or 0


@dataclass(frozen=True)
class Unclicked:
    """Rows without a click, page or task: how many, and how many of them were played. Counts of blocks add up."""

    rows: int = 0
    played: int = 0
    empty: int = 0
    """Rows with a watch time or play rate where `clicked` is empty."""
    played_empty: int = 0
    clicked: int = 0
    """Rows with a click, but without page or task."""

    @classmethod
    def of(cls, block: pa.Table) -> "Unclicked":
        """Counts a block's rows; it has task, page_id, clicked, watch_s and play_rate."""
        untold = block.filter(pc.and_(pc.is_null(block["task"]), pc.is_null(block["page_id"])))
        rows = untold.filter(pc.fill_null(pc.invert(untold["clicked"]), False))
        empty = untold.filter(pc.and_(pc.is_null(untold["clicked"]), _is_watched(untold)))
        played, played_empty = (pc.sum(_played(part)).as_py() or 0 for part in (rows, empty))
        clicked = pc.sum(untold["clicked"]).as_py() or 0
        return cls(rows.num_rows, played, empty.num_rows, played_empty, clicked)

    def __add__(self, other: "Unclicked") -> "Unclicked":
        return Unclicked(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _is_watched(rows: pa.Table) -> pa.ChunkedArray:
    return pc.or_(rows["play_rate"].is_valid(), rows["watch_s"].is_valid())


def _played(rows: pa.Table) -> pa.ChunkedArray:
    watched, rated = (pc.fill_null(pc.greater(rows[name], 0), False) for name in ("watch_s", "play_rate"))
    return pc.or_(watched, rated)


def _is_click_feed(log: LogPlan, unclicked: Unclicked) -> tuple[bool, list[str]]:
    """Whether rows with `clicked` but without a page or task are exposures, by what happened to those without a click;
    and a note on it.

    Raises:
        InputError: some of them were played and many were not; or `clicked` is empty where nothing was clicked.
    """
    label, name = log.label("interactions"), log.names.get("clicked")
    if unclicked.clicked and not unclicked.rows and unclicked.played_empty < CLICK_FEED * unclicked.empty:
        raise InputError(
            f"{label}: column {name!r} is empty in {unclicked.empty:,} rows with a watch time, and nearly all of "
            f"these are 0: they would count as skips. Write 0 where a video was shown and not clicked, or add a column "
            f"'task' (sequential or click)"
        )
    if not unclicked.rows or unclicked.played >= AUTOPLAY * unclicked.rows:
        return False, []
    told = f"{unclicked.played:,} of {unclicked.rows:,} rows without a click, page_id and task were played"
    if unclicked.played > CLICK_FEED * unclicked.rows:
        raise InputError(
            f"{label}: column {name!r}: {told}: too many for a page of covers, too few for videos that play by "
            f"themselves. Add a column 'task' (sequential or click), or a 'page_id' to the exposures"
        )
    if "watch_s" in log.names or RATE in log.names:
        return True, [f"{told}: rows with a value in {name!r} are exposures of the click task."]
    return True, []


def infer_tasks(block: pa.Table, click_feed: bool) -> pa.ChunkedArray:
    """The task of each row: its own; else click if it has a page; else by what is known of it.

    A row with a click or without one is an exposure in a `click_feed`, or if nothing is known of its watching; other
    rows with a play rate or a watch time are views. Null if nothing is known.
    """
    exposed = block["clicked"].is_valid()
    watched = _is_watched(block)
    inferred = pc.if_else(exposed, Task.CLICK.value, None)
    inferred = pc.if_else(pc.and_(watched, pc.invert(pc.and_(exposed, click_feed))), Task.SEQUENTIAL.value, inferred)
    inferred = pc.if_else(block["page_id"].is_valid(), Task.CLICK.value, inferred)
    return pc.coalesce(pc.utf8_lower(block["task"]), inferred)


def _reject_unlabelled(sheet: Sheet) -> None:
    sheet.reject(sheet.column("task").is_null(), "no task", "user_id")
    sequential = pc.equal(sheet.column("task"), Task.SEQUENTIAL.value)
    sheet.reject(pc.and_(sequential, sheet.column("play_rate").is_null()), "no play rate", "watch_s")
    click = pc.equal(sheet.column("task"), Task.CLICK.value)
    sheet.reject(pc.and_(click, sheet.column("clicked").is_null()), "no click known")


def refuse_unlabelled(log: LogPlan, rejected: Mapping[str, Counter[str]], row: int) -> None:
    """Says that every row was rejected, with the causes and one such row."""
    causes = reduce(add, rejected.values(), Counter[str]())
    counts = ", ".join(f"{n} {cause}" for cause, n in causes.items())
    raise InputError(
        f"{log.label('interactions')}: every row was rejected ({counts}; the first is row {row}). Give the columns "
        f"'play_rate', or 'watch_s' and 'duration_s', for sequential views, or 'clicked' for exposures"
    )


def _add_gaps(sheet: Sheet) -> None:
    users, times = codes(sheet.column("user_id")), sheet.column("timestamp")
    if times.null_count:
        raise InputError(
            f"{sheet.label}: column 'timestamp': a log that is declared complete must have a time in every row; fill "
            f"them in, or do not map the gaps to it"
        )
    for name, gaps in zip(GAPS, operation_gaps(users, times.to_numpy()), strict=True):
        sheet.table = sheet.table.append_column(name, gaps)


def operation_gaps(users: np.ndarray, timestamps: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """Seconds from each row to the user's row before and to the one after; null at a user's first and last row.

    Args:
        users: (n,) a number for each user; rows may be in any order.
        timestamps: (n,) milliseconds since 1970.
    """
    order = np.lexsort((timestamps, users))
    same = users[order][1:] == users[order][:-1]
    steps = np.where(same, np.diff(timestamps[order]) / 1000.0, np.nan)
    before, after = np.full(len(users), np.nan), np.full(len(users), np.nan)
    before[order[1:]] = steps
    after[order[:-1]] = steps
    return pa.array(before, from_pandas=True), pa.array(after, from_pandas=True)
