"""The annotator: the language model in the role `annotator`, which all teacher jobs ask; and its failures."""

import collections
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import pyarrow as pa

from gubs.artifacts import JsonObject, Run
from gubs.llm.budget import CostEstimate
from gubs.llm.calls import Answer, LLMRequest, question
from gubs.llm.client import LLMClient
from gubs.llm.contract import Contract
from gubs.llm.journal import journal_folder
from gubs.llm.progress import OnProgress, llm_progress
from gubs.llm.settings import LLMSettings
from gubs.teachers.forms import PARSER

ROLE = "annotator"
Ask = Callable[[list[LLMRequest]], list[Answer]]
"""Returns answers in the order of the requests, as `LLMClient.ask` does."""

FAILURES = pa.schema(
    [
        pa.field("item", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("cause", pa.string(), nullable=False),
        ("error", pa.string()),
        ("text", pa.string()),
    ]
)
"""Requests without a usable answer. item: interaction or user id; label: the request's; text: the last answer."""


class Annotator:
    """A context manager. The client opens on first use; calls need a running Ray."""

    def __init__(self, run: Run, llm: LLMSettings, on_progress: OnProgress | None = None):
        self._run, self._settings, self._on_progress = run, llm, on_progress
        self._client: LLMClient | None = None
        self._contract = Contract(llm.contract)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client:
            self._client.close()

    @property
    def client(self) -> LLMClient:
        """The LLM client.

        Raises:
            SettingsError: the run is remote and `llm.journal` is not set, or a key is missing.
        """
        if self._client is None:
            self._client = LLMClient(self._settings, journal_folder(self._run), on_progress=self._on_progress)
        return self._client

    def ask(self, requests: list[LLMRequest]) -> list[Answer]:
        """Answers the requests; opens no client if there are none.

        Raises:
            IncompleteError: too many answers are missing, of all so far. What stops the client: see `LLMClient.stream`.
        """
        answers = self.client.ask(requests) if requests else []
        self._contract.check(answers)
        return answers

    def estimate(self, requests: Iterable[LLMRequest]) -> CostEstimate:
        """What the requests would cost; those that the journal answers are free."""
        return self.client.dry_run(requests)


@contextmanager
def annotator(run: Run, llm: LLMSettings) -> Iterator[Annotator]:
    """An annotator that shows its progress."""
    with llm_progress() as on_progress, Annotator(run, llm, on_progress) as opened:
        yield opened


def request_about(item: str, step: str, prompt: str, form: JsonObject) -> LLMRequest:
    """A request about an interaction or user (`item`), to be answered in one of `gubs.teachers.forms`."""
    return question(ROLE, f"{step}/{item}", prompt, schema=form, parser=PARSER, metadata={"item": item})


def failures(answers: Iterable[Answer]) -> pa.Table:
    """The answers that cannot be used, as rows of `FAILURES`; for requests made by `request_about`."""
    rows = [
        {"item": a.metadata["item"], "label": a.label, "cause": a.failure, "error": a.error, "text": a.text}
        for a in answers
        if not a.ok
    ]
    return pa.Table.from_pylist(rows, schema=FAILURES)


def by_cause(table: pa.Table) -> dict[str, int]:
    """Number of rows by `cause`, most frequent first."""
    return dict(collections.Counter(table["cause"].to_pylist()).most_common())


def in_words(failed: pa.Table) -> str:
    """Number of failures, and their causes."""
    causes = ", ".join(f"{cause} {n}" for cause, n in by_cause(failed).items())
    return f"{failed.num_rows:,} failures" + (f" ({causes})" if causes else "")
