"""Distillation: the policy learns to answer without a thought as it answers after its own thoughts.

Each target of a training user is asked several times at temperature 1. The mean of the options' probabilities at the
place of the letter, P(option | sampled thoughts), is what the policy then learns for the letter after an empty thought.
It keeps learning its own sampled answers too, so that its thoughts stay what they were.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import JsonObject
from gubs.console import progress
from gubs.records import Split, Task
from gubs.ufm.held_out import HeldOut
from gubs.ufm.inputs import Inputs
from gubs.ufm.labels import Labels
from gubs.ufm.predict import Predictor, Query
from gubs.ufm.questions import Item, Questions
from gubs.ufm.sampling import sample_seed
from gubs.ufm.settings import UFMSettings
from gubs.ufm.sft import Example, SFTWorker
from gubs.ufm.train_worker import Job

DISTIL = "distil"
TARGETS = pa.schema(
    [
        ("task", pa.string()),
        ("user_id", pa.string()),
        ("video_id", pa.string()),
        ("probabilities", pa.list_(pa.float64())),
        ("answers", pa.list_(pa.list_(pa.int32()))),
    ]
)
"""One row per target: mean probability of each option, in the task's order, and the sampled answers in token ids."""


def train_loop(config: JsonObject) -> JsonObject:
    """What Ray Train runs on every worker."""
    import ray.train

    return DistilWorker(config["job"], ray.train.get_dataset_shard("train"), config["examples"]).run()


def chosen_targets(questions: Questions, tasks: Collection[Task], ufm: UFMSettings, seed: int) -> list[Item]:
    """At most `ufm.distil.items` targets per task, of training users that are not held out, drawn at random."""
    chosen, held_out = [], HeldOut(ufm.held_out, seed)
    for number, task in enumerate(tasks):
        items = questions.items(task, Split.TRAIN, unexplained=True)
        items = [i for i in items if i.user_id not in held_out]
        order = np.random.default_rng([seed, 53, number]).permutation(len(items))[: ufm.distil.items]
        chosen += [items[i] for i in order]
    return chosen


def sampled(
    items: Sequence[Item], questions: Questions, folder: Path, ufm: UFMSettings, gpu: bool, seed: int
) -> pa.Table:
    """Asks the policy in `folder` about each item `ufm.distil.samples` times; returns a table of `TARGETS`.

    Answers that name no option are left out, and items without any other.
    """
    inputs, samples = Inputs(folder, ufm.inputs), ufm.distil.samples
    labels = {task: Labels.of(inputs, task) for task in Task}
    pictures = ufm.inputs.vision and questions.pictures
    shares: list[list[list[float]]] = [[] for _ in items]
    answers: list[list[tuple[int, ...]]] = [[] for _ in items]
    queries = (
        Query(number, prompt, sample_seed(seed, 1, number, "distil", k), 1.0, labels[item.task])
        for number, item in enumerate(items)
        for prompt in [questions.about_user(item.task, item.user_id, item.video_id)]
        for k in range(samples)
    )
    with (
        progress("sampled answers") as on_progress,
        Predictor(
            folder,
            ufm,
            pictures=pictures,
            largest=questions.largest,
            engines=ufm.workers.count if gpu else 1,
            gpu=gpu,
        ) as predictor,
    ):
        for done, prediction in enumerate(predictor.stream(queries), 1):
            if prediction.options and prediction.response:
                shares[prediction.key].append(list(prediction.options.options.values()))
                answers[prediction.key].append(prediction.response.ids)
            if done % 64 == 0:
                on_progress(done, len(items) * samples)
    rows = [
        {
            "task": str(item.task),
            "user_id": item.user_id,
            "video_id": item.video_id,
            "probabilities": np.mean(shares[i], axis=0).tolist(),
            "answers": [list(a) for a in answers[i]],
        }
        for i, item in enumerate(items)
        if shares[i]
    ]
    return pa.Table.from_pylist(rows, schema=TARGETS)


def targets_table(path: Path, make: Callable[[], pa.Table]) -> pa.Table:
    """The targets in a file; made and written first if an earlier attempt did not."""
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        pq.write_table(make(), temporary)
        temporary.rename(path)
    return pq.read_table(path, use_threads=False)


class DistilWorker(SFTWorker):
    """One rank: rows of `TARGETS` with a column `turn`, which says which of the sampled answers is learned."""

    def __init__(self, job: Job, shard: Any, examples: int):
        """Arguments as `SFTWorker`."""
        super().__init__(job, shard, examples, job.ufm.distil)
        self._labels = {task: Labels.of(self.inputs, task) for task in Task}

    def _example(self, row: JsonObject) -> Example | None:
        task = Task(row["task"])
        prompt = self.inputs.encode(self.questions.about_user(task, row["user_id"], row["video_id"]))
        if not self.inputs.fits(prompt):
            return None
        labels = self._labels[task]
        forced = [0.0] * len(labels.forced)
        answers = [
            ([*labels.forced, token], [*forced, share])
            for token, share in zip(labels.tokens, row["probabilities"], strict=True)
        ]
        written = row["answers"][row["turn"] % len(row["answers"])]
        weight = self.ufm.distil.keep / len(written)
        return Example(prompt, [*answers, (list(written), [weight] * len(written))])


def with_turns(table: pa.Table, order: Sequence[int]) -> pa.Table:
    """The rows in an order, each with the number of times it came before."""
    seen: dict[int, int] = {}
    turns = []
    for number in order:
        turns.append(seen.get(number, 0))
        seen[number] = turns[-1] + 1
    return table.take(order).append_column("turn", pa.array(turns, pa.int64()))
