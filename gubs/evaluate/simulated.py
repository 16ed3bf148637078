"""The stage `simulated`: language models as simulated users, on the same candidates as every baseline.

A user is asked about the whole list at once (list-wise) or item by item (point-wise); answers are joined by item id.
Whatever is not answered is counted by cause and wrong. Calls go through the LLM client: its journal holds every answer,
so that a run that is killed and continued asks nothing twice. Users are asked in blocks, so memory does not grow.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.artifacts import StageJob
from gubs.evaluate.baselines.choices import Answers
from gubs.evaluate.feedback import Feedback
from gubs.evaluate.metrics import choice_metrics
from gubs.evaluate.protocols import Candidates, from_table, training
from gubs.evaluate.public import (
    ANSWERS,
    CANDIDATES,
    METRIC,
    PUBLIC,
    answer_table,
    as_predictions,
    read_feedback,
    stored_protocols,
)
from gubs.evaluate.settings import EvalSettings, SimulateSettings
from gubs.evaluate.simulators import LIST_FORM, PARSER, POINT_FORM, RECALL_FORM, Form, Simulators, Strategy
from gubs.evaluate.verdicts import verdicts
from gubs.llm.calls import Answer, LLMRequest, question
from gubs.llm.client import LLMClient
from gubs.llm.contract import Contract
from gubs.llm.journal import journal_folder
from gubs.llm.progress import llm_progress
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.fields import inline
from gubs.records import Video

SIMULATED, ROLE = "simulated", "annotator"
THINGS = {"movielens": "films", "agent4rec": "films", "netflix": "films", "amazon": "books"}
THINGS |= {"mind": "news", "yelp": "places"}
_USERS = 100
"""Users asked about at once."""


def make(job: StageJob, evaluate: EvalSettings, llm: LLMSettings, seed: int, kind: str) -> str:
    """Asks the model as every strategy (tables `answers`, `metrics`, `verdicts`, `recall`).

    Errors: see `LLMClient.stream`; the journal keeps the answers received so far.
    """
    raw, manifest, bars = job.input("raw"), job.input(CANDIDATES), job.input(PUBLIC)
    feedback, settings = read_feedback(raw), evaluate.simulate
    videos = {v.video_id: v for v in Video.from_table(raw.table("videos"))}
    asked = _Asked(settings, llm, seed, THINGS.get(kind, "videos"), videos, kind)
    tables, metrics, verdict_rows, causes = [], [], [], {}
    with llm_progress() as on_progress, LLMClient(llm, journal_folder(job.run), on_progress=on_progress) as client:
        for protocol in stored_protocols(manifest):
            if settings.protocols and protocol.name not in settings.protocols:
                continue
            candidates = _first_users(from_table(manifest.table(CANDIDATES), feedback, protocol), settings.asked_users)
            rows = _bars_on(bars.table("answers"), candidates, feedback)
            for name, yes, counted in asked.rows(client, feedback, candidates):
                rows[name] = yes
                causes[f"{protocol.name}: {name}"] = dict(counted)
                tables.append(_table(name, yes, candidates, feedback))
                scored = choice_metrics(as_predictions(yes, candidates), resamples=evaluate.bootstrap, seed=seed)
                metrics += [{"protocol": protocol.name, "method": name, **asdict(m)} for m in scored]
            verdict_rows += _verdicts(rows, candidates, evaluate, seed)
        recall = asked.recall(client, feedback)
    with job.writing() as out:
        out.write_table("answers", pa.concat_tables(tables) if tables else ANSWERS.empty_table())
        out.write_table("metrics", pa.Table.from_pylist(metrics))
        out.write_table("verdicts", pa.Table.from_pylist(verdict_rows))
        out.write_table("recall", pa.Table.from_pylist(recall))
        recalled = sum(r["recalled"] for r in recall)
        out.info = {"causes": causes, "model": llm.model_of(ROLE), "recalled": recalled, "probed": len(recall)}
        out.summary = (
            "; ".join(f"{m['method']} {m['value']:.3f} ({m['protocol']})" for m in metrics if m["name"] == METRIC)
            + f"; {recalled} of {len(recall)} titles recalled from ids"
        )
    return out.summary


class _Asked:
    """What is asked of the model, and what its answers say."""

    def __init__(
        self,
        settings: SimulateSettings,
        llm: LLMSettings,
        seed: int,
        things: str,
        videos: dict[str, Video],
        source: str,
    ):
        unusable_counts = llm.contract.model_copy(update={"unusable": 1.0})  # as wrong answers, by cause
        self._settings, self._contract, self._seed = settings, Contract(unusable_counts), seed
        self._things, self._videos, self._source = things, videos, source

    def rows(
        self, client: LLMClient, feedback: Feedback, candidates: Candidates
    ) -> Iterator[tuple[str, list[bool | None], Counter[str]]]:
        """Name, answers [n] and causes of what is unanswered, of each strategy in each form."""
        simulators = Simulators(training(feedback, candidates), self._videos, self._things)
        for strategy in self._settings.strategies:
            for form in self._settings.forms:
                yes, causes = list[bool | None](), Counter[str]()
                for block in _blocks(candidates):
                    requests = list(self._requests(simulators, feedback, candidates, block, strategy, form))
                    answers = client.ask(requests)
                    self._contract.check(answers)
                    by_pair = dict[tuple[str, str], bool]()
                    for answer in answers:
                        causes.update(_read(answer, by_pair))
                    yes += [by_pair.get((str(candidates.user[k]), feedback.items[candidates.item[k]])) for k in block]
                yield f"{strategy}-style, {form}-wise", yes, causes

    def _requests(
        self,
        simulators: Simulators,
        feedback: Feedback,
        candidates: Candidates,
        block: range,
        strategy: Strategy,
        form: Form,
    ) -> Iterator[LLMRequest]:
        n = candidates.protocol.positives + candidates.protocol.negatives
        size = n if form == "list" else 1
        for start in range(block.start, block.stop, size):
            user = int(candidates.user[start])
            ids = [feedback.items[i] for i in candidates.item[start : start + size]]
            prompt = simulators.prompt(strategy, user, ids, candidates.protocol.contrast)
            yield question(
                ROLE,
                f"simulate/{strategy}/{form}/{feedback.users[user]}/{start}",
                prompt,
                schema=LIST_FORM if form == "list" else POINT_FORM,
                parser=PARSER,
                parser_args={"ids": ids},
                metadata={"user": str(user), "ids": ids},
            )

    def recall(self, client: LLMClient, feedback: Feedback) -> list[dict[str, Any]]:
        """Whether the model knows titles by the data set's ids: then its answers may rest on memory of the data."""
        titled = [i for i in feedback.items if i in self._videos and self._videos[i].title]
        n = min(self._settings.probes, len(titled))
        drawn = np.random.default_rng([self._seed, 29]).choice(len(titled), n, replace=False).tolist() if n else []
        requests = [
            question(
                ROLE,
                f"recall/{titled[k]}",
                fill("simulate/recall", things=self._things, source=self._source, id=inline(titled[k])),
                schema=RECALL_FORM,
                metadata={"id": titled[k]},
            )
            for k in drawn
        ]
        return [_recalled(a, self._videos[a.metadata["id"]].title or "") for a in client.ask(requests)]


