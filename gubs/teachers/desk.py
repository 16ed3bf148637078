"""What the teachers' jobs share: the run, the settings, an LLM client that opens when it is needed, failures."""

import collections
import hashlib
from collections.abc import Callable, Iterable
from importlib import resources
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from gubs.artifacts import Run
from gubs.config import Settings
from gubs.llm import embedded
from gubs.llm.budget import Plan
from gubs.llm.calls import Answer, LLMRequest
from gubs.llm.client import LLMClient
from gubs.llm.progress import OnProgress
from gubs.llm.settings import EMBEDDED
from gubs.prompts.options import OPTION_TEXTS
from gubs.teachers.settings import TeacherSettings

Ask = Callable[[list[LLMRequest]], list[Answer]]
"""Answers in the order of the requests, as `LLMClient.ask` gives them."""

JOURNAL = "llm-journal"

FAILURES = pa.schema(
    [
        pa.field("item", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("cause", pa.string(), nullable=False),
        ("error", pa.string()),
        ("text", pa.string()),
    ]
)
"""Requests without a usable answer: interaction or user id, the request's label, cause, error, the last answer."""


class Desk:
    """A context manager around the jobs of one run. Ray has to be running once a call is to be made."""

    def __init__(self, run: Run, settings: Settings, teachers: TeacherSettings, on_progress: OnProgress | None = None):
        self.run, self.settings, self.teachers = run, settings, teachers
        self._on_progress = on_progress
        self._client: LLMClient | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client:
            self._client.close()

    @property
    def client(self) -> LLMClient:
        """The LLM client. Its journal lies in the run's folder where that is local and the settings name no other.

        Raises:
            SettingsError: the run is remote and `llm.journal` is not set, or a key is missing.
        """
        if self._client is None:
            journal = "" if "://" in self.run.uri else self.run.path(JOURNAL)
            self._client = LLMClient(self.settings.llm, journal, on_progress=self._on_progress)
        return self._client

    def ask(self, requests: list[LLMRequest]) -> list[Answer]:
        """Asks; no request, no client. Errors: see `LLMClient.stream`."""
        return self.client.ask(requests) if requests else []

    def plan(self, requests: Iterable[LLMRequest]) -> Plan:
        """What the requests would cost, without what the journal has."""
        return self.client.dry_run(requests)

    def recipe(self, role: str, *names: str) -> dict[str, Any]:
        """What decides a job's answers: the teacher settings of these names, the model and how it is asked."""
        recipe = {"seed": self.settings.seed, "teachers": self.teachers.model_dump(include={"author", *names})}
        if self.teachers.author == "script":
            return recipe
        llm = self.settings.llm
        endpoint = llm.endpoint_of(role)
        return {
            **recipe,
            "model": embedded.MODEL if endpoint == EMBEDDED else llm.endpoints[endpoint].model,
            "role": llm.role(role).model_dump(exclude={"endpoint", "max_tokens_field"}),
            "prompts": prompts_hash(),
        }


def prompts_hash() -> str:
    """Hash of the teachers' templates and of the options' texts."""
    folder = resources.files("gubs.prompts")
    files = sorted((f for f in folder.iterdir() if f.name.startswith("teach_")), key=lambda f: f.name)
    texts = [f.read_text(encoding="utf-8") for f in files] + [repr(OPTION_TEXTS)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def failures(answers: Iterable[Answer]) -> pa.Table:
    """The answers that cannot be used, as rows of `FAILURES`. Requests carry the item in their metadata."""
    rows = [
        {"item": a.metadata["item"], "label": a.label, "cause": a.failure, "error": a.error, "text": a.text}
        for a in answers
        if not a.ok
    ]
    return pa.Table.from_pylist(rows, schema=FAILURES)


def by_cause(table: pa.Table) -> dict[str, int]:
    """Number of rows by `cause`, most frequent first."""
    return dict(collections.Counter(table["cause"].to_pylist()).most_common())
