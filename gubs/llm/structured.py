"""Answers in a required form: how an endpoint is made to keep it, how a text is read, what a re-ask says."""

import functools
import importlib
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gubs.artifacts import JsonObject
from gubs.llm.calls import LLMRequest, Message
from gubs.prompts.fields import plain, quoted_answer

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

UNSUPPORTED = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown|unexpected|extra (inputs|fields)|not permitted"
    r"|not allowed|invalid (parameter|argument)|response_format|json_schema|structured_outputs|guided_(json|regex)",
    re.I,
)
_LONGEST_QUOTE = 6000
_LONGEST_ANSWER = 200_000
"""Characters."""
_SHOWN = 200
_LONGEST_ERROR = 800


class UnusableError(ValueError):
    """An answer that cannot be used; failures are counted by `cause`."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


class Support:
    """What an endpoint enforces: starts with its setting and learns from refusals."""

    def __init__(self, setting: str):
        auto = setting == "auto"
        self._ladders: dict[str, tuple[str, ...]] = {
            "schema": ("json_schema", "structured_outputs", "guided", "none") if auto else (setting,),
            "regex": ("structured_outputs", "guided", "none") if auto else (setting,),
        }
        self._modes = {form: ladder[0] for form, ladder in self._ladders.items()}

    def mode(self, request: LLMRequest) -> str:
        """The mode to ask in."""
        return self._modes.get(_form(request), "none")

    def fallback(self, request: LLMRequest, rejected: str, message: str) -> str | None:
        """The mode to try after `rejected` was rejected with a message; None if the message is about something else."""
        ladder = self._ladders.get(_form(request), ())
        if rejected not in ladder[:-1] or not UNSUPPORTED.search(message):
            return None
        return ladder[ladder.index(rejected) + 1]

    def works(self, request: LLMRequest, mode: str) -> None:
        """Remembers the mode in which an answer came, for the calls that follow."""
        if form := _form(request):
            self._modes[form] = mode


def _form(request: LLMRequest) -> str:
    if request.schema is not None:
        return "schema"
    return "regex" if request.regex is not None else ""


def fields(request: LLMRequest, mode: str) -> JsonObject:
    """Fields of the request body that make the endpoint keep the form."""
    form, value = ("json", request.schema) if request.schema is not None else ("regex", request.regex)
    if mode == "none" or value is None:
        return {}
    if mode == "json_schema":  # it cannot express a regex
        schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, "strict": True}}
        return {"response_format": schema} if form == "json" else {}
    return {"structured_outputs": {form: value}} if mode == "structured_outputs" else {f"guided_{form}": value}


def read(request: LLMRequest, text: str, finish_reason: str = "", reasoning: str = "") -> Any:
    """The value of an answer: the text, its JSON, or what the request's parser returns.

    Raises:
        UnusableError: with the cause. Whatever a parser raises is a failure of this answer.
    """
    if finish_reason == "content_filter":
        raise UnusableError("refused", "the endpoint filtered the answer out")
    if finish_reason == "length":
        raise UnusableError("truncated", "the answer was cut off at the token limit")
    if not text.strip():
        if reasoning.strip():
            raise UnusableError("only_reasoning", f"only reasoning came, no answer: {plain(reasoning, _SHOWN)}")
        raise UnusableError("empty", "the answer is empty")
    if len(text) > _LONGEST_ANSWER:
        raise UnusableError("too_long", f"the answer must have fewer than {_LONGEST_ANSWER:,} characters")
    try:
        return _value(request, text)
    except Exception as e:  # noqa: BLE001 - a parser must not end the run for one answer
        expected = isinstance(e, ValueError)
        cause = str(getattr(e, "cause", "") or "unusable")
        raise UnusableError(cause, str(e) if expected else f"it cannot be read ({type(e).__name__})") from None


def reask(messages: tuple[Message, ...], answer: str, error: str) -> tuple[Message, ...]:
    """The messages of a second try: the first ones, the answer, and what is wrong with it; both made harmless, since
    they may repeat texts from outside.
    """
    complaint = (
        f"Your answer cannot be used: {plain(error, _LONGEST_ERROR)}\n"
        "Answer the request above once more, in the required form only."
    )
    return (
        *messages,
        {"role": "assistant", "content": quoted_answer(answer, _LONGEST_QUOTE)},
        {"role": "user", "content": complaint},
    )


def _value(request: LLMRequest, text: str) -> object:
    value: object = text
    if request.schema is not None:
        value = _json(text, request.schema)
    elif request.regex is not None:
        value = stripped = text.strip()
        if not re.fullmatch(request.regex, stripped):
            raise UnusableError("no_match", f"it must match the pattern {plain(request.regex, _SHOWN)}")
    return _parser(request.parser)(value, **request.parser_args) if request.parser else value


def _json(text: str, schema: JsonObject) -> object:
    try:
        value = json.loads(_unfenced(text))
    except ValueError as e:
        raise UnusableError("not_json", f"it must be one JSON value and nothing else ({e})") from None
    error = next(iter(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value)), None)
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "the top level"
        raise UnusableError("schema", f"at {where}: {error.message[:300]}")
    return value


def _unfenced(text: str) -> str:
    """The text without a fence of three backticks around it."""
    text = text.strip()
    if not (text.startswith("```") and text.endswith("```") and "\n" in text):
        return text
    return text[text.index("\n") : -3]


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> "Draft202012Validator":
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(schema))


@functools.lru_cache(maxsize=256)
def _parser(name: str) -> Callable[..., object]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