def _read(answer: Answer, by_pair: dict[tuple[str, str], bool]) -> Counter[str]:
    """Adds what an answer says; returns how many items it leaves open, by cause, and how many ids it invents."""
    user, ids = answer.metadata["user"], answer.metadata["ids"]
    if not answer.ok:
        return Counter({answer.failure: len(ids)})
    by_pair.update({(user, item): yes for item, yes in answer.value["yes"].items()})
    counted = {
        "missing": len(answer.value["missing"]),
        "contradicted": len(answer.value["contradicted"]),
        "out_of_range": answer.value["unknown"],
    }
    return Counter({name: n for name, n in counted.items() if n})


def _recalled(answer: Answer, title: str) -> dict[str, Any]:
    answered = str(answer.value["title"]) if answer.ok else ""
    recalled = bool(_words(answered)) and _words(answered) == _words(title)
    return {
        "item_id": answer.metadata["id"],
        "title": title,
        "said": answered,
        "failure": answer.failure,
        "recalled": recalled,
    }


def _words(title: str) -> str:
    """A title without its year, case, article at the end, and punctuation."""
    text = re.sub(r"\(\d{4}\)\s*$", "", title).casefold()
    text = re.sub(r"^(.*), (the|a|an)\s*$", r"\2 \1", text.strip())
    return " ".join(re.findall(r"\w+", text))


def _first_users(candidates: Candidates, users: int) -> Candidates:
    """The candidates of the first `users` users; 0 = all."""
    n = candidates.protocol.positives + candidates.protocol.negatives
    stop = users * n or len(candidates)
    cut = {name: getattr(candidates, name)[:stop] for name in ("user", "item", "position", "positive")}
    return Candidates(candidates.protocol, **cut, facts=candidates.facts)


def _blocks(candidates: Candidates) -> Iterator[range]:
    size = _USERS * (candidates.protocol.positives + candidates.protocol.negatives)
    for start in range(0, len(candidates), size):
        yield range(start, min(start + size, len(candidates)))


def _bars_on(answers: pa.Table, candidates: Candidates, feedback: Feedback) -> dict[str, Sequence[bool | None]]:
    """What the baselines said about these candidates, by name."""
    frame = answers.to_pandas()
    frame = frame[frame["protocol"] == candidates.protocol.name]
    keys = [(feedback.users[u], feedback.items[i]) for u, i in zip(candidates.user, candidates.item, strict=True)]
    by_method: dict[str, Sequence[bool | None]] = {}
    for name, part in frame.groupby("method", sort=False):
        yes = dict(zip(zip(part["user_id"], part["item_id"], strict=True), part["yes"], strict=True))
        by_method[str(name)] = [bool(yes[key]) for key in keys]
    return by_method


def _table(name: str, yes: Sequence[bool | None], candidates: Candidates, feedback: Feedback) -> pa.Table:
    answers = Answers(name, "", None, np.array([bool(y) for y in yes]))
    table = answer_table(answers, candidates, feedback)
    return table.set_column(table.schema.get_field_index("yes"), "yes", pa.array(list(yes), pa.bool_()))


def _verdicts(
    rows: dict[str, Sequence[bool | None]], candidates: Candidates, evaluate: EvalSettings, seed: int
) -> list[dict[str, Any]]:
    """Every model row against every baseline."""
    models = [name for name in rows if name.endswith("-wise")]
    pairs = [(a, b) for a in models for b in rows if b not in models]
    predictions = {name: as_predictions(yes, candidates) for name, yes in rows.items()}
    compared = verdicts(predictions, pairs, METRIC, resamples=evaluate.bootstrap, seed=seed) if pairs else []
    return [{"protocol": candidates.protocol.name, **v.to_row()} for v in compared]
