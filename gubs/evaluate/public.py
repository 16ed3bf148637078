"""The stages `candidates` and `public`: the "10 + 10" protocols on data of choices, with every baseline beside them.

`candidates` is the manifest: who is asked about what, in which order, how it was drawn, and the proof that it gives
nothing away. Its hash is the same wherever the same data, settings and seed are. `public` holds what each baseline
says, the figures and the verdicts; model rows answer the same candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.artifacts import Artifact, StageJob
from gubs.console import progress
from gubs.errors import InputError
from gubs.evaluate.baselines.choices import Answers, all_answers
from gubs.evaluate.feedback import IN_ORDER, Bools, Feedback, from_tables
from gubs.evaluate.metrics import Metric, Predictions, choice_metrics
from gubs.evaluate.protocols import (
    Candidates,
    Contrast,
    HeldOut,
    Protocol,
    digest,
    draw,
    from_table,
    protocols_for,
    to_table,
)
from gubs.evaluate.settings import EvalSettings
from gubs.evaluate.verdicts import Verdict, verdicts
from gubs.records import Task, Video

CANDIDATES, PUBLIC = "candidates", "public"
METRIC = "click_acc"
"""The metric that verdicts are about."""
ANSWERS = pa.schema(
    [
        pa.field("protocol", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("positive", pa.bool_(), nullable=False),
        ("score", pa.float64()),
        ("yes", pa.bool_()),
    ]
)
"""Table `answers`, by protocol, method and user; `yes` is null where a model gave no readable answer."""


def make_candidates(job: StageJob, evaluate: EvalSettings, seed: int) -> str:
    """Draws the candidates of every protocol that the data allow, and proves that they give nothing away.

    Raises:
        InputError: no protocol has a user with enough records.
    """
    feedback, settings = read_feedback(job.input("raw")), evaluate.public
    drawn, missing = [], {}
    for protocol in protocols_for(feedback, settings.each, settings.least_profile, available=settings.available):
        try:
            drawn.append(draw(feedback, protocol, settings.sampled_users, seed))
        except InputError as e:
            missing[protocol.name] = str(e)
    if not drawn:
        raise InputError("; ".join(missing.values()) or "no record of this data set is a choice")
    with job.writing() as out:
        out.write_table("candidates", to_table(drawn, feedback))
        out.info = {
            "digest": digest(drawn, feedback),
            "protocols": {c.protocol.name: {**asdict(c.protocol), **c.facts} for c in drawn},
            "left_out": missing,
            "users_with_tied_last_times": feedback.tied_users,
            "records_without_a_place": feedback.without_place,
            "users": len(feedback.users),
            "items": len(feedback.items),
            "records": len(feedback),
        }
        out.summary = f"{len(drawn)} protocols, {sum(map(len, drawn)):,} candidates, hash {out.info['digest']}"
    return out.summary


def make_public(job: StageJob, evaluate: EvalSettings, seed: int) -> str:
    """Answers every candidate by every baseline (tables `answers`, `metrics`, `verdicts`).

    Raises:
        InputError: the candidates do not stand the proof against the records.
    """
    raw, manifest = job.input("raw"), job.input(CANDIDATES)
    feedback = read_feedback(raw)
    videos = {v.video_id: v for v in Video.from_table(raw.table("videos"))}
    answers, metrics, verdict_rows = [], [], []
    with progress("protocols") as on_progress:
        protocols = stored_protocols(manifest)
        for done, protocol in enumerate(protocols):
            on_progress(done, len(protocols), protocol.name)
            candidates = from_table(manifest.table("candidates"), feedback, protocol)
            by_name = all_answers(feedback, candidates, videos, seed)
            answers += [answer_table(a, candidates, feedback) for a in by_name.values()]
            metrics += [row for a in by_name.values() for row in metric_rows(a, candidates, evaluate.bootstrap, seed)]
            verdict_rows += [
                {"protocol": protocol.name, **v.to_row()} for v in compared(by_name, candidates, evaluate, seed)
            ]
    with job.writing() as out:
        out.write_table("answers", pa.concat_tables(answers))
        out.write_table("metrics", pa.Table.from_pylist(metrics))
        out.write_table("verdicts", pa.Table.from_pylist(verdict_rows))
        out.info = {"digest": manifest.manifest.info["digest"]}
        best = {
            p.name: max((m for m in metrics if m["protocol"] == p.name and m["name"] == METRIC), key=_value)
            for p in protocols
        }
        out.summary = "; ".join(f"{name}: {m['method']} {m['value']:.3f}" for name, m in best.items())
    return out.summary


def read_feedback(raw: Artifact) -> Feedback:
    """The choices of the artifact `raw`."""
    parts = raw.table("parts") if "parts" in raw.manifest.tables else None
    items = raw.table("videos", ["video_id"])["video_id"].to_pylist()
    ordered = raw.manifest.settings["source"]["kind"] in IN_ORDER
    return from_tables(raw.table("interactions"), items, parts, ordered=ordered)


def stored_protocols(manifest: Artifact) -> list[Protocol]:
    """The protocols of the artifact `candidates`, in order."""
    fields = ("positives", "negatives", "least_profile", "available")
    return [
        Protocol(Contrast(facts["contrast"]), HeldOut(facts["held_out"]), **{name: facts[name] for name in fields})
        for facts in manifest.manifest.info["protocols"].values()
    ]


def answer_table(answers: Answers, candidates: Candidates, feedback: Feedback) -> pa.Table:
    """One baseline's answers as a table of `ANSWERS`."""
    n = len(candidates)
    return pa.table(
        {
            "protocol": pa.array([candidates.protocol.name] * n),
            "method": pa.array([answers.name] * n),
            "user_id": np.array(feedback.users)[candidates.user],
            "item_id": np.array(feedback.items)[candidates.item],
            "positive": candidates.positive,
            "score": pa.nulls(n, pa.float64()) if answers.score is None else answers.score,
            "yes": answers.yes,
        }
    ).cast(ANSWERS)


