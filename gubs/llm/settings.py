"""Settings of every text-LLM call: endpoints, roles, retries, budget, journal, the embedded server."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from gubs.section import Section

EMBEDDED = "embedded"
"""Name of the endpoint that gubs starts itself."""
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"


class EndpointSettings(Section):
    """One OpenAI-compatible endpoint and its limits."""

    base_url: str
    """Address including the version: `https://host/v1`."""
    model: str
    """Model name as the endpoint knows it."""
    api_key_env: str = ""
    """Name of the environment variable with the key; empty = no key. Never put the key itself into settings."""
    max_concurrency: int = Field(1000, ge=1)
    """Calls in flight at once, over all actors."""
    requests_per_minute: float = Field(0.0, ge=0)
    """0 = no limit."""
    tokens_per_minute: float = Field(0.0, ge=0)
    """Input and output tokens; 0 = no limit."""
    timeout_s: float = Field(300.0, gt=0)
    """Longest time for one attempt."""
    hedge: bool = True
    """Send a second copy of a request whose answer is overdue (a hung connection); the first answer counts."""
    hedge_share: float = Field(0.05, ge=0, le=1)
    """Largest share of calls (plus 3) with a second copy; such a call may cost twice."""
    input_price: float = Field(0.0, ge=0)
    """Price per million input tokens, in the currency of the budget."""
    output_price: float = Field(0.0, ge=0)
    """Price per million output tokens, reasoning included."""
    structured: Literal["auto", "json_schema", "structured_outputs", "guided", "none"] = "auto"
    """How a JSON schema or regex is enforced: `json_schema` = `response_format` (schemas only); `structured_outputs` =
    vLLM's field; `guided` = older vLLM's `guided_json` and `guided_regex`; `none` = plain text, strictly parsed;
    `auto` = in this order, the next one when the endpoint rejects the field."""
    reasoning: Literal["auto", "none"] = "auto"
    """`auto` separates a leading `<think>` part from the answer; `none` leaves the text as it is."""

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
    """Name of an endpoint; empty = `default`, or the embedded server if no endpoint is configured."""
    temperature: float | None = Field(None, ge=0, le=2)
    """None = the endpoint's default; some reasoning models refuse any other."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample only from the most probable tokens up to this total probability; None = the endpoint's default."""
    max_tokens: int = Field(1024, ge=1)
    """Output tokens per call, reasoning included."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The endpoint's name for it."""
    seed: int | None = None
    """Seed that the endpoint samples with, if it supports one; None = none is sent."""
    reasks: int = Field(1, ge=0, le=3)
    """How often an unusable answer is sent back with the error."""
    extra: dict[str, object] = Field(default_factory=dict)
    """Further fields of the request body, such as `reasoning_effort`."""


class RolesSettings(Section):
    """The jobs of text LLMs."""

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
    """Attempts per call after 5xx responses, timeouts, broken connections or unreadable responses."""
    base_s: float = Field(0.5, gt=0)
    """First pause; it doubles with each attempt, times a random factor from 0.5 to 1."""
    max_s: float = Field(60.0, gt=0)
    """Longest such pause; a `Retry-After` may be longer."""
    longest_retry_after_s: float = Field(120.0, gt=0)
    """A server's longer `Retry-After` counts as this."""
    patience_s: float = Field(900.0, gt=0)
    """How long an endpoint may do nothing but ask to slow down (429) before the stage stops."""
    down_after_s: float = Field(60.0, gt=0)
    """An endpoint is down, and the stage stops, when this time has passed with `down_failures` failures and no answer;
    if it responds (5xx), that many different calls must have failed, so that a few prompts it cannot take stop
    nothing."""
    down_failures: int = Field(8, ge=1)
    """Failures in a row before an endpoint can count as down; see `down_after_s`."""
    drain_s: float = Field(120.0, ge=0)
    """How long calls in flight may take to finish when the stage stops, on Ctrl-C for example."""


