"""SASRec (Kang and McAuley 2018): self-attention over a user's latest items predicts the next one.

Trained with the cross-entropy over all items instead of one sampled negative: on catalogues of this size that costs
little and needs no sampler. Ray Train runs `train_worker` on one or more workers (DDP); a row is a window of a user's
items. Every worker cuts all windows alike and takes its part of each batch: so all take equally many steps, as DDP
needs, and several workers do what one does.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gubs.evaluate.settings import SasrecSettings

if TYPE_CHECKING:
    import torch

Rows = npt.NDArray[np.int64]
Sequences = Sequence[Rows]
"""A user's items in order, as numbers from 0."""
_SCORED = 256
"""Users scored at once."""


@cache
def model_class() -> "type[torch.nn.Module]":
    """The module's class; made when torch is needed, so that importing this file stays light."""
    from torch import Tensor, arange, nn

    class SASRec(nn.Module):
        """Items (b, n), 0 = padding on the left, to hidden states (b, n, width)."""

        def __init__(self, items: int, settings: SasrecSettings):
            super().__init__()
            self.item = nn.Embedding(items + 1, settings.width, padding_idx=0)
            self.place = nn.Embedding(settings.length, settings.width)
            nn.init.normal_(self.item.weight, std=settings.width**-0.5)
            nn.init.normal_(self.place.weight, std=settings.width**-0.5)
            layer = nn.TransformerEncoderLayer(
                settings.width,
                settings.heads,
                settings.width,
                settings.dropout,
                activation="relu",
                batch_first=True,
                norm_first=True,
            )
            self.blocks = nn.TransformerEncoder(layer, settings.blocks, nn.LayerNorm(settings.width), False)
            self.dropout = nn.Dropout(settings.dropout)

        def forward(self, items: Tensor) -> Tensor:
            n = items.shape[1]
            hidden = self.item(items) * self.item.embedding_dim**0.5 + self.place(arange(n, device=items.device))
            later = nn.Transformer.generate_square_subsequent_mask(n, device=items.device, dtype=hidden.dtype)
            return self.blocks(self.dropout(hidden), mask=later, is_causal=True)

        def scores(self, hidden: Tensor) -> Tensor:
            """Scores of all items, number 1 first."""
            return hidden @ self.item.weight[1:].T

    return SASRec


def rows_of(sequences: Sequences, length: int) -> npt.NDArray[np.int64]:
    """The latest `length` items of each sequence, numbers from 1, padded with 0 on the left; [U, length]."""
    rows = np.zeros((len(sequences), length), dtype=np.int64)
    for row, items in zip(rows, sequences, strict=True):
        latest = items[-length:]
        row[length - len(latest) :] = latest + 1
    return rows


def windows(sequences: Sequences, length: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """All sequences cut into rows of `length` items, at another place every time; each item is in one row, except that
    a row begins with the last item of the row before, so that every item but the first is predicted once. [n, length]
    """
    cut, step = [], length - 1
    for items in sequences:
        first = len(items) if len(items) <= length else 2 + int(rng.integers(step))
        stops = [*range(first, len(items), step), len(items)]
        starts = [0, *(stop - 1 for stop in stops[:-1])]
        cut += [items[start:stop] for start, stop in zip(starts, stops, strict=True)]
    return rows_of([c for c in cut if len(c) > 1], length)


def train_worker(config: dict[str, Any]) -> bytes:
    """One Ray Train worker: trains on its part of every batch; returns the weights, which all workers share."""
    import ray
    import ray.train.torch
    from ray import train

    context = train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.prepare_model)
    sequences = ray.get(config["sequences"][0])
    *_, last = training(sequences, config["items"], config["settings"], config["seed"], place)
    return to_bytes(last[0])


@dataclass(frozen=True)
class Place:
    """One worker among several."""

    rank: int = 0
    workers: int = 1
    wrap: "Callable[[torch.nn.Module], torch.nn.Module]" = lambda model: model
    """Makes the model one of several workers' models, whose gradients are averaged."""


def shares(rows: int, batch: int, place: Place, rng: np.random.Generator) -> Iterator[tuple[Rows, Rows, bool]]:
    """The rows of each batch, this worker's among them, and whether these count: all workers get equally many batches,
    so a worker without a row in a batch gets one that does not count.

    Args:
        rows: of all workers together.
        batch: rows of a step, of all workers together.
        place: the worker.
        rng: in the same state on every worker.
    """
    order = rng.permutation(rows)
    for start in range(0, rows, batch):
        whole = order[start : start + batch]
        own = whole[place.rank :: place.workers]
        yield (whole, own, True) if len(own) else (whole, whole[:1], False)


