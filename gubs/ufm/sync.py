"""Weight sync: sends the trainer's weights to the rollout engine, without a checkpoint in between.

Steps of a sync: the manifest (names, shapes, dtypes) is checked against the first one -> the tensors are put where the
engine can see them (GPU: CUDA IPC handles of the storages that they lie in; CPU: Ray's object store, shared memory that
the engine maps) -> the engine loads them and empties its caches -> the version goes up, and every answer carries it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gubs.errors import GubsError

if TYPE_CHECKING:
    import numpy as np
    from ray.actor import ActorHandle
    from transformers import Qwen2_5_VLForConditionalGeneration

    from gubs.ufm.rollout import Engine

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


class SyncError(GubsError):
    """The weights that are sent are not the ones the engine expects."""

    exit_code = 6


@dataclass(frozen=True)
class Entry:
    """Shape and type of one weight."""

    shape: tuple[int, ...]
    dtype: str


Manifest = Mapping[str, Entry]


def weights_of(model: "Qwen2_5_VLForConditionalGeneration") -> dict[str, Tensor]:
    """A model's weights by the names of its checkpoint; a tied head is listed too."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    weights.setdefault(HEAD, weights[EMBEDDING])
    return weights


def manifest_of(weights: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The manifest of weights."""
    return {name: Entry(tuple(w.shape), str(w.dtype)) for name, w in weights.items()}


def check(expected: Manifest, names: list[str], sent: Manifest) -> None:
    """Refuses weights that are not exactly the expected ones.

    Args:
        expected: manifest of the checkpoint that the engine was started from.
        names: names in the order in which they are sent, to find repeated ones.
        sent: manifest of what is sent.

    Raises:
        SyncError: missing, repeated or unexpected names, another shape or dtype.
    """
    problems = [f"{n} is sent twice" for n in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"{n} is missing" for n in sorted(set(expected) - set(sent))]
    problems += [f"{n} is unexpected" for n in sorted(set(sent) - set(expected))]
    shared = sorted(set(sent) & set(expected))
    problems += [f"{n} is {sent[n]}, not {expected[n]}" for n in shared if sent[n] != expected[n]]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SyncError(f"weights do not fit the engine's model: {problems[0]}{more}; nothing was sent")


class WeightSync:
    """Sends weights from one trainer to its engine."""

    def __init__(
        self,
        model: "Qwen2_5_VLForConditionalGeneration",
        engine: "ActorHandle[Engine]",
        timeout_s: float,
        version: int = 0,
    ):
        """Remembers what the engine was started with.

        Args:
            model: the trainer's model, as loaded from the checkpoint that the engine was started from.
            engine: handle of the `Engine` actor.
            timeout_s: longest time a sync may take.
            version: of the weights that were sent last.
        """
        self._expected = manifest_of(weights_of(model))
        self._engine, self._timeout_s = engine, timeout_s
        self.version = version

    def push(self, model: "Qwen2_5_VLForConditionalGeneration") -> int:
        """Sends the model's weights; returns their version.

        Raises:
            SyncError: they are not the expected ones; the engine keeps the old weights.
            ray.exceptions.GetTimeoutError: the engine did not finish in time.
        """
        import ray

        weights = weights_of(model)
        check(self._expected, list(weights), manifest_of(weights))
        pack = packed(weights)
        missing: list[str] = ray.get(self._engine.receive.remote(pack, self.version + 1), timeout=self._timeout_s)
        if missing:
            raise SyncError(f"the engine's model also needs {missing[0]}, which was not sent")
        self.version += 1
        return self.version


class Pack(Protocol):
    """Weights in transit."""

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The weights by name, as tensors in the receiving process, not copied."""


@dataclass(frozen=True)
class SharedPack:
    """Weights on a CPU: numpy arrays, which Ray maps from shared memory."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    arrays: "tuple[np.ndarray, ...]"

    def tensors(self) -> list[tuple[str, Tensor]]:
        """See `Pack`."""
        tensors = (torch.from_numpy(a).view(getattr(torch, d)) for a, d in zip(self.arrays, self.dtypes, strict=True))
        return list(zip(self.names, tensors, strict=True))


@dataclass(frozen=True)
class Place:
    """Where a weight lies."""

    name: str
    storage: int
    """Number of its storage in the pack."""
    dtype: str
    offset: int
    """In its own elements."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def within(self, storage: Tensor) -> Tensor:
        """The weight as a view of its storage."""
        empty = torch.empty(0, dtype=getattr(torch, self.dtype), device=storage.device)
        return empty.set_(storage.untyped_storage(), self.offset, self.shape, self.stride)


Handle = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""What rebuilds a tensor from its IPC handle."""


@dataclass(frozen=True)
class HandlePack:
    """Weights on a GPU: CUDA IPC handles of their storages. ZeRO-2 keeps all weights that it trains as views of one
    storage: one handle is opened instead of one per weight.
    """

    storages: tuple[Handle, ...]
    """Each as a tensor of bytes."""
    places: tuple[Place, ...]

    def tensors(self) -> list[tuple[str, Tensor]]:
        """See `Pack`."""
        here = torch.cuda.current_device()
        opened = [rebuild(*_on(here, arguments)) for rebuild, arguments in self.storages]
        return [(place.name, place.within(opened[place.storage])) for place in self.places]


_DEVICE = 6
"""Place of the device among the arguments that rebuild a tensor from its IPC handle."""


def _on(device: int, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Renumbers the device for the receiver: an engine sees only one GPU, a trainer sees all of them."""
    return (*arguments[:_DEVICE], device, *arguments[_DEVICE + 1 :])


def packed(weights: Mapping[str, Tensor]) -> Pack:
    """Weights on their way to another process; on a GPU they must stay where they are until it has loaded them."""
    return _handles(weights) if next(iter(weights.values())).is_cuda else _shared(weights)


def _shared(weights: Mapping[str, Tensor]) -> SharedPack:
    """Numpy has no bfloat16: 16-bit types travel as int16, bit for bit."""
    arrays = [(w.view(torch.int16) if w.element_size() == 2 else w).contiguous().numpy() for w in weights.values()]
    return SharedPack(tuple(weights), tuple(map(_name, weights.values())), tuple(arrays))


def _handles(weights: Mapping[str, Tensor]) -> HandlePack:
    """Finds the storages, and where in them the weights are."""
    from torch.multiprocessing.reductions import reduce_tensor

    storages: dict[int, tuple[int, Handle]] = {}
    places = []
    for name, weight in weights.items():
        storage = weight.untyped_storage()
        if storage.data_ptr() not in storages:
            whole = torch.empty(0, dtype=torch.uint8, device=weight.device).set_(storage)
            storages[storage.data_ptr()] = len(storages), reduce_tensor(whole)
        number, _ = storages[storage.data_ptr()]
        places.append(
            Place(
                name, number, _name(weight), int(weight.storage_offset()), tuple(weight.shape), tuple(weight.stride())
            )
        )
    return HandlePack(tuple(handle for _, handle in storages.values()), tuple(places))


def _name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
