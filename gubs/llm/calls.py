"""The words of this package: a request, a finished call's entry in the journal, the answer the caller gets."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from gubs.llm.settings import RoleSettings

Message = dict[str, str]
"""`role` (system, user, assistant) and `content`."""


@dataclass(frozen=True, slots=True)
class LLMRequest:
    """One thing to ask."""

    role: str
    """summarizer, profiler, matcher or annotator."""
    label: str
    """Names the request in errors and in the journal, as `match/g03/u0017`; not part of its identity."""
    messages: tuple[Message, ...]
    schema: dict[str, Any] | None = None
    """JSON schema the answer must fit; the value is the JSON."""
    regex: str | None = None
    """Pattern the whole answer must match (Python and vLLM dialect); the value is the text."""
    parser: str = ""
    """`module:function`; gets the value so far (the JSON with a schema, else the text) and returns the final value, or
    raises a ValueError whose `cause` attribute, if it has one, names the kind of failure."""
    parser_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the parser, by name."""
    sample: int = 0
    """Tells deliberate repeats of the same request apart."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Carried through to the answer; not part of the identity."""


def question(role: str, label: str, user: str, *, system: str = "", **rest: Any) -> LLMRequest:
    """A request of one user message, with a system message where given."""
    head: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
    return LLMRequest(role, label, (*head, {"role": "user", "content": user}), **rest)


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished call as the journal holds it: one HTTP answer, or the failure it ended in."""

    key: str
    role: str
    label: str
    endpoint: str
    request: dict[str, Any]
    """Everything the key is the hash of: model, messages, parameters, schema, regex, sample."""
    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    tokens_estimated: bool = False
    """The endpoint did not say; the counts are ours (see `estimate_tokens`)."""
    latency_s: float = 0.0
    """Of the attempt that succeeded."""
    attempts: int = 1
    price: float = 0.0
    failure: str = ""
    """Cause, where the endpoint refused this one request or never answered it; empty = there is an answer."""
    error: str = ""
    lasting: bool = True
    """False: a later run asks again (the failure was the endpoint's, not the request's)."""
    time: str = ""
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request. `ok` says whether `value` can be used."""

    role: str
    label: str
    key: str
    text: str
    """The last answer, whatever it is worth."""
    reasoning: str
    value: Any
    """The text, the parsed JSON, or what the parser made of it; None after a failure."""
    failure: str
    """Empty, or the cause: not_json, schema, no_match, empty, truncated, refused, rejected, unreachable, rate_limited,
    or a cause of the parser."""
    error: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    latency_s: float
    attempts: int
    """HTTP attempts, over all calls."""
    calls: int
    """1, or more after a re-ask."""
    price: float
    metadata: dict[str, Any] = field(default_factory=dict)
    replayed: bool = field(default=False, compare=False)
    """All of it came from the journal."""

    @property
    def ok(self) -> bool:
        """Whether the answer can be used."""
        return not self.failure


def identity(request: LLMRequest, role: RoleSettings, model: str) -> dict[str, Any]:
    """What makes a request this request: equal identities get equal answers from the journal.

    The endpoint's address, its limits and the way structure is enforced are left out: an answer stays valid when a run
    is continued through another door to the same model.
    """
    parameters = {
        "temperature": role.temperature,
        "top_p": role.top_p,
        "max_tokens": role.max_tokens,
        "seed": role.seed,
        **role.extra,
    }
    return {
        "model": model,
        "messages": list(request.messages),
        "parameters": {k: v for k, v in parameters.items() if v is not None},
        "schema": request.schema,
        "regex": request.regex,
        "sample": request.sample,
    }


def key_of(identity: dict[str, Any]) -> str:
    """Hash of an identity: 32 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def estimate_tokens(text: str) -> int:
    """Tokens of a text, roughly: four ASCII characters make one, every other character makes one.

    Meant for limits and for prices before spending: about right for English and Chinese, high for accented languages.
    """
    ascii_count = len(text.encode("ascii", "ignore"))
    return -(-ascii_count // 4) + len(text) - ascii_count


def estimate_prompt(messages: list[Message] | tuple[Message, ...]) -> int:
    """Input tokens of a request, roughly: its texts and four more a message."""
    return sum(estimate_tokens(m["content"]) + 4 for m in messages)


def clean(text: str) -> str:
    """The text without lone surrogates, which UTF-8 (and thus the journal) cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def entry_row(entry: Entry) -> dict[str, Any]:
    """The entry as a JSON object. Not `dataclasses.asdict`, which copies every prompt deeply."""
    return {f.name: getattr(entry, f.name) for f in dataclasses.fields(entry)}
