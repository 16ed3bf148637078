"""Supervised fine-tuning on one train worker: the teacher's examples, streamed by Ray Data, loss on the answer only.

The driver makes a stream of as many examples as the steps need, each epoch in its own order; every worker reads its own
shard of it. A resumed run sees the same batches and skips those already done.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gubs.artifacts import JsonObject
from gubs.errors import ArtifactError
from gubs.records import Task
from gubs.ufm import model as models
from gubs.ufm.checkpoint import SharedError
from gubs.ufm.inputs import Encoded
from gubs.ufm.settings import SFTSettings
from gubs.ufm.train_worker import Job, TrainWorker
from gubs.ufm.trainer import Trainer, Update, micro_batches, reduce_max, reduce_sums

if TYPE_CHECKING:
    from torch import Tensor

Example = tuple[Encoded, list[int]]

COLUMNS = ("task", "user_id", "video_id", "response")
"""Columns of the teacher's examples that training reads."""


def train_loop(config: JsonObject) -> JsonObject:
    """What Ray Train runs on every worker."""
    import ray.train

    return SFTWorker(config["job"], ray.train.get_dataset_shard("train"), config["examples"]).run()


def steps_of(examples: int, sft: SFTSettings) -> int:
    """Optimiser steps of the epochs; more epochs if they make fewer than `min_steps`. Repeated examples fill the last
    batch.
    """
    epochs = max(sft.epochs, math.ceil(sft.min_steps * sft.batch / examples))
    return math.ceil(examples * epochs / sft.batch)


def order_of(examples: int, sft: SFTSettings, seed: int) -> list[int]:
    """Numbers of the examples in the order of the steps: one shuffled epoch after the other, none left out."""
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
            examples: number of examples of all ranks.
        """
        sft = job.ufm.sft
        super().__init__(job, steps_of(examples, sft), sft.checkpoint)
        self.sft, self._shard = sft, shard
        with self.phases("load"):
            model = models.load(job.start, self.ufm.model, train=True)
            self.trainer = Trainer(model, self.ufm.model, sft.optimizer, self.steps, self.device, self.vision)
        self._batches: Iterator[list[Example]] = iter(())

    def begin(self, step: int) -> None:
        """Skips the batches that are already done."""
        self._batches = self._stream(step)

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its figures."""
        with self.phases("waiting for data"):
            examples = next(self._batches)
        with self.phases("train"):
            update, tokens = self._update(examples, step)
        self.skipped(step, update.skipped, [{"ids": e.ids, "answer": a} for e, a in examples])
        dropped = self.sft.batch // self.world - len(examples)
        return {
            **reduce_sums({"tokens/train": tokens, "dropped_too_long": dropped}, self.device),
            "loss": update.sums["loss"],
            "accuracy": update.sums["hits"] / max(1.0, update.sums["tokens"]),
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            "skipped": float(update.skipped),
        }

    def _update(self, examples: Sequence[Example], step: int) -> tuple[Update, int]:
        """The optimiser step, and how many tokens this rank computed."""
        parts = micro_batches([len(e.ids) + len(a) for e, a in examples], self.sft.micro_tokens)
        batches = [self.inputs.collate([examples[i] for i in part]) for part in parts]
        filler = examples[0][0] if examples else self.inputs.nothing()
        needed = max(1, reduce_max(len(parts), self.device))
        batches += [self.inputs.collate([(filler, ())])] * (needed - len(batches))
        tokens = reduce_sums({"tokens": sum(int(b.response.sum()) for b in batches)}, self.device)["tokens"]
        if not tokens:
            raise SharedError(
                f"all examples of step {step} are longer than a rollout may be: raise ufm.inputs.max_prompt_tokens or "
                "max_new_tokens, or have shorter ones written (teachers.think_chars)"
            )

        def loss_of(logp: "Tensor", _: int) -> "tuple[Tensor, dict[str, Tensor]]":
            sums = {"tokens": logp.new_tensor(float(len(logp))), "hits": (logp.detach() > _HALF).sum()}
            return -logp.sum() / tokens, sums

        return self.trainer.update(batches, loss_of, step), sum(b.tokens for b in batches)

    def _stream(self, done: int) -> Iterator[list[Example]]:
        """This rank's remaining batches; a thread encodes one batch ahead."""
        with models.background_thread("encode", self.device) as pool:
            ahead = None
            for rows in itertools.islice(self._rows(), done, None):
                following = pool.submit(self._encode, rows)
                if ahead:
                    yield ahead.result()
                ahead = following
            if ahead:
                yield ahead.result()

    def _rows(self) -> Iterator[list[JsonObject]]:
        """Rows of one batch after the other."""
        size, count = self.sft.batch // self.world, 0
        for batch in self._shard.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=2):
            count += 1
            yield batch.to_pylist()
        if count < self.steps:
            raise ArtifactError(f"a shard of the SFT examples has {count} batches, not {self.steps}")

    def _encode(self, rows: Sequence[JsonObject]) -> list[Example]:
        """The examples whose prompt and answer are as short as a rollout allows."""
        examples = []
        for row in rows:
            question = self.questions.about_user(Task(row["task"]), row["user_id"], row["video_id"])
            prompt, answer = self.inputs.encode(question), self.inputs.answer_ids(row["response"])
            if self.inputs.fits(prompt) and len(answer) <= self.ufm.inputs.max_new_tokens:
                examples.append((prompt, answer))
        self.inputs.compute_pixels(prompt for prompt, _ in examples)
        return examples


_HALF = -0.6931
"""log 0.5: a token with more than that is certainly the greedy choice."""