def as_predictions(yes: Sequence[bool | None] | Bools, candidates: Candidates) -> Predictions:
    """Answers in the form that the metrics read: A = yes."""
    letter = {True: "A", False: "B", None: None}
    return Predictions(
        user=[str(u) for u in candidates.user],
        gold=["A" if p else "B" for p in candidates.positive],
        predicted=[letter[None if y is None else bool(y)] for y in yes],
        task=Task.CLICK,
    )


def metric_rows(answers: Answers, candidates: Candidates, resamples: int, seed: int) -> list[dict[str, Any]]:
    """One row per metric, with its contract."""
    metrics: Sequence[Metric] = choice_metrics(as_predictions(answers.yes, candidates), resamples=resamples, seed=seed)
    return [{"protocol": candidates.protocol.name, "method": answers.name, **asdict(m)} for m in metrics]


def compared(
    answers: Mapping[str, Answers], candidates: Candidates, evaluate: EvalSettings, seed: int, rows: Sequence[str] = ()
) -> list[Verdict]:
    """Verdicts about the best baseline (or, if given, each of `rows`) against every other.

    Args:
        answers: by name.
        candidates: that they are about.
        evaluate: number of resamples.
        seed: of the resamples.
        rows: names to compare with all others.
    """
    predictions = {name: as_predictions(a.yes, candidates) for name, a in answers.items()}
    best = max(answers, key=lambda name: float((answers[name].yes == candidates.positive).mean()))
    pairs = [(a, b) for a in rows or [best] for b in answers if a != b]
    return verdicts(predictions, pairs, METRIC, resamples=evaluate.bootstrap, seed=seed)


def _value(metric: Mapping[str, Any]) -> float:
    return float(metric["value"])
