"""What a response means: a reply, or a failed attempt and what to do about it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

from gubs.llm.calls import clean

_OPEN = re.compile(r"\s*<think(?:ing)?>", re.I)
_CLOSE = re.compile(r"</think(?:ing)?>", re.I)
_CLOSE_LINE = re.compile(r"^\s*</think(?:ing)?>", re.I | re.M)
_QUOTA = re.compile(r"insufficient_quota|exceeded your current quota|insufficient balance|billing", re.I)
_LONGEST_MESSAGE = 600

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

    def __init__(self, cause: str, message: str, advice: Advice, *, after_s: float | None = None, alive: bool = True):
        super().__init__(message)
        self.cause, self.message, self.advice, self.after_s = cause, message, advice, after_s
        self.alive = alive
        """The endpoint responded."""


def read_response(status: int, headers: Mapping[str, str], content: bytes, *, split_reasoning: bool = True) -> Reply:
    """Reads a response of the chat API.

    Raises:
        AttemptError: it is not an answer.
    """
    if status >= 400:
        raise _status_fault(status, headers, _server_message(content))
    try:
        body = json.loads(content)
        if isinstance(body, dict) and body.get("error") and not body.get("choices"):
            code = body["error"].get("code") if isinstance(body["error"], dict) else None
            raise _status_fault(code if isinstance(code, int) else 500, headers, _server_message(content))
        choice = body["choices"][0]
        message = choice["message"]
        text = _text_of(message.get("content"))
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise AttemptError(
            "cut_off", f"the answer is not complete JSON of the chat API ({type(e).__name__})", "retry", alive=False
        ) from None
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if split_reasoning and not reasoning:
        reasoning, text = split_think(text)
    usage = body.get("usage") or {}
    return Reply(
        text=clean(text),
        reasoning=clean(_text_of(reasoning)),
        finish_reason=str(choice.get("finish_reason") or ""),
        tokens_in=usage.get("prompt_tokens"),
        tokens_out=usage.get("completion_tokens"),
        refusal=clean(str(message.get("refusal") or "")),
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


def _status_fault(status: int, headers: Mapping[str, str], server_message: str) -> AttemptError:
    message, after = f"HTTP {status}: {server_message}", retry_after_s(headers)
    if status == 429 and not _QUOTA.search(server_message):
        return AttemptError("rate_limited", message, "wait", after_s=after)
    if status in (401, 402, 403, 404, 405, 429):
        return AttemptError("refused", message, "stop")
    if status in (408, 409, 425) or status >= 500:
        return AttemptError("unreachable", message, "retry", after_s=after, alive=status < 500)
    return AttemptError("rejected", message, "give_up")


def _server_message(content: bytes) -> str:
    message = text = clean(content.decode("utf-8", "replace"))
    try:
        error = json.loads(text).get("error", text)
        if isinstance(error, dict):
            code = f" ({error['code']})" if error.get("code") else ""
            message = f"{error.get('message') or json.dumps(error)}{code}"
        else:
            message = str(error)
    except (ValueError, AttributeError):
        pass  # not a JSON object: the text itself is the message
    return clean(" ".join(message.split())[:_LONGEST_MESSAGE]) or "(the server sent no message)"


def _text_of(content: object) -> str:
    if isinstance(content, list):  # parts: [{"type": "text", "text": ...}, ...]
        return "".join(str(p.get("text", "")) for p in content)
    if content is None or isinstance(content, str):
        return content or ""
    raise TypeError("content is neither text nor a list of parts")
