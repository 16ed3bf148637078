"""Supervised fine-tuning on one train worker: the teacher's examples, streamed by Ray Data, loss on the answer only.

The driver makes a stream of as many examples as the steps need, each epoch in its own order; every worker reads its own
shard of it. A resumed run sees the same batches and skips those already done.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from gubs.ufm.trainer import Trainer, Update, packed, reduce_max, reduce_sums

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A prompt with one or more answers to learn."""

    prompt: Encoded
    answers: list[tuple[list[int], list[float]]]
    """Tokens of each answer, and how much each token counts in the loss."""


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

    def __init__(self, job: Job, shard: Any, examples: int, settings: SFTSettings | None = None):
        """Loads the model.

        Args:
            job: see `Job`.
            shard: this rank's shard of the stream.
            examples: number of examples of all ranks.
            settings: of the training; None = those of SFT.
        """
        sft = settings or job.ufm.sft
        super().__init__(job, steps_of(examples, sft), sft.checkpoint)
        self.sft, self._shard = sft, shard
        self._share = models.attention(self.ufm.model) == "sdpa"  # see attention.py
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
        self.skipped(step, update.skipped, [{"ids": e.prompt.ids, "answers": e.answers} for e in examples])
        dropped = self.sft.batch // self.world_size - len(examples)
        return {
            **reduce_sums({"tokens/train": tokens, "dropped_too_long": dropped}, self.device),
            "loss": update.sums["loss"],
            "accuracy": update.sums["hits"] / max(1.0, update.sums["weight"]),
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
            "skipped": float(update.skipped),
        }

    def _update(self, examples: Sequence[Example], step: int) -> tuple[Update, int]:
        """The optimiser step, and how many tokens this rank computed."""
        sequences = [(e.prompt, ids) for e in examples for ids, _ in e.answers]
        token_weights = [w for e in examples for _, w in e.answers]
        parts = packed(sequences, self._share, self.sft.micro_tokens)
        batches = [self.inputs.collate([sequences[i] for i in part], share=self._share) for part in parts]
        weights = [[w for i in part for w in token_weights[i]] for part in parts]
        filler = examples[0].prompt if examples else self.inputs.nothing()
        missing = max(1, reduce_max(len(parts), self.device)) - len(batches)
        batches += [self.inputs.collate([(filler, ())])] * missing
        weights += [[]] * missing
        whole = reduce_sums({"weight": sum(map(sum, weights))}, self.device)["weight"]
        if not whole:
            raise SharedError(
                f"all examples of step {step} are longer than a rollout may be: raise ufm.inputs.max_prompt_tokens or "
                "max_new_tokens, or have shorter ones written (teachers.think_chars)"
            )

        def loss_of(logp: "Tensor", number: int) -> "tuple[Tensor, dict[str, Tensor]]":
            weight = logp.new_tensor(weights[number])
            hits = (logp.detach() > _HALF) * weight
            return -(weight * logp).sum() / whole, {"weight": weight.sum(), "hits": hits.sum()}

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
        size, count = self.sft.batch // self.world_size, 0
        for batch in self._shard.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=2):
            count += 1
            yield batch.to_pylist()
        if count < self.steps:
            raise ArtifactError(f"a shard of the SFT examples has {count} batches, not {self.steps}")

    def _encode(self, rows: Sequence[JsonObject]) -> list[Example]:
        """The examples whose prompt and answer are as short as a rollout allows."""
        examples = [e for e in map(self._example, rows) if e]
        self.inputs.compute_pixels(e.prompt for e in examples)
        return examples

    def _example(self, row: JsonObject) -> Example | None:
        """The example of a row; None if it is too long."""
        question = self.questions.about_user(Task(row["task"]), row["user_id"], row["video_id"])
        prompt, answer = self.inputs.encode(question), self.inputs.answer_ids(row["response"])
        if not self.inputs.fits(prompt) or len(answer) > self.ufm.inputs.max_new_tokens:
            return None
        return Example(prompt, [(answer, [1.0] * len(answer))])


_HALF = -0.6931
"""log 0.5: a token with more than that is certainly the greedy choice."""
