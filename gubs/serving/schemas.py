"""The API's words: requests, results and errors, as pydantic models that bound everything a client can send."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from gubs.records import Option, Task
from gubs.serving.filter import Decision, Mode

Id = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]
Text = Annotated[str, StringConstraints(max_length=2000)]
Tags = Annotated[list[Text], Field(max_length=64)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e6)]
_MOST_CANDIDATES, _MOST_VIEWS, _MOST_FRAMES = 100, 200, 16
_FRAME_CHARS = 2**20


Frame = Annotated[str, StringConstraints(max_length=_FRAME_CHARS)]


class Model(BaseModel):
    """No unknown fields, no NaN, no conversion between types."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)


class Profile(Model):
    """A user's profile, for a user that the filter does not know."""

    age: Annotated[int, Field(ge=0, le=150)] | None = None
    gender: Text | None = None
    occupation: Text | None = None
    tags: Tags = []
    other: Annotated[dict[Text, Text], Field(max_length=32)] = {}


class HistoryView(Model):
    """One view in a history sent with a request: a video that the filter knows (`id`), or its title and tags."""

    id: Id | None = None
    title: Text | None = None
    duration_s: Seconds | None = None
    tags: Tags = []
    play_rate: Share | None = None
    clicked: bool | None = None
    rating: Annotated[float, Field(ge=0, le=5)] | None = None


class UserRef(Model):
    """Whom the question is about: `id` of a known user, or profile and history."""

    id: Id | None = None
    profile: Profile | None = None
    history: Annotated[list[HistoryView], Field(max_length=_MOST_VIEWS)] = []
    """Oldest first."""

    @model_validator(mode="after")
    def _one_way(self) -> "UserRef":
        if (self.id is None) == (self.profile is None):
            raise ValueError("give either id, or profile and history")
        if self.id is not None and self.history:
            raise ValueError("a known user has a history already: give profile and history, or only id")
        return self


class Candidate(Model):
    """A video that a recommender wants to show."""

    id: Id
    title: Text | None = None
    duration_s: Seconds | None = None
    tags: Tags = []
    uri: Text | None = None
    """Where an unknown video is; only places that the service allows are read."""
    frames: Annotated[
        list[Annotated[str, StringConstraints(max_length=_FRAME_CHARS)]], Field(max_length=_MOST_FRAMES)
    ] = []
    """Frames of an unknown video: base64 JPEG, in order."""


class FilterRequest(Model):
    """Which of these videos would the user skip?"""

    request_id: Id | None = None
    task: Annotated[Task, Field(strict=False)] = Task.SEQUENTIAL
    mode: Annotated[Mode, Field(strict=False)] | None = None
    threshold: Share | None = None
    timeout_ms: Annotated[int, Field(ge=1, le=600_000)] | None = None
    explain: bool = True
    """Return the thought behind each decision (mode `reason`)."""
    user: UserRef
    candidates: Annotated[list[Candidate], Field(min_length=1, max_length=_MOST_CANDIDATES)]


class ExplainRequest(Model):
    """Why would the user skip this video? Asked with the user's own, a similar user's, a group's and no profile."""

    request_id: Id | None = None
    task: Annotated[Task, Field(strict=False)] = Task.SEQUENTIAL
    timeout_ms: Annotated[int, Field(ge=1, le=600_000)] | None = None
    user: UserRef
    candidate: Candidate


class Problem(BaseModel):
    """What went wrong."""

    code: str
    message: str
    retryable: bool = False


class ErrorBody(BaseModel):
    """Body of every response that is not 2xx."""

    error: Problem


class Result(BaseModel):
    """The decision about one candidate. A candidate with an error is kept: without an answer there is no ground to
    drop it.
    """

    index: int
    id: str
    decision: Decision
    skip_probability: float | None = None
    option: Option | None = None
    option_probabilities: dict[Option, float] = {}
    label_mass: float | None = None
    """Probability that the model names an option at all at this place."""
    reason: str | None = None
    group_id: str | None = None
    error: Problem | None = None


class ModelName(BaseModel):
    """A filter and its version."""

    name: str
    version: str


class Usage(BaseModel):
    """What the request cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0


class FilterSummary(BaseModel):
    """What is said of a request besides the decisions."""

    request_id: str
    model: ModelName
    mode: Mode
    threshold: float
    usage: Usage
    timing_ms: dict[str, float]


class FilterResponse(FilterSummary):
    """Decisions in the order of the candidates."""

    results: list[Result]


class FilterLine(BaseModel):
    """A line of a response that comes in parts; it has one of the three. Results come as they are ready, and tell their
    candidate by `index`. The last line has `done`, or the `error` because of which no more come.
    """

    result: Result | None = None
    done: FilterSummary | None = None
    error: Problem | None = None

    def line(self) -> str:
        """As a line of NDJSON, with the part that it has."""
        name, part = next((name, part) for name, part in self if part is not None)
        return f'{{"{name}":{part.model_dump_json()}}}\n'


class Perspective(BaseModel):
    """The answer with one profile."""

    whose: Literal["own", "similar", "group", "none"]
    profile: str
    """What the prompt showed of the user or group."""
    result: Result


class ExplainResponse(BaseModel):
    """The answers side by side."""

    request_id: str
    model: ModelName
    title: str | None
    frames: list[str]
    """What the model saw: base64 JPEG."""
    history: list[str]
    """The user's views as the prompt shows them."""
    perspectives: list[Perspective]
    timing_ms: dict[str, float]


class Group(BaseModel):
    """A group of users."""

    group_id: str
    name: str
    features: str
    profile: str
    members: int


class User(BaseModel):
    """A user that the filter knows."""

    user_id: str
    profile: str
    history: list[str]
    groups: list[str]


class ModelInfo(BaseModel):
    """A filter that is deployed."""

    name: str
    version: str
    app: str
    weight: float
    shadow: bool
    tasks: list[Task]
    modes: list[Mode]
    refused: str
    """Why mode `score` may not be asked; empty if it may."""
    thresholds: dict[str, dict[str, dict[str, float]]]
    auc: dict[str, dict[str, float]]
    users: int
    videos: int
    groups: int
    running: int = 0
    """Questions in work at the replica that answered."""
