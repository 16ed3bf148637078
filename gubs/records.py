"""The words everything else speaks: User, Video, Interaction, GroupProfile, Example, and their Arrow schemas.

A record is a frozen dataclass; a table of records is Arrow with the schema of the same name in `SCHEMAS`. What a source
does not know is null, never invented. Identifiers are strings everywhere, times are milliseconds since 1970 (UTC),
durations are seconds.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import pyarrow as pa

FAST_SKIP_BELOW = 0.3
"""A view with a play rate below this is a fast skip (paper: labels for views "below 0.3")."""

FINISH_ABOVE = 0.9
"""A view with a play rate above this counts as finished (paper: Finish Rate)."""


class Task(StrEnum):
    """The two recommendation modes of IF-VR."""

    SEQUENTIAL = "sequential"
    """Videos play one after the other; the user may skip. Options A, B, C, D."""
    CLICK = "click"
    """A page shows covers and titles; the user may click. Options A, B."""


class Option(StrEnum):
    """The answers of the multiple-choice question put to the UFM.

    Sequential: A not skipped, B content-driven skip (the video is flawed), C algorithm-driven skip (the recommendation
    missed), D user-driven skip (a slip, no time, no mood). Click: A will click, B will not.
    """

    A = "A"
    B = "B"
    C = "C"
    D = "D"


TASK_OPTIONS: dict[Task, tuple[Option, ...]] = {
    Task.SEQUENTIAL: (Option.A, Option.B, Option.C, Option.D),
    Task.CLICK: (Option.A, Option.B),
}


class Role(StrEnum):
    """What an interaction of the IF-VR data set is for."""

    HISTORY = "history"
    """Context that a model may see."""
    TARGET = "target"
    """Something to predict; never shown."""


class Split(StrEnum):
    """The side of the train/test border a user stands on, per task."""

    TRAIN = "train"
    TEST = "test"


class Record:
    """Base of the dataclasses below: rows of an Arrow table in and out."""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Builds the record from a table row; columns the record does not have are ignored."""
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: v for k, v in row.items() if k in names})

    @classmethod
    def from_table(cls, table: pa.Table) -> Iterator[Self]:
        """Yields one record a row, batch by batch."""
        for batch in table.to_batches():
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                yield cls.from_row(row)

    def to_row(self) -> dict[str, Any]:
        """The record as a table row."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class User(Record):
    """A person: u = [ID, Occ, Age, Gender, T] of the paper's UGM section, plus other known facts."""

    user_id: str
    age: int | None = None
    """Years."""
    gender: str | None = None
    occupation: str | None = None
    other: dict[str, str] = field(default_factory=dict)
    """Further facts (marital status, city size, ...), name to value."""
    tags: list[str] = field(default_factory=list)
    """Video interest tags, strongest first."""


@dataclass(frozen=True, slots=True)
class Video(Record):
    """Something that is recommended: a video, and in text-only sources a film or a book."""

    video_id: str
    title: str | None = None
    duration_s: float | None = None
    uri: str | None = None
    """Path or URI of the video file; relative paths are relative to the artifact that holds the table."""
    cover_uri: str | None = None
    """Path or URI of a cover picture, where the source has one of its own."""
    tags: list[str] = field(default_factory=list)
    """Topic tags."""


@dataclass(frozen=True, slots=True)
class Interaction(Record):
    """One view (sequential task) or one exposure on a page (click task)."""

    interaction_id: str
    user_id: str
    video_id: str
    task: str
    timestamp: int | None = None
    """Milliseconds since 1970, UTC. Null where the source only knows the order (then rows stand in that order)."""
    page_id: str | None = None
    """Click task: the page on which the video was shown."""
    position: int | None = None
    """Click task: place on the page, from 0."""
    watch_s: float | None = None
    """Seconds watched; may exceed the duration (repeated views)."""
    play_rate: float | None = None
    """watched / duration, capped at 1."""
    clicked: bool | None = None
    liked: bool | None = None
    disliked: bool | None = None
    """Explicit negative feedback."""
    dislike_reason: str | None = None
    rating: float | None = None
    """Stars, in sources that have them (1-5)."""
    prev_op_gap_s: float | None = None
    """Seconds since the user's previous operation; null where there is none or it is unknown."""
    next_op_gap_s: float | None = None
    """Seconds until the user's next operation; null where there is none or it is unknown."""
    exited_app: bool | None = None
    """The user left the app during this view."""


@dataclass(frozen=True, slots=True)
class SkipTruth(Record):
    """Why a skip really happened. Only simulated sources know; no model may ever see it."""

    interaction_id: str
    cause: str
    """Option B, C or D."""
    mechanism: str
    """What the simulator drew: flaw, mismatch, repetition, too_long, no_intent, accident, exit, interruption."""


