"""The data model: User, Video, Interaction, GroupProfile, Example, and the Arrow schemas of their tables.

A record is a frozen dataclass; its fields give the columns of its table (`SCHEMAS`). What a source does not know is
null, never invented. Identifiers are strings everywhere, times are milliseconds since 1970 (UTC), durations are
seconds.
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
    """Something to predict; no model sees it."""


class Split(StrEnum):
    """Whether a user trains or tests, per task."""

    TRAIN = "train"
    TEST = "test"


class Record:
    """Base of the dataclasses below: rows of an Arrow table in and out."""

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Builds the record from a table row; ignores columns that the record does not have."""
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{k: v for k, v in row.items() if k in names})

    @classmethod
    def from_table(cls, table: pa.Table) -> Iterator[Self]:
        """Yields one record per row, batch by batch."""
        for batch in table.to_batches():
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                yield cls.from_row(row)

    def to_row(self) -> dict[str, Any]:
        """The record as a table row."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def _empty_for_null(record: Record, **kinds: type) -> None:
    """Replaces null, which tables may hold for maps and lists, with an empty value of the given kind."""
    for name, kind in kinds.items():
        if getattr(record, name) is None:
            object.__setattr__(record, name, kind())


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

    def __post_init__(self) -> None:
        _empty_for_null(self, other=dict, tags=list)


@dataclass(frozen=True, slots=True)
class Video(Record):
    """Something that is recommended: a video, or in text-only sources a film or a book."""

    video_id: str
    title: str | None = None
    duration_s: float | None = None
    uri: str | None = None
    """Path or URI of the video file; relative paths are relative to the artifact that holds the table."""
    cover_uri: str | None = None
    """Path or URI of a cover picture, where the source has one."""
    tags: list[str] = field(default_factory=list)
    """Topic tags."""

    def __post_init__(self) -> None:
        _empty_for_null(self, tags=list)


@dataclass(frozen=True, slots=True)
class Interaction(Record):
    """One view (sequential task) or one exposure on a page (click task)."""

    interaction_id: str
    user_id: str
    video_id: str
    task: str
    timestamp: int | None = None
    """Milliseconds since 1970, UTC. Null where the source only knows the order; the rows are then in that order."""
    page_id: str | None = None
    """Click task: the page on which the video was shown."""
    position: int | None = None
    """Click task: place on the page, from 0."""
    watch_s: float | None = None
    """Seconds watched; exceeds the duration when a video is repeated."""
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
    """The true cause of a skip. Only the simulator knows it; no model may ever see it."""

    interaction_id: str
    cause: str
    """Option B, C or D."""
    mechanism: str
    """What the simulator drew: flaw, mismatch, repetition, too_long, no_intent, accident, exit, interruption."""


@dataclass(frozen=True, slots=True)
class GroupMember(Record):
    """A user in a group, and why."""

    user_id: str
    similarity: float
    """Similarity to the group's typical user (Eq. 2)."""
    matched: bool | None = None
    """The matcher's Yes/No (Eq. 3); null where reflection did not run."""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Finding(Record):
    """One line of a group's evidence: what the records of its members say about one thing."""

    section: str
    """What was counted; see `gubs.ugm.evidence.SECTIONS`."""
    item: str
    """A tag, a length, a word, ..."""
    value: float
    """A share or a mean, over the members' records."""
    overall: float
    """The same over all users that groups are made from."""
    low: float
    """95 % interval of `value`."""
    high: float
    n: int
    """Records (or members) on which `value` rests."""

    @property
    def lift(self) -> float | None:
        """`value` over `overall`; None where nobody has any."""
        return self.value / self.overall if self.overall else None

    @property
    def above(self) -> bool:
        """Whether the group is above everybody by more than chance."""
        return self.low > self.overall

    @property
    def below(self) -> bool:
        """Whether the group is below everybody by more than chance."""
        return self.high < self.overall


@dataclass(frozen=True, slots=True)
class GroupProfile(Record):
    """A group of users and the profile the UGM wrote for it."""

    group_id: str
    name: str
    features: str
    typical_user: str
    threshold: float
    """tau_g of Eq. 2: the similarity of the last user that was admitted."""
    initial_profile: str | None
    final_profile: str | None
    members: list[GroupMember]
    version: str
    evidence: list[Finding] = field(default_factory=list)
    """Computed from the members' records, without a language model."""
    name_author: str | None = None
    """Whose name it is: `llm`, or `evidence`."""
    profile_author: str | None = None
    """The same for the latest profile; `both`: the LLM's, completed by the evidence."""
    unsupported: list[str] = field(default_factory=list)
    """Claims of a language model that the evidence does not support; the author `both` leaves them out."""

    def __post_init__(self) -> None:
        _empty_for_null(self, evidence=list, unsupported=list)

    @property
    def text(self) -> str:
        """The profile to show: the final one, else the initial one, else the features."""
        return self.final_profile or self.initial_profile or self.features

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Builds the profile with its members and evidence as records."""
        lists = {
            "members": [GroupMember.from_row(m) for m in row["members"] or []],
            "evidence": [Finding.from_row(f) for f in row.get("evidence") or []],
        }
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in row.items() if k in names} | lists)


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
    """Option; null where nobody has answered yet."""
    label_source: str | None
    """Who answered: rule, teacher-1, teacher-2, teacher-3, script, guess, truth, human."""


_TYPES: dict[object, pa.DataType] = {
    **{kind: pa.string() for kind in (str, str | None)},
    **{kind: pa.float64() for kind in (float, float | None)},
    **{kind: pa.int64() for kind in (int, int | None)},
    bool | None: pa.bool_(),
    list[str]: pa.list_(pa.string()),
    dict[str, str]: pa.map_(pa.string(), pa.string()),
}


def _schema(record: type, *required: str, **types: pa.DataType) -> pa.Schema:
    """One column per field of the record; `types` has those that do not follow from the annotations."""
    columns = {f.name: types.get(f.name) or _TYPES[f.type] for f in dataclasses.fields(record)}
    return pa.schema([pa.field(name, kind, nullable=name not in required) for name, kind in columns.items()])


SCHEMAS: dict[str, pa.Schema] = {
    "users": _schema(User, "user_id", age=pa.int32()),
    "videos": _schema(Video, "video_id"),
    "interactions": _schema(Interaction, "interaction_id", "user_id", "video_id", "task", position=pa.int32()),
    "truth": _schema(SkipTruth, "interaction_id", "cause", "mechanism"),
    "groups": _schema(
        GroupProfile,
        "group_id",
        members=pa.list_(pa.struct(_schema(GroupMember))),
        evidence=pa.list_(pa.struct(_schema(Finding))),
    ),
    "examples": _schema(Example, "example_id", "task", "split", "user_id", "video_id", "interaction_id"),
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

`ifvr`: interactions that passed the filters, with the user's split (null: held out of this task, see data/splits.py)
and the interaction's role. `rejects`: rejected input rows, with file, row (1-based, the line of a text file), column
and cause.
"""


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
