"""The records of this package: a request, the journal's entry for an attempt, the answer the caller gets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gubs.artifacts import JsonObject
from gubs.llm.settings import RoleSettings

Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""


@dataclass(frozen=True, slots=True)
class LLMRequest:
    """One question to a model."""

    role: str
    """summarizer, profiler, matcher or annotator."""
    label: str
    """Names the request in errors and in the journal, e.g. `match/g03/u0017`; not part of its identity."""
    messages: tuple[Message, ...]
    schema: JsonObject | None = None
    """JSON schema of the answer; the value is the JSON."""
    regex: str | None = None
    """Pattern for the whole answer (Python and vLLM dialect); the value is the text."""
    parser: str = ""
    """`module:function`. It gets the value so far (the JSON if there is a schema, else the text) and returns the final
    value, or raises a ValueError; its attribute `cause`, if any, names the kind of failure."""
    parser_args: JsonObject = field(default_factory=dict)
    """Further arguments of the parser, by name."""
    sample: int = 0
    """Distinguishes deliberate repeats of the same request."""
    metadata: JsonObject = field(default_factory=dict)
    """Copied to the answer; not part of the identity."""


def question(role: str, label: str, user: str, *, system: str = "", **fields: Any) -> LLMRequest:
    """A request with one user message and, if given, a system message; `fields` are those of `LLMRequest`."""
    head: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
    return LLMRequest(role, label, (*head, {"role": "user", "content": user}), **fields)


@dataclass(slots=True)
class Cost:
    """What calls cost."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    money: float = 0.0
    """In the currency of the endpoints' prices."""

    @property
    def tokens(self) -> int:
        """Input and output tokens."""
        return self.tokens_in + self.tokens_out

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds another cost; -1 times to subtract it."""
        self.calls += times * other.calls
        self.tokens_in += times * other.tokens_in
        self.tokens_out += times * other.tokens_out
        self.money += times * other.money


@dataclass(frozen=True, slots=True)
class Entry:
    """An attempt in the journal: an HTTP answer, or why there is none.

    Attempts are facts; what they mean for a run is decided when they are read (see `Journal.get`): answers last, a
    failure is tried again by the next run.
    """

    key: str
    role: str
    label: str
    endpoint: str
    request: JsonObject
    """What the key is a hash of: model, messages, parameters, schema, regex, sample; empty if another attempt follows,
    which has it."""
    model: str = ""
    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_estimated: bool = False
    """The endpoint sent no counts; these are ours (see `estimate_tokens`)."""
    latency_s: float = 0.0
    """Of the attempt that succeeded."""
    attempts: int = 1
    """Number of attempts of this call so far, in this run."""
    price: float = 0.0
    billed: bool = True
    """The server may charge for it: it answered, or worked on it for a while."""
    failure: str = ""
    """Cause, if the endpoint refused this request or did not answer it; empty = there is an answer."""
    error: str = ""
    retried: bool = False
    """Another attempt followed or ran beside it, in the same run: the call did not end with this one."""
    time: str = ""
    """UTC, ISO 8601."""

    @property
    def cost(self) -> Cost:
        """What the attempt cost."""
        return Cost(int(self.billed), self.tokens_in, self.tokens_out, self.price)


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a request. `ok` says whether `value` can be used."""

    role: str
    label: str
    key: str
    text: str
    """The last answer, usable or not."""
    reasoning: str
    value: Any
    """The text, the parsed JSON, or what the parser returned; None after a failure."""
    failure: str
    """Empty, or the cause: one of the answer (not_json, schema, no_match, empty, only_reasoning, truncated, too_long,
    refused, moderated, or a cause of the parser), or one of `gubs.llm.contract.UNANSWERED`."""
    error: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    latency_s: float
    attempts: int
    """HTTP attempts over all calls."""
    calls: int
    """1, or more after re-asks and answers that were cut off."""
    price: float
    metadata: JsonObject = field(default_factory=dict)
    replayed: bool = field(default=False, compare=False)
    """All of it came from the journal."""

    @property
    def ok(self) -> bool:
        """Whether the answer can be used."""
        return not self.failure


def identity(request: LLMRequest, role: RoleSettings, model: str, *, fresh: int = 0, room: int = 1) -> JsonObject:
    """What identifies a request: the journal answers equal identities with equal answers.

    The endpoint's address, its limits and the way it enforces structure are not part of it: an answer stays valid when
    a run resumes with another endpoint for the same model.

    Args:
        request: the request.
        role: parameters of its role.
        model: model that answers.
        fresh: number of earlier samples that could not be used.
        room: multiple of the role's `max_tokens`.
    """
    parameters = {name: getattr(role, name) for name in ("temperature", "top_p", "max_tokens", "seed")} | role.extra
    parameters["max_tokens"] = role.max_tokens * room
    again = {"fresh": fresh} if fresh else {}
    return {
        "model": model,
        "messages": list(request.messages),
        "parameters": {k: v for k, v in parameters.items() if v is not None},
        "schema": request.schema,
        "regex": request.regex,
        "sample": request.sample,
        **again,
    }


def key_of(identity: JsonObject) -> str:
    """Hash of an identity: 32 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def estimate_tokens(text: str) -> int:
    """Approximate tokens of a text: one per four ASCII characters and one per other character.

    For limits, and for prices before spending: about right for English and Chinese, high for accented languages.
    """
    ascii_count = len(text.encode("ascii", "ignore"))
    return -(-ascii_count // 4) + len(text) - ascii_count


def estimate_prompt(messages: Sequence[Message]) -> int:
    """Approximate input tokens of a request: its texts, and four more per message."""
    return sum(estimate_tokens(m["content"]) + 4 for m in messages)


def clean(text: str) -> str:
    """The text without lone surrogates, which UTF-8 (and thus the journal) cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
