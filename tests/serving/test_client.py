"""The client by itself: where it is imported from, how long it waits, and how it reads answers that come in lines."""

import asyncio
import json
import time
from email.utils import formatdate

import httpx
import pytest

import gubs.serving
from gubs.serving.client import AsyncClient, Client, ServiceError, _seconds
from gubs.serving.filter import Decision, Mode
from gubs.serving.schemas import FilterLine, FilterSummary, ModelName, Problem, Result, Usage

NAMES = ("v1", "v\u2028\x85 2")
"""The second has what Python, but not JSON, counts as a line's end."""
DONE = FilterSummary(
    request_id="r",
    model=ModelName(name="run", version="1"),
    mode=Mode.SCORE,
    threshold=0.5,
    usage=Usage(prompt_tokens=20),
    timing_ms={"total": 1.0},
)
RESULTS = [Result(index=i, id=v, decision=Decision.DROP, skip_probability=0.9) for i, v in enumerate(NAMES)]
LINES = [*(FilterLine(result=r) for r in RESULTS), FilterLine(done=DONE)]
BROKEN = FilterLine(error=Problem(code="timeout", message="no answer", retryable=True))


class Served(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers with these, one after the other: lines, in blocks of a few bytes, a status and a code, or a response.
    None = the connection is closed.
    """

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def handle_request(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0)
        if answer is None:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        if isinstance(answer, httpx.Response):
            return answer
        if isinstance(answer, list):
            return httpx.Response(200, stream=Blocks(answer))
        problem = Problem(code=answer[1], message="no", retryable=answer[0] == 503)
        return httpx.Response(answer[0], json={"error": problem.model_dump()})

    async def handle_async_request(self, request):
        return self.handle_request(request)


class Blocks(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The lines as they might come; None = the connection ends."""

    def __init__(self, lines):
        self.text, self.breaks = b"".join(x.line().encode() for x in lines if x), None in lines

    def __iter__(self):
        yield from (self.text[i : i + 7] for i in range(0, len(self.text), 7))
        if self.breaks:
            raise httpx.RemoteProtocolError("peer closed connection")

    async def __aiter__(self):
        for block in self:
            yield block


def both(*answers, retries=3):
    """What the sync and the async client get, each with its error: (lines, error, requests)."""
    return [_sync(Served(*answers), retries), asyncio.run(_async(Served(*answers), retries))]


def _sync(served, retries):
    client, got = Client("http://service", "key", retries=retries), []
    client._options["transport"] = served
    with client:
        try:
            got.extend(client.filter_lines("u", NAMES, mode=Mode.SCORE))
        except ServiceError as e:
            return got, e, served.requests
    return got, None, served.requests


async def _async(served, retries):
    client, got = AsyncClient("http://service", "key", retries=retries), []
    client._options["transport"] = served
    async with client:
        try:
            async for line in client.filter_lines("u", NAMES, mode=Mode.SCORE):
                got.append(line)
        except ServiceError as e:
            return got, e, served.requests
    return got, None, served.requests


def test_lines_are_read_however_they_are_cut():
    for got, error, (request,) in both(LINES):
        assert (got, error) == (LINES, None)
        assert request.headers["accept"] == "application/x-ndjson"
        assert json.loads(request.content)["mode"] == "score"


def test_what_fails_before_the_first_line_is_tried_again(monkeypatch):
    monkeypatch.setattr("gubs.serving.client._LONGEST_WAIT_S", 0.01)
    for got, error, requests in both((503, "unavailable"), [None], None, LINES):
        assert (got, error, len(requests)) == (LINES, None, 4)
    for got, error, requests in both((404, "unknown_user")):
        assert (got, error.status, error.problem.code, len(requests)) == ([], 404, "unknown_user", 1)


@pytest.mark.parametrize("lost", [None, httpx.Response(500, text="Internal Server Error")], ids=["proxy", "ingress"])
def test_what_a_lost_node_leaves_unanswered_is_tried_again(lost, monkeypatch):
    """Its proxy closes its connections; another one, without the guard, says 500 and no more if the ingress is lost."""
    monkeypatch.setattr("gubs.serving.client._LONGEST_WAIT_S", 0.01)
    served = Served(lost, httpx.Response(200, json=[]), lost, lost)
    client = Client("http://service", "key", retries=1)
    client._options["transport"] = served
    with client:
        assert client.groups() == []
        with pytest.raises(ServiceError) as error:
            client.groups()
    assert error.value.problem.retryable
    assert len(served.requests) == 4


@pytest.mark.parametrize(
    ("last", "code"),
    [([BROKEN], "timeout"), ([None], "unreachable"), ([], "unreachable")],
    ids=["told", "cut", "short"],
)
def test_what_fails_after_some_lines_is_an_error(last, code):
    """Asked again, the service would answer with the same lines once more."""
    for got, error, requests in both([*LINES[:2], *last]):
        assert (got, error.problem.code, error.problem.retryable, len(requests)) == (LINES[:2], code, True, 1)


def test_the_clients_are_in_the_package():
    assert (gubs.serving.Client, gubs.serving.AsyncClient) == (Client, AsyncClient)
    with pytest.raises(AttributeError):
        _ = gubs.serving.Server


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3), ("0.5", 0.5), ("", 0), ("soon", 0), ("Fri, 01 Jan 2021 00:00:00 GMT", 0)],
)
def test_retry_after_may_be_anything(header, seconds):
    assert _seconds(header) == seconds


def test_retry_after_may_be_a_date():
    assert 90 < _seconds(formatdate(time.time() + 100, usegmt=True)) <= 100
