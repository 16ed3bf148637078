"""Supervised fine-tuning on one train worker: the teacher's examples, streamed by Ray Data, loss on the answer only.

Every worker reads its own shard of the stream; an epoch is shuffled with a seed of its own, so a resumed run sees the
same batches and passes over those it has done.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gubs.errors import ArtifactError
from gubs.records import Task
from gubs.ufm import model as models
from gubs.ufm.inputs import Encoded
from gubs.ufm.settings import CheckpointSettings, SFTSettings
from gubs.ufm.trainer import Trainer, micro_batches, most, reduce_sums
from gubs.ufm.worker import Job, Worker

Example = tuple[Encoded, list[int]]

COLUMNS = ("task", "user_id", "video_id", "response")
"""Columns of the teacher's examples that training reads."""


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    import ray.train

    return SFTWorker(config["job"], ray.train.get_dataset_shard("train"), config["examples"]).run()


def epochs_of(examples: int, sft: SFTSettings) -> int:
    """Passes over the examples: as set, more where that would be too few steps."""
    return max(sft.epochs, math.ceil(sft.min_steps / max(1, examples // sft.batch)))


def steps_of(examples: int, sft: SFTSettings) -> int:
    """Optimiser steps: whole batches of each epoch, one at least."""
    return epochs_of(examples, sft) * max(1, examples // sft.batch)


class SFTWorker(Worker):
    """One rank."""

    def __init__(self, job: Job, shard: Any, examples: int):
        """Loads the model.

        Args:
            job: see `Job`.
            shard: this rank's shard of the stream.
            examples: examples in all, over all ranks.
        """
        sft = job.settings.ufm.sft
        super().__init__(job, steps_of(examples, sft))
        self.sft, self._shard, self._examples = sft, shard, examples
        model = models.load(job.start, self.ufm.model, train=True)
        self.trainer = Trainer(model, self.ufm.model, sft.optimizer, self.steps, self.device, self.sees)
        self._batches: Iterator[list[Example]] = iter(())

    @property
    def checkpointing(self) -> CheckpointSettings:
        """When to write checkpoints."""
        return self.ufm.sft.checkpoint

    def begin(self, step: int) -> None:
        """Passes over the batches that were done before."""
        self._batches = self._stream(step)

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its figures."""
        with self.phases("waiting for data"):
            examples = next(self._batches)
        with self.phases("train"):
            update, tokens = self._update(examples, step)
        self.skipped(step, update.skipped, [{"ids": e.ids, "answer": a} for e, a in examples])
        count = max(1.0, update.sums.get("tokens", 1.0))
        return {
            "loss": update.sums["loss"],
            "accuracy": update.sums.get("hits", 0.0) / count,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            "tokens": float(tokens),
            "skipped": float(update.skipped),
        }

    def _update(self, examples: Sequence[Example], step: int) -> tuple[Any, int]:
        parts = micro_batches([len(e.ids) + len(a) for e, a in examples], self.sft.micro_tokens)
        batches = [self.inputs.collate([examples[i] for i in part]) for part in parts]
        batches += [self.inputs.collate([(examples[0][0], ())])] * (most(len(parts), self.device) - len(batches))
        counts = {"tokens": float(sum(int(b.response.sum()) for b in batches))}
        tokens = max(1.0, reduce_sums(counts, self.device)["tokens"])

        def loss_of(logp: Any, _: int) -> tuple[Any, dict[str, Any]]:
            loss = -logp.sum() / tokens
            return loss, {"tokens": logp.new_tensor(float(len(logp))), "hits": (logp.detach() > _HALF).sum()}

        return self.trainer.update(batches, loss_of, step), sum(b.tokens for b in batches)

    def _stream(self, done: int) -> Iterator[list[Example]]:
        """Batches of this rank, encoded a batch ahead in a thread."""
        mine = self.sft.batch // self.world
        with ThreadPoolExecutor(1, "encode") as pool:
            ahead = None
            for number, rows in enumerate(self._rows(mine)):
                if number < done:
                    continue
                following = pool.submit(self._encode, rows)
                if ahead:
                    yield ahead.result()
                ahead = following
            if ahead:
                yield ahead.result()

    def _rows(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """Rows of one batch after the other; what does not fill a batch at an epoch's end is left out."""
        per_epoch = max(1, self._examples // self.sft.batch)
        for _ in range(epochs_of(self._examples, self.sft)):
            given = 0
            for found in self._shard.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=2):
                if given < per_epoch:
                    given += 1
                    yield found.to_pylist()
            if given < per_epoch:
                raise ArtifactError(f"a shard of the SFT examples gave {given} batches, not {per_epoch}")

    def _encode(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        ask = self.questions
        return [
            (
                self.inputs.encode(ask.about_user(Task(r["task"]), r["user_id"], r["video_id"])),
                self.inputs.answer_ids(r["response"]),
            )
            for r in rows
        ]


_HALF = -0.6931
"""log 0.5: a token with more than that would be the greedy choice for sure."""
