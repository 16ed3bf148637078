"""Settings of every text-LLM call: endpoints, roles, retries, budget, journal, the embedded server."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gubs.section import Section

EMBEDDED = "embedded"
"""Name of the endpoint that gubs starts itself."""


class EndpointSettings(Section):
    """One OpenAI-compatible endpoint and what it allows."""

    base_url: str
    """Address up to and with the version, as `https://host/v1`."""
    model: str
    """Model name as the endpoint knows it."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; empty = no key. The key itself never stands in settings."""
    max_concurrency: int = Field(1000, ge=1)
    """Calls in flight at once, over all actors."""
    requests_per_minute: float = Field(0.0, ge=0)
    """0 = no limit."""
    tokens_per_minute: float = Field(0.0, ge=0)
    """Input and output tokens; 0 = no limit."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest time one attempt may take."""
    hedge: bool = True
    """Ask a second time, beside the first, where an answer is overdue (a hung connection); the first answer counts."""
    hedge_share: float = Field(0.05, ge=0, le=1)
    """At most this share of calls (and 3 more) is asked a second time; such a call may be paid twice."""
    input_price: float = Field(0.0, ge=0)
    """Price of a million input tokens, in the currency of the budget."""
    output_price: float = Field(0.0, ge=0)
    """Price of a million output tokens, reasoning included."""
    structured: Literal["auto", "json_schema", "structured_outputs", "guided", "none"] = "auto"
    """How a JSON schema or regex is enforced: `json_schema` = `response_format` (schemas only); `structured_outputs` =
    vLLM's field; `guided` = older vLLM's `guided_json` and `guided_regex`; `none` = plain text, strictly parsed;
    `auto` = in this order, the next one when the endpoint answers that it does not know the field."""
    reasoning: Literal["auto", "none"] = "auto"
    """`auto` keeps `<think>` parts at the head of an answer apart from the answer; `none` leaves the text as it is."""

    @field_validator("base_url")
    @classmethod
    def _no_credentials(cls, url: str) -> str:
        if url and not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        if "@" in url.split("://")[-1].split("/")[0]:
            raise ValueError("must not hold a user or password: name the variable with the key in api_key_env")
        return url.rstrip("/")


class RoleSettings(Section):
    """How one role asks."""

    endpoint: str = ""
    """Name of an endpoint; empty = the one named `default`, or the embedded server where none is configured."""
    temperature: float | None = Field(None, ge=0, le=2)
    """None = the endpoint's own; some reasoning models refuse any other."""
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1)
    """Output tokens a call, reasoning included."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name that the endpoint gives to it."""
    seed: int | None = None
    reasks: int = Field(1, ge=0, le=3)
    """How often an answer that cannot be used is sent back with the error."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request body, as `reasoning_effort`."""


class RolesSettings(Section):
    """The jobs a text LLM has."""

    summarizer: RoleSettings = RoleSettings(max_tokens=8192)
    """Eq. 1: users into groups (paper: DeepSeek-R1)."""
    profiler: RoleSettings = RoleSettings(temperature=0.7)
    """Initial and final group profiles."""
    matcher: RoleSettings = RoleSettings(temperature=0.0, max_tokens=256)
    """Eq. 3: does a user fit a group, and why."""
    annotator: RoleSettings = RoleSettings(temperature=0.7)
    """Reasons and chains of thought (paper: GPT-4o)."""


class RetrySettings(Section):
    """What is tried again, and when an endpoint counts as down."""

    attempts: int = Field(8, ge=1)
    """Attempts of a call that meets 5xx, timeouts, broken connections or cut-off answers."""
    base_s: float = Field(0.5, gt=0)
    """First pause; it doubles with each attempt, and is drawn between half and all of itself."""
    max_s: float = Field(60.0, gt=0)
    """Longest pause of our own; a `Retry-After` may be longer."""
    patience_s: float = Field(900.0, gt=0)
    """How long a call that is only ever told to slow down (429) is tried."""
    down_after_s: float = Field(60.0, gt=0)
    """An endpoint is down after this time without a sign of life, and `down_failures` failures."""
    down_failures: int = Field(8, ge=1)


class BudgetSettings(Section):
    """What a journal's calls may cost in all, over every run that uses it. 0 = no limit."""

    calls: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    """Input and output tokens."""
    money: float = Field(0.0, ge=0)
    """In the currency of the endpoints' prices."""


class EmbeddedSettings(Section):
    """The local server that serves roles without an endpoint: SmolLM2-135M-Instruct on vLLM, on a CPU."""

    cache_dir: str = ""
    """Where the converted model lies; empty = `gubs` in the user's cache folder."""
    max_concurrency: int = Field(64, ge=1)
    """Calls it works on at once."""
    max_model_len: int = Field(4096, ge=256)
    """Longest prompt and answer together, in tokens (the model was made for 8,192)."""
    kv_cache_gb: int = Field(1, ge=1)
    threads: int = Field(0, ge=0)
    """CPU threads; 0 = all of the machine."""
    start_timeout_s: float = Field(300.0, gt=0)
    timeout_s: float = Field(1800.0, gt=0)
    """Longest time one attempt may take; it is slow, and calls wait for each other."""


class LLMSettings(Section):
    """Every text-LLM call."""

    endpoints: dict[str, EndpointSettings] = Field(default_factory=dict)
    """Endpoints by name; `default` serves the roles that name none. None at all: the embedded server."""
    roles: RolesSettings = RolesSettings()
    retries: RetrySettings = RetrySettings()
    budget: BudgetSettings = BudgetSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    journal: str = ""
    """Folder of the journal; empty = the stage's own. A local or shared file system."""
    mode: Literal["record", "replay"] = "record"
    """`replay` answers from the journal only; a call it lacks is an error."""
    actors: int = Field(1, ge=1)
    """Client actors; each has its share of the endpoints' limits. One keeps 1,000 calls of a few seconds in flight (it
    makes some 400 a second, on one core); each costs some seconds of CPU to start and a little while it waits."""
    spread: bool = False
    """Place the actors on any node (the journal must then be on a file system all share), not on the driver's."""

    @model_validator(mode="after")
    def _endpoints_exist(self) -> "LLMSettings":
        if EMBEDDED in self.endpoints:
            raise ValueError(
                f"the name {EMBEDDED!r} is taken by the server gubs starts itself: rename llm.endpoints.{EMBEDDED}"
            )
        for role in RolesSettings.model_fields:
            self.endpoint_of(role)
        return self

    def role(self, name: str) -> RoleSettings:
        """Settings of a role.

        Raises:
            ValueError: there is no such role.
        """
        if name not in RolesSettings.model_fields:
            raise ValueError(f"there is no role {name!r}; roles are {', '.join(RolesSettings.model_fields)}")
        found: RoleSettings = getattr(self.roles, name)
        return found

    def endpoint_of(self, role: str) -> str:
        """Name of the endpoint that serves a role.

        Raises:
            ValueError: the role names an endpoint that is not configured, or none where a choice is needed.
        """
        name = self.role(role).endpoint
        if not name and not self.endpoints:
            return EMBEDDED
        name = name or "default"
        if name == EMBEDDED or name in self.endpoints:
            return name
        known = ", ".join(self.endpoints) or "none"
        raise ValueError(
            f"llm.roles.{role} needs the endpoint {name!r}, which is not configured (there are: {known}): "
            f"set llm.roles.{role}.endpoint to one of them or to {EMBEDDED!r}, "
            f"or set llm.endpoints.{name}.base_url and .model"
        )