class ContractSettings(Section):
    """Which share of a stage's calls may end without a usable answer; above it, the stage ends incomplete."""

    unusable: float = Field(0.01, ge=0, le=1)
    """Of a role's calls: answers that are cut off, refused or not of the required form, even when asked again; and
    requests that the endpoint does not take (rejected, too long for its context)."""
    unanswered: float = Field(0.0, ge=0, le=1)
    """Of a role's calls: no answer, for reasons of the endpoint (unreachable, unreadable, rate-limited)."""


class BudgetSettings(Section):
    """What a journal's calls may cost in total, over every run that uses it. 0 = no limit."""

    calls: int = Field(0, ge=0)
    """Attempts that a server may bill: retries after errors and second copies count too."""
    tokens: int = Field(0, ge=0)
    """Input and output tokens."""
    money: float = Field(0.0, ge=0)
    """In the currency of the endpoints' prices."""


class EmbeddedSettings(Section):
    """The local server for roles without an endpoint: SmolLM2-135M-Instruct on vLLM, on a CPU."""

    cache_dir: str = ""
    """Folder for the converted model; empty = `gubs` in the user's cache folder."""
    max_concurrency: int = Field(64, ge=1)
    """Calls in progress at once."""
    max_model_len: int = Field(4096, ge=256)
    """Longest prompt and answer together, in tokens (the model supports 8,192)."""
    kv_cache_gb: int = Field(1, ge=1)
    """Memory of the server's key-value cache, in GiB."""
    threads: int = Field(0, ge=0)
    """CPU threads; 0 = all of the machine."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Longest time until the server has a CPU, has loaded its model and answers."""
    timeout_s: float = Field(1800.0, gt=0)
    """Longest time for one attempt; the server is slow and calls queue."""


class LLMSettings(Section):
    """Every text-LLM call."""

    endpoints: dict[str, EndpointSettings] = Field(default_factory=dict)
    """Endpoints by name; `default` serves roles that name none. Without any, the embedded server answers."""
    roles: RolesSettings = RolesSettings()
    retries: RetrySettings = RetrySettings()
    contract: ContractSettings = ContractSettings()
    budget: BudgetSettings = BudgetSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    journal: str = ""
    """Folder of the journal, on a local or shared file system; empty = the run's."""
    mode: Literal["record", "replay"] = "record"
    """`replay` answers from the journal only; a missing call is an error."""
    actors: int = Field(1, ge=1)
    """Client actors; each has its share of the endpoints' limits. One keeps 1,000 calls of a few seconds in flight
    (about 400 calls per second, on one core); each takes some seconds of CPU to start."""
    spread: bool = False
    """Place the actors on any node, not on the driver's (the journal must then be on a shared file system)."""

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
        return getattr(self.roles, name)

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
        configured = ", ".join(self.endpoints) or "none"
        raise ValueError(
            f"llm.roles.{role} needs the endpoint {name!r}, which is not configured (configured: {configured}): "
            f"set llm.roles.{role}.endpoint to one of them or to {EMBEDDED!r}, "
            f"or set llm.endpoints.{name}.base_url and .model"
        )

    def model_of(self, role: str) -> str:
        """Model that answers a role. Errors: see `endpoint_of`."""
        name = self.endpoint_of(role)
        return EMBEDDED_MODEL if name == EMBEDDED else self.endpoints[name].model

    def parameters_of(self, role: str) -> dict[str, object]:
        """What decides a role's answers: the model and its parameters, at whatever endpoint."""
        return {"model": self.model_of(role)} | self.role(role).model_dump(exclude={"endpoint", "max_tokens_field"})

    def guided(self, role: str) -> bool:
        """Whether the role's endpoint enforces answer forms by regular expressions: small local models need that, other
        models follow the prompt.
        """
        name = self.endpoint_of(role)
        return name == EMBEDDED or self.endpoints[name].structured in ("structured_outputs", "guided")