@dataclass(frozen=True, slots=True)
class GroupMember(Record):
    """A user in a group, with the evidence for it."""

    user_id: str
    similarity: float
    """Similarity to the group's typical user (Eq. 2)."""
    matched: bool | None = None
    """The matcher's Yes/No (Eq. 3); null where reflection did not run."""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class GroupProfile(Record):
    """A group of users and the profile the UGM wrote for it."""

    group_id: str
    name: str
    features: str
    typical_user: str
    threshold: float
    """tau_g of Eq. 2: the similarity of the last user that was taken."""
    initial_profile: str | None
    final_profile: str | None
    members: list[GroupMember]
    version: str

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Builds the profile with its members as records."""
        members = [GroupMember.from_row(m) for m in row["members"] or []]
        return cls(**{f.name: row[f.name] for f in dataclasses.fields(cls) if f.name != "members"}, members=members)


@dataclass(frozen=True, slots=True)
class Example(Record):
    """One thing to predict: will this user skip (or click) this video, and why."""

    example_id: str
    task: str
    split: str
    user_id: str
    video_id: str
    interaction_id: str
    history: list[str]
    """Interaction ids the model may see, oldest first."""
    gold: str | None
    """Option; null where nobody has said yet."""
    label_source: str | None
    """Who said so: rule, teacher-1, teacher-2, teacher-3, script, truth, human."""


_TEXT_MAP = pa.map_(pa.string(), pa.string())
_TEXTS = pa.list_(pa.string())

SCHEMAS: dict[str, pa.Schema] = {
    "users": pa.schema(
        [
            pa.field("user_id", pa.string(), nullable=False),
            ("age", pa.int32()),
            ("gender", pa.string()),
            ("occupation", pa.string()),
            ("other", _TEXT_MAP),
            ("tags", _TEXTS),
        ]
    ),
    "videos": pa.schema(
        [
            pa.field("video_id", pa.string(), nullable=False),
            ("title", pa.string()),
            ("duration_s", pa.float64()),
            ("uri", pa.string()),
            ("cover_uri", pa.string()),
            ("tags", _TEXTS),
        ]
    ),
    "interactions": pa.schema(
        [
            pa.field("interaction_id", pa.string(), nullable=False),
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("video_id", pa.string(), nullable=False),
            pa.field("task", pa.string(), nullable=False),
            ("timestamp", pa.int64()),
            ("page_id", pa.string()),
            ("position", pa.int32()),
            ("watch_s", pa.float64()),
            ("play_rate", pa.float64()),
            ("clicked", pa.bool_()),
            ("liked", pa.bool_()),
            ("disliked", pa.bool_()),
            ("dislike_reason", pa.string()),
            ("rating", pa.float64()),
            ("prev_op_gap_s", pa.float64()),
            ("next_op_gap_s", pa.float64()),
            ("exited_app", pa.bool_()),
        ]
    ),
    "truth": pa.schema(
        [
            pa.field("interaction_id", pa.string(), nullable=False),
            pa.field("cause", pa.string(), nullable=False),
            pa.field("mechanism", pa.string(), nullable=False),
        ]
    ),
    "groups": pa.schema(
        [
            pa.field("group_id", pa.string(), nullable=False),
            ("name", pa.string()),
            ("features", pa.string()),
            ("typical_user", pa.string()),
            ("threshold", pa.float64()),
            ("initial_profile", pa.string()),
            ("final_profile", pa.string()),
            (
                "members",
                pa.list_(
                    pa.struct(
                        [
                            ("user_id", pa.string()),
                            ("similarity", pa.float64()),
                            ("matched", pa.bool_()),
                            ("reason", pa.string()),
                        ]
                    )
                ),
            ),
            ("version", pa.string()),
        ]
    ),
    "examples": pa.schema(
        [
            pa.field("example_id", pa.string(), nullable=False),
            pa.field("task", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("video_id", pa.string(), nullable=False),
            pa.field("interaction_id", pa.string(), nullable=False),
            ("history", _TEXTS),
            ("gold", pa.string()),
            ("label_source", pa.string()),
        ]
    ),
    "rejects": pa.schema(
        [
            pa.field("file", pa.string(), nullable=False),
            ("row", pa.int64()),
            ("column", pa.string()),
            pa.field("cause", pa.string(), nullable=False),
            ("value", pa.string()),
        ]
    ),
}
SCHEMAS["ifvr"] = SCHEMAS["interactions"].append(pa.field("split", pa.string())).append(pa.field("role", pa.string()))
"""Arrow schema of every table, by table name.

`ifvr`: interactions that passed the filters, with the side of the train/test border (null: held out of this task,
see data/splits.py) and the interaction's role. `rejects`: input rows that were set aside, with file, row (1-based, the
line of a text file), column and cause.
"""


def play_rate(watch_s: float | None, duration_s: float | None) -> float | None:
    """Watched share of a video, capped at 1; None where it is not known or the duration is not positive."""
    if watch_s is None or duration_s is None or duration_s <= 0 or watch_s < 0:
        return None
    return min(watch_s / duration_s, 1.0)


def conform(table: pa.Table, name: str) -> pa.Table:
    """Brings a table into the schema `SCHEMAS[name]`: order of columns, types, nulls for optional columns it lacks.

    Raises:
        KeyError: a required column is missing. pa.ArrowInvalid: a value does not fit its type.
    """
    schema = SCHEMAS[name]
    columns = []
    for f in schema:
        if f.name in table.column_names:
            columns.append(table[f.name].cast(f.type))
        elif f.nullable:
            columns.append(pa.nulls(table.num_rows, f.type))
        else:
            raise KeyError(f"table {name!r} lacks the required column {f.name!r}")
    return pa.table(columns, schema=schema)


def empty(name: str) -> pa.Table:
    """A table of that name with no rows."""
    return SCHEMAS[name].empty_table()
