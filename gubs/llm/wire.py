"""What a response means: a reply, or a failed attempt and what to do about it."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from gubs.llm.calls import clean

_OPEN = re.compile(r"\s*<think(?:ing)?>", re.I)
_CLOSE = re.compile(r"</think(?:ing)?>", re.I)
_CLOSE_LINE = re.compile(r"^\s*</think(?:ing)?>", re.I | re.M)
_QUOTA = re.compile(r"insufficient_quota|exceeded your current quota|insufficient balance|billing", re.I)
_LONGEST_MESSAGE = 600

Advice = Literal["retry", "wait", "give_up", "stop"]
"""retry: try again soon; wait: the endpoint says slow down; give_up: this request will never work; stop: none will."""


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
    """An attempt that brought no answer."""

    def __init__(self, cause: str, message: str, advice: Advice, *, after_s: float | None = None, alive: bool = True):
        super().__init__(message)
        self.cause, self.message, self.advice, self.after_s = cause, message, advice, after_s
        self.alive = alive
        """The endpoint gave a sign of life."""


def read_response(status: int, headers: Any, content: bytes, *, split_reasoning: bool = True) -> Reply:
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

    Some chat templates put the opening tag into the prompt; then the closing tag counts, where it starts a line. Tags
    further inside an answer (a quoted title, say) are part of the answer.
    """
    opened = _OPEN.match(text)
    if opened:
        closed = _CLOSE.search(text, opened.end())
        if not closed:
            return text[opened.end() :].strip(), ""  # cut off while it was still thinking
        return text[opened.end() : closed.start()].strip(), text[closed.end() :].lstrip()
    closed = _CLOSE_LINE.search(text)
    if closed:
        return text[: closed.start()].strip(), text[closed.end() :].lstrip()
    return "", text


def retry_after_s(headers: Any, now: datetime | None = None) -> float | None:
    """Seconds that `Retry-After` asks to wait (given in seconds or as a date); None where it says nothing usable."""
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


def _status_fault(status: int, headers: Any, message: str) -> AttemptError:
    said = f"HTTP {status}: {message}"
    after = retry_after_s(headers)
    if status == 429 and not _QUOTA.search(message):
        return AttemptError("rate_limited", said, "wait", after_s=after)
    if status in (401, 402, 403, 404, 405, 429):
        return AttemptError("refused", said, "stop")
    if status in (408, 409, 425) or status >= 500:
        return AttemptError("unreachable", said, "retry", after_s=after, alive=status < 500)
    return AttemptError("rejected", said, "give_up")


def _server_message(content: bytes) -> str:
    text = clean(content.decode("utf-8", "replace"))
    try:
        error = json.loads(text).get("error", text)
        found = (error.get("message") or json.dumps(error)) if isinstance(error, dict) else str(error)
        code = error.get("code") if isinstance(error, dict) else None
        found = f"{found} ({code})" if code else found
    except (ValueError, AttributeError):
        found = text
    return clean(" ".join(found.split())[:_LONGEST_MESSAGE]) or "(the server sent no message)"


def _text_of(content: Any) -> str:
    if isinstance(content, list):  # parts: [{"type": "text", "text": ...}, ...]
        return "".join(str(p.get("text", "")) for p in content)
    if content is None or isinstance(content, str):
        return content or ""
    raise TypeError("content is neither text nor a list of parts")
