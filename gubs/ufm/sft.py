"""Supervised fine-tuning on one train worker: the teacher's examples, streamed by Ray Data, loss on the answer only.

Every worker reads its own shard of the stream, which the driver made of as many examples as the steps need, each epoch
in an order of its own; a resumed run sees the same batches and passes over those it has done.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gubs.errors import ArtifactError
from gubs.records import Task
from gubs.ufm import model as models
from gubs.ufm.checkpoint import SharedError
from gubs.ufm.inputs import Encoded
from gubs.ufm.settings import CheckpointSettings, SFTSettings
from gubs.ufm.train_worker import Job, TrainWorker
from gubs.ufm.trainer import Trainer, micro_batches, most, reduce_sums

Example = tuple[Encoded, list[int]]

COLUMNS = ("task", "user_id", "video_id", "response")
"""Columns of the teacher's examples that training reads."""


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    import ray.train

    return SFTWorker(config["job"], ray.train.get_dataset_shard("train"), config["examples"]).run()


def steps_of(examples: int, sft: SFTSettings) -> int:
    """Optimiser steps of the epochs, more epochs where those make fewer than `min_steps`. A last batch that is not full
    is filled with examples that come once more.
    """
    epochs = max(sft.epochs, math.ceil(sft.min_steps * sft.batch / examples))
    return math.ceil(examples * epochs / sft.batch)


def order_of(examples: int, sft: SFTSettings, seed: int) -> list[int]:
    """Numbers of the examples as the steps take them: one shuffled epoch after the other, none left out."""
    rng, needed = np.random.default_rng([seed, 31]), steps_of(examples, sft) * sft.batch
    epochs = [rng.permutation(examples) for _ in range(math.ceil(needed / examples))]
    return [int(n) for n in np.concatenate(epochs)[:needed]]


class SFTWorker(TrainWorker):
    """One rank."""

    def __init__(self, job: Job, shard: Any, examples: int):
        """Loads the model.

        Args:
            job: see `Job`.
            shard: this rank's shard of the stream.
            examples: examples in all, over all ranks.
        """
        sft = job.ufm.sft
        super().__init__(job, steps_of(examples, sft))
        self.sft, self._shard = sft, shard
        with self.phases("load"):
            model = models.load(job.start, self.ufm.model, train=True)
            self.trainer = Trainer(model, self.ufm.model, sft.optimizer, self.steps, self.device, self.vision)
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
        dropped = float(self.sft.batch // self.world - len(examples))
        sums = reduce_sums({"tokens/train": float(tokens), "dropped_too_long": dropped}, self.device)
        count = max(1.0, update.sums.get("tokens", 1.0))
        return {
            **sums,
            "loss": update.sums["loss"],
            "accuracy": update.sums.get("hits", 0.0) / count,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            "skipped": float(update.skipped),
        }

    def _update(self, examples: Sequence[Example], step: int) -> tuple[Any, int]:
        parts = micro_batches([len(e.ids) + len(a) for e, a in examples], self.sft.micro_tokens)
        batches = [self.inputs.collate([examples[i] for i in part]) for part in parts]
        filler = examples[0][0] if examples else self.inputs.nothing()
        needed = max(1, most(len(parts), self.device))
        batches += [self.inputs.collate([(filler, ())])] * (needed - len(batches))
        counts = {"tokens": float(sum(int(b.response.sum()) for b in batches))}
        tokens = reduce_sums(counts, self.device)["tokens"]
        if not tokens:
            raise SharedError(
                f"all examples of step {step} are longer than a rollout may be: raise ufm.inputs.max_prompt_tokens or "
                "max_new_tokens, or have shorter ones written (teachers.think_chars)"
            )

        def loss_of(logp: Any, _: int) -> tuple[Any, dict[str, Any]]:
            loss = -logp.sum() / tokens
            return loss, {"tokens": logp.new_tensor(float(len(logp))), "hits": (logp.detach() > _HALF).sum()}

        return self.trainer.update(batches, loss_of, step), sum(b.tokens for b in batches)

    def _stream(self, done: int) -> Iterator[list[Example]]:
        """Batches of this rank, encoded a batch ahead in a thread."""
        mine = self.sft.batch // self.world
        with models.beside("encode", self.device) as pool:
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
        """Rows of one batch after the other."""
        given = 0
        for found in self._shard.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=2):
            given += 1
            yield found.to_pylist()
        if given < self.steps:
            raise ArtifactError(f"a shard of the SFT examples gave {given} batches, not {self.steps}")

    def _encode(self, rows: Sequence[dict[str, Any]]) -> list[Example]:
        """Those whose prompt and answer are as short as they have to be in a rollout."""
        ask, longest = self.questions, self.ufm.inputs.max_new_tokens
        made = [
            (
                self.inputs.encode(ask.about_user(Task(r["task"]), r["user_id"], r["video_id"])),
                self.inputs.answer_ids(r["response"]),
            )
            for r in rows
        ]
        kept = [(prompt, answer) for prompt, answer in made if self.inputs.fits(prompt) and len(answer) <= longest]
        self.inputs.compute_pixels(prompt for prompt, _ in kept)
        return kept


_HALF = -0.6931
"""log 0.5: a token with more than that would be the greedy choice for sure."""
