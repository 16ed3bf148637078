"""What a response means: a reply, or a failed attempt and what to do about it.

Causes follow from the status and from the error's `code`, `type` and `param`, never from its prose: messages of
ordinary rate limits mention billing and quotas. Bodies may be anything: whatever cannot be read is a failed attempt.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from gubs.llm.calls import clean

_OPEN = re.compile(r"\s*<think(?:ing)?>", re.I)
_CLOSE = re.compile(r"</think(?:ing)?>", re.I)
_CLOSE_LINE = re.compile(r"^[ \t]*</think(?:ing)?>", re.I | re.M)
_QUOTA = {
    *("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"),
    *("account_deactivated", "access_terminated"),
}
_CONTEXT = {"context_length_exceeded", "string_above_max_length", "request_too_large", "max_tokens_exceeded"}
_MODERATED = {
    *("content_policy_violation", "content_filter", "moderation_blocked", "data_inspection_failed"),
    *("invalid_prompt", "content_policy", "safety", "prompt_blocked"),
}
_MODERATION_FIELDS = {"flagged_input", "reasons"}
"""In an error's `metadata`, they say that this prompt was moderated."""
_BROKEN_OFF = {"error", "network_error", "insufficient_system_resource", "abort", "aborted", "cancelled", "timeout"}
"""Values of `finish_reason` with which a server breaks off an answer."""
_FINISH_REASONS = {"max_tokens": "length", "max_output_tokens": "length", "safety": "content_filter"}
"""Other names of OpenAI's values."""
_LONGEST_MESSAGE = 600
_LONGEST_BODY = 4 << 20
"""Bytes; texts of a thousand pages are not answers."""
_SHOWN_BYTES = 80

Advice = Literal["retry", "wait", "give_up", "stop"]
"""retry: try again soon; wait: the endpoint asks to slow down; give_up: this request will never work; stop: none
will."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer of the endpoint."""

    text: str
    reasoning: str
    finish_reason: str
    tokens_in: int | None
    tokens_out: int | None
    refusal: str = ""


class AttemptError(Exception):
    """An attempt without an answer."""

    def __init__(
        self,
        cause: str,
        message: str,
        advice: Advice,
        *,
        after_s: float | None = None,
        alive: bool = True,
        responded: bool = True,
        billed: bool = False,
        parameter: str = "",
    ):
        super().__init__(message)
        self.cause, self.message, self.advice, self.after_s = cause, message, advice, after_s
        self.alive = alive
        """The endpoint works, whatever it said."""
        self.responded = responded
        """Something came back, if only an error."""
        self.billed = billed
        """The server may charge for it."""
        self.parameter = parameter
        """The field of the request that it names."""


@dataclass(frozen=True)
class ServerError:
    """The error object of a response, as far as it can be read."""

    message: str
    codes: frozenset[str] = frozenset()
    """`code` and `type`."""
    status: int | None = None
    """A numeric `code`: the status behind a proxy."""
    parameter: str = ""
    moderated: bool = False


def read_response(status: int, headers: Mapping[str, str], content: bytes, *, split_reasoning: bool = True) -> Reply:
    """Reads a response of the chat API.

    Raises:
        AttemptError: it is not an answer.
    """
    if status >= 400:
        raise _status_fault(status, headers, _server_error(content))
    if len(content) > _LONGEST_BODY:
        raise _unreadable(headers, content, f"{len(content):,} bytes are not an answer")
    try:
        body = json.loads(content)
        choices = body.get("choices")
        choice = choices[0] if choices else {}
        fault = choice.get("error") or (not choices and body.get("error"))
        if not fault:
            return _reply(choice, body.get("usage"), split_reasoning)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise _unreadable(headers, content, type(e).__name__) from None
    error = _error_of(fault)
    raise _status_fault(error.status or 500, headers, error)


def _reply(choice: Mapping[str, Any], usage: object, split_reasoning: bool) -> Reply:
    message = choice["message"]
    text = _text_of(message.get("content"))
    finish_reason = str(choice.get("finish_reason") or "").casefold()
    finish_reason = _FINISH_REASONS.get(finish_reason, finish_reason)
    if finish_reason in _BROKEN_OFF:
        raise AttemptError(
            "unreachable", f"the server broke the answer off ({finish_reason})", "retry", alive=False, billed=True
        )
    reasoning = _loose_text(message.get("reasoning_content") or message.get("reasoning"))
    if split_reasoning and not reasoning:
        reasoning, text = split_think(text)
    counts = usage if isinstance(usage, Mapping) else {}
    return Reply(
        text=clean(text),
        reasoning=clean(reasoning),
        finish_reason=finish_reason,
        tokens_in=_count(counts.get("prompt_tokens")),
        tokens_out=_count(counts.get("completion_tokens")),
        refusal=clean(_loose_text(message.get("refusal"))),
    )


