"""The frozen policy of the start, which GA-GRPO's KL divergence is measured from; on a GPU only while it is in use.

Between its uses the weights wait in host memory, in one pinned buffer: torch rounds each pinned allocation up to a
power of two, so 729 of them would take 29 GiB for the 15.4 GiB of a 7B model, and one takes 16.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gubs.ufm.trainer import release_cache

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

_ALIGNMENT = 256
"""Bytes; where each tensor begins in the buffer, as CUDA's own allocations do."""


class Reference:
    """The model inside a `with` block is on the device."""

    def __init__(self, model: "Qwen2_5_VLForConditionalGeneration", device: torch.device):
        """Takes the model over; on a GPU its weights move into the buffer."""
        self._model, self._device = model, device
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._offload = Offload(tensors, device, _pinned) if device.type == "cuda" else None

    def __enter__(self) -> "Qwen2_5_VLForConditionalGeneration":
        if self._offload:
            self._offload.fetch()
        return self._model

    def __exit__(self, *_: object) -> None:
        if self._offload:
            self._offload.leave()
            release_cache(self._device)


class Offload:
    """Tensors whose values wait in one buffer in host memory and go to a device, and back, as a whole."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device, allocate: Callable[[int], Tensor]):
        """Moves the values into the buffer.

        Args:
            tensors: parameters and buffers; their `data` is replaced.
            device: where `fetch` takes them.
            allocate: makes a buffer of so many bytes in host memory, (bytes,) uint8.
        """
        self._tensors, self._device = list(tensors), device
        ends = list(itertools.accumulate(_aligned(t.nbytes) for t in self._tensors))
        self._host = allocate(ends[-1] if ends else 0)
        self._begins = [0, *ends][: len(self._tensors)]
        for tensor, view in zip(self._tensors, self._views(self._host), strict=True):
            view.copy_(tensor.data)
            tensor.data = view

    def fetch(self) -> None:
        """Takes the values to the device, in one copy."""
        self._point_to(self._host.to(self._device, non_blocking=True, copy=True))

    def leave(self) -> None:
        """Frees the device's copy. The host's is as it was: nothing writes to the tensors."""
        self._point_to(self._host)

    def _point_to(self, buffer: Tensor) -> None:
        for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
            tensor.data = view

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[begin : begin + t.nbytes].view(t.dtype).view(t.shape)
            for begin, t in zip(self._begins, self._tensors, strict=True)
        ]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
