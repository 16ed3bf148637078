"""Answers in a required form: how an endpoint is made to keep it, how a text is read, what a re-ask says."""

import functools
import importlib
import json
import re
from typing import Any

from gubs.llm.calls import LLMRequest, Message

_FENCED = re.compile(r"\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*", re.S)
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown|unexpected|extra (inputs|fields)|not permitted"
    r"|not allowed|invalid (parameter|argument)|response_format|json_schema|structured_outputs|guided_(json|regex)",
    re.I,
)
_LONGEST_QUOTE = 6000


class UnusableError(ValueError):
    """An answer that cannot be used; `cause` is what failures are counted by."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


class Support:
    """What an endpoint is known to enforce: starts with its setting and learns from refusals."""

    def __init__(self, setting: str):
        auto = setting == "auto"
        self._ladders: dict[str, tuple[str, ...]] = {
            "schema": ("json_schema", "structured_outputs", "guided", "none") if auto else (setting,),
            "regex": ("structured_outputs", "guided", "none") if auto else (setting,),
        }
        self._known = {kind: ladder[0] for kind, ladder in self._ladders.items()}

    def mode(self, request: LLMRequest) -> str:
        """The mode to ask in."""
        kind = _kind(request)
        return self._known[kind] if kind else "none"

    def after(self, request: LLMRequest, tried: str, message: str) -> str | None:
        """The mode to try when `tried` was rejected with a message; None where the message is about something else."""
        ladder = self._ladders.get(_kind(request), ())
        if tried not in ladder[:-1] or not _UNSUPPORTED.search(message):
            return None
        return ladder[ladder.index(tried) + 1]

    def works(self, request: LLMRequest, mode: str) -> None:
        """Remembers the mode in which an answer came, for the calls that follow."""
        if kind := _kind(request):
            self._known[kind] = mode


def _kind(request: LLMRequest) -> str:
    if request.schema is not None:
        return "schema"
    return "regex" if request.regex is not None else ""


def fields(request: LLMRequest, mode: str) -> dict[str, Any]:
    """Fields of the request body that make the endpoint keep the form."""
    if mode == "none" or (request.schema is None and request.regex is None):
        return {}
    if request.schema is not None:
        if mode == "json_schema":
            named = {"name": "answer", "schema": request.schema, "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        return (
            {"structured_outputs": {"json": request.schema}}
            if mode == "structured_outputs"
            else {"guided_json": request.schema}
        )
    if mode == "json_schema":
        return {}  # it has no form for a regex
    return (
        {"structured_outputs": {"regex": request.regex}}
        if mode == "structured_outputs"
        else {"guided_regex": request.regex}
    )


def read(request: LLMRequest, text: str, finish_reason: str = "", refusal: str = "") -> Any:
    """The value of an answer: the text, its JSON, or what the request's parser makes of it.

    Raises:
        UnusableError: with the cause. Errors of the parser other than ValueError are bugs and pass.
    """
    if refusal or finish_reason == "content_filter":
        raise UnusableError("refused", refusal or "the endpoint filtered the answer out")
    if not text.strip():
        raise UnusableError("truncated" if finish_reason == "length" else "empty", "the answer is empty")
    try:
        return _value(request, text)
    except ValueError as e:
        cause = str(getattr(e, "cause", "") or "unusable")
        if finish_reason == "length":
            raise UnusableError("truncated", f"the answer was cut off at the token limit ({e})") from None
        raise UnusableError(cause, str(e)) from None


def reask(messages: tuple[Message, ...], answer: str, error: str) -> tuple[Message, ...]:
    """The messages of a second try: the first ones, the answer, and what is wrong with it."""
    told = f"Your answer cannot be used: {error}\nAnswer the request above once more, in the required form only."
    return (*messages, {"role": "assistant", "content": answer[:_LONGEST_QUOTE]}, {"role": "user", "content": told})


def _value(request: LLMRequest, text: str) -> Any:
    value: Any = text
    if request.schema is not None:
        value = _json(text, request.schema)
    elif request.regex is not None:
        value = text.strip()
        if not re.fullmatch(request.regex, value):
            raise UnusableError("no_match", f"it must match the pattern {request.regex}")
    return _parser(request.parser)(value, **request.parser_args) if request.parser else value


def _json(text: str, schema: dict[str, Any]) -> Any:
    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError as e:
        raise UnusableError("not_json", f"it must be one JSON value and nothing else ({e})") from None
    wrong = next(iter(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value)), None)
    if wrong is not None:
        where = "/".join(map(str, wrong.absolute_path)) or "the top level"
        raise UnusableError("schema", f"at {where}: {wrong.message[:300]}")
    return value


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(schema))


@functools.lru_cache(maxsize=256)
def _parser(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