def training(
    sequences: Sequences, items: int, settings: SasrecSettings, seed: int, place: Place | None = None
) -> "Iterator[tuple[torch.nn.Module, float]]":
    """Trains a model; yields it after every epoch with the mean loss. Without a sequence of two items it stays as it
    was drawn.

    Args:
        sequences: of all training users, the same on every worker.
        items: size of the catalogue.
        settings: sizes and optimiser.
        seed: of weights, order and dropout.
        place: the worker; default: there is one.
    """
    import torch

    place = place or Place()
    torch.manual_seed(seed)
    model: Any = model_class()(items, settings)
    wrapped = place.wrap(model)
    if place.rank:
        torch.manual_seed(seed + place.rank)  # workers drop out other units of other rows
    optimizer = torch.optim.Adam(model.parameters(), settings.lr, betas=(0.9, 0.98))
    rng = np.random.default_rng(seed)
    for _ in range(settings.epochs):
        wrapped.train()
        losses, data = [], torch.from_numpy(windows(sequences, settings.length + 1, rng))
        for whole, own, counted in _batches(data, settings.batch, place, rng):
            batch = own.to(next(model.parameters()).device)
            seen, following = batch[:, :-1], batch[:, 1:]
            wanted = (seen > 0) & (following > 0)
            logits = model.scores(wrapped(seen)[wanted])
            total = torch.nn.functional.cross_entropy(logits, following[wanted] - 1, reduction="sum")
            # DDP averages over the workers; so the mean over all items of the batch is this part of it:
            loss = total * (counted * place.workers / whole)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        yield model, float(torch.stack(losses).mean()) if losses else float("nan")


def _batches(
    data: "torch.Tensor", batch: int, place: Place, rng: np.random.Generator
) -> "Iterator[tuple[int, torch.Tensor, bool]]":
    """Per step: how many items all workers predict, this worker's windows, and whether they count. What is padding in
    all windows of all workers is cut off, since places are counted from there.
    """
    predicted = ((data[:, :-1] > 0) & (data[:, 1:] > 0)).sum(dim=1)
    for rows, own, counted in shares(len(data), batch, place, rng):
        yield int(predicted[rows].sum()), data[own][:, _first(data[rows]) :], counted


def _first(batch: "torch.Tensor") -> int:
    """The first column in which some row has an item."""
    return int((batch > 0).any(dim=0).int().argmax())


def to_bytes(model: "torch.nn.Module") -> bytes:
    """The weights of a model."""
    import torch

    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


def from_bytes(weights: bytes, items: int, settings: SasrecSettings) -> "torch.nn.Module":
    """The model that `to_bytes` wrote."""
    import torch

    model = model_class()(items, settings)
    model.load_state_dict(torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True))
    return model


def next_scores(
    model: "torch.nn.Module", sequences: Sequences, settings: SasrecSettings
) -> Iterator[npt.NDArray[np.float32]]:
    """Scores of all items after each sequence, by blocks of users: [b, items]; a user without items gets zeros."""
    import torch

    model.eval()
    for start in range(0, len(sequences), _SCORED):
        rows = torch.from_numpy(rows_of(sequences[start : start + _SCORED], settings.length))
        rows = rows[:, _first(rows) :]
        with torch.no_grad():
            scores = model.scores(model(rows)[:, -1])  # type: ignore[operator]
        scores[(rows == 0).all(dim=1)] = 0.0
        yield scores.numpy()


def fit(sequences: Sequences, items: int, settings: SasrecSettings, seed: int) -> "torch.nn.Module":
    """Trains SASRec on Ray Train; Ray has to be running.

    Args:
        sequences: of the training users, each at least two items long to count.
        items: size of the catalogue.
        settings: sizes, optimiser and workers.
        seed: of everything random.
    """
    from tempfile import TemporaryDirectory

    import ray
    from ray.train.v2.api.config import RunConfig, ScalingConfig

    from gubs.ufm.attempts import RayTrainer

    config = {
        "sequences": [ray.put([s for s in sequences if len(s) > 1])],
        "items": items,
        "settings": settings,
        "seed": seed,
    }
    gpu = ray.cluster_resources().get("GPU", 0) >= settings.sasrec_workers
    scaling = ScalingConfig(num_workers=settings.sasrec_workers, use_gpu=gpu)
    with TemporaryDirectory(prefix="gubs-sasrec-") as folder:
        run_config: Any = RunConfig(name="sasrec", storage_path=folder)
        loop: Any = train_worker  # Ray's annotation allows no result, its trainer does
        trainer = RayTrainer(loop, train_loop_config=config, scaling_config=scaling, run_config=run_config)
        result: Any = trainer.fit()
    return from_bytes(result.return_value, items, settings)
