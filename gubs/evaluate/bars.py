"""The stage `bars`: what baselines say about every target of the test users of IF-VR, recommenders among them.

Table `predictions` has a row per baseline and target, in the columns that stored predictions of models have too. No
baseline can be left out. Most name no reason of a skip: B stands for any skip, and they have neither figures about
reasons nor a reward. Those `by reward` have both, where reasons are known.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.artifacts import Run, StageJob
from gubs.console import progress
from gubs.data.ifvr import IFVR
from gubs.errors import ArtifactError
from gubs.evaluate.baselines import sasrec
from gubs.evaluate.baselines.targets import Chosen, Log, Scored, all_scored, chosen_by_reward
from gubs.evaluate.baselines.watched import asked_rows, facts, judged, scored_by_others, sequences
from gubs.evaluate.feedback import Floats
from gubs.evaluate.settings import EvalSettings, SasrecSettings
from gubs.records import Option, Task
from gubs.teachers.annotations import all_labels
from gubs.teachers.reasons import STAGE as LABELS
from gubs.teachers.script import GUESS

BARS, SASREC = "bars", "SASRec"
STORED = pa.schema(
    [
        pa.field("method", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("interaction_id", pa.string(), nullable=False),
        ("predicted", pa.string()),
        ("score", pa.float64()),
        ("play_rate", pa.float64()),
        ("clicked", pa.bool_()),
    ]
)
"""Stored predictions, by method, task and user. `predicted`: an option, null without a readable answer; `score`: grows
with P(skip), in the click task with P(no click); null if the predictor gives none."""


def make(job: StageJob, evaluate: EvalSettings, seed: int) -> str:
    """Fits every baseline on the training users and asks it about the test users' targets.

    Raises:
        ArtifactError: no task has both training and test users.
    """
    ifvr, tables, info = IFVR(job.run), [], {}
    golds = known_options(job.run) if job.reads(LABELS) else {}
    with progress("tasks") as on_progress:
        for done, task in enumerate(Task):
            on_progress(done, len(Task), str(task))
            log = Log(ifvr, task)
            if not ((log.targets & log.train).any() and (log.targets & log.test).any()):
                continue
            scored, test = all_scored(log)
            scored |= scored_by_others(log)
            scored[SASREC] = _sasrec(log, evaluate.sasrec, seed)
            chosen = chosen_by_reward(log, golds)
            tables += [_stored(s, task, test) for s in scored.values()]
            tables += [_stored(c, task, test) for c in chosen]
            info[str(task)] = {**_facts(log, scored), **facts(log), "by_reward": [c.method for c in chosen]}
    if not tables:
        raise ArtifactError(f"{ifvr.uri} has no task with both training and test users: see splits.test_users")
    with job.writing() as out:
        out.write_table("predictions", pa.concat_tables(tables))
        out.info = info
        out.summary = "; ".join(
            f"{task}: {facts['targets']:,} targets of {facts['users']:,} users, {facts['methods']} baselines"
            for task, facts in info.items()
        )
    return out.summary


def known_options(run: Run) -> dict[str, str]:
    """The options of a run's labels, by interaction, without guesses."""
    table = all_labels(run).select(["interaction_id", "option", "label_source"])
    return {r["interaction_id"]: r["option"] for r in table.to_pylist() if r["label_source"] != GUESS}


def _facts(log: Log, scored: Mapping[str, Scored]) -> dict[str, Any]:
    test = log.targets & log.test
    train_videos = np.unique(log.video[log.targets & log.train])
    return {
        "targets": int(test.sum()),
        "users": len(np.unique(log.user[test])),
        "training_targets": int((log.targets & log.train).sum()),
        "base_rate": float(log.bad[test].mean()),
        "videos_trained_on": float(np.isin(log.video[test], train_videos).mean()),
        "methods": len(scored),
        "thresholds": {name: s.threshold for name, s in scored.items()},
    }


def _sasrec(log: Log, settings: SasrecSettings, seed: int) -> Scored:
    """SASRec, trained on what users watched or clicked; how likely each target comes next."""
    watched, rows = sequences(log), asked_rows(log)
    model = sasrec.fit(watched, len(log.videos), settings, seed)
    return judged(SASREC, log, -next_log_probability(model, watched, log.user[rows], log.video[rows], settings))


def next_log_probability(
    model: Any, watched: sasrec.Sequences, user: Any, video: Any, settings: SasrecSettings
) -> Floats:
    """How likely each (user, video) is to come next after the user's sequence, [n]; by blocks of users."""
    users, codes = np.unique(user, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    likely, start, done = np.empty(len(user)), 0, 0
    for scores in sasrec.next_scores(model, [watched[u] for u in users], settings):
        stop = start + int(np.searchsorted(codes[order[start:]], done + len(scores)))
        rows = order[start:stop]
        log_z = np.log(np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1)) + scores.max(axis=1)
        likely[rows] = scores[codes[rows] - done, video[rows]] - log_z[codes[rows] - done]
        start, done = stop, done + len(scores)
    return likely


def _stored(answers: Scored | Chosen, task: Task, test: pa.Table) -> pa.Table:
    """One baseline's answers as a table of `STORED`."""
    n = test.num_rows
    options = (
        answers.options if isinstance(answers, Chosen) else np.where(answers.dropped, str(Option.B), str(Option.A))
    )
    columns = {
        "method": pa.array([answers.method] * n, pa.string()),
        "task": pa.array([str(task)] * n, pa.string()),
        "predicted": options,
        "score": answers.score,
    }
    columns |= {name: test[name] for name in ("user_id", "interaction_id", "play_rate", "clicked")}
    return pa.table({name: columns[name] for name in STORED.names}).cast(STORED)