def split_think(text: str) -> tuple[str, str]:
    """Reasoning and answer of a text that starts with a `<think>` part.

    Some chat templates put the opening tag into the prompt; then a closing tag at the start of a line counts. Tags
    further inside an answer (in a quoted title, for instance) belong to the answer.
    """
    opening = _OPEN.match(text)
    start = opening.end() if opening else 0
    closing = _CLOSE.search(text, start) if opening else _CLOSE_LINE.search(text)
    if closing:
        return text[start : closing.start()].strip(), text[closing.end() :].lstrip()
    return (text[start:].strip(), "") if opening else ("", text)  # cut off before the reasoning ended, or no reasoning


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that `Retry-After` (seconds or a date) asks to wait; None if it is missing or unreadable."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds:
            return max(0.0, float(milliseconds) / 1000)
        if not value:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            when = parsedate_to_datetime(value)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())


def _status_fault(status: int, headers: Mapping[str, str], error: ServerError) -> AttemptError:
    message, after = f"HTTP {status}: {error.message}", retry_after_s(headers)
    if status == 429 and not error.codes & _QUOTA:
        return AttemptError("rate_limited", message, "wait", after_s=after)
    if status in (401, 402, 404, 405, 429):
        return AttemptError("refused", message, "stop")
    if status in (408, 409, 425, 498):
        return AttemptError("unreachable", message, "retry", after_s=after)
    if status >= 500:
        return AttemptError("unreachable", message, "retry", after_s=after, alive=False, billed=True)
    if error.moderated or error.codes & _MODERATED:
        return AttemptError("moderated", message, "give_up")
    if status == 413 or error.codes & _CONTEXT:
        return AttemptError("context", message, "give_up")
    return AttemptError("rejected", message, "give_up", parameter=error.parameter)


def _unreadable(headers: Mapping[str, str], content: bytes, why: str) -> AttemptError:
    kind = headers.get("content-type") or "no content type"
    start = " ".join(content[:_SHOWN_BYTES].decode("utf-8", "replace").split())
    return AttemptError(
        "unreadable",
        clean(f"the response is not an answer of the chat API ({why}; {kind}; it begins {start!r})"),
        "retry",
        alive=False,
        billed=True,
    )


def _server_error(content: bytes) -> ServerError:
    text = content[:_LONGEST_BODY].decode("utf-8", "replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return ServerError(_short(text))
    return _error_of(body.get("error", body) if isinstance(body, dict) else body)


def _error_of(error: object) -> ServerError:
    """An error object, or whatever stands in its place."""
    if not isinstance(error, dict):
        return ServerError(_short(_loose_text(error)))
    code, kind, metadata = error.get("code"), error.get("type"), error.get("metadata")
    shown = f" ({code})" if code else ""
    return ServerError(
        message=_short(f"{_loose_text(error.get('message') or error)}{shown}"),
        codes=frozenset(str(c).casefold() for c in (code, kind) if isinstance(c, str)),
        status=code if isinstance(code, int) and 400 <= code < 600 else None,
        parameter=error["param"] if isinstance(error.get("param"), str) else "",
        moderated=isinstance(metadata, dict) and bool(_MODERATION_FIELDS & set(metadata)),
    )


def _short(text: str) -> str:
    return clean(" ".join(text[: 4 * _LONGEST_MESSAGE].split())[:_LONGEST_MESSAGE]) or "(the server sent no message)"


def _count(value: object) -> int | None:
    """A number of tokens; some servers send it as text."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 12:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _loose_text(value: object) -> str:
    """A text beside the answer: whatever else stands there is shown as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "(too deeply nested)"


def _text_of(content: object) -> str:
    if isinstance(content, list):  # parts: [{"type": "text", "text": ...}, ...]
        return "".join(str(p.get("text", "")) for p in content)
    if content is None or isinstance(content, str):
        return content or ""
    raise TypeError("content is neither text nor a list of parts")
