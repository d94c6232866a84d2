"""Copy steps between host and device without waiting: a batch in one copy, its sampled tokens in another."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchinfer.kernels.scores import StepScores
from batchinfer.models.batch import Batch

ALIGNMENT = 16  # bytes; Triton compiles a kernel for pointers aligned like this, if its first pointers were
T = TypeVar("T")


class Transfer:
    """Sends batches to the device through two pinned buffers: one is written while the other is still read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]
        self._read: list[torch.cuda.Event | None] = [None, None]  # events at which the device has read the buffers

    def send(self, batch: Batch) -> Batch:
        """Return a copy of the batch on the device, whose tensors are views of one new tensor."""
        tensors = tensors_of(batch)
        offsets = np.cumsum([0, *(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors)]).tolist()
        into = torch.empty(offsets[-1], dtype=torch.uint8, device=self.device)

        def write(host: NDArray[np.uint8]) -> None:
            for tensor, offset in zip(tensors, offsets, strict=False):
                values = tensor.numpy()
                np.ndarray(values.shape, values.dtype, host, offset)[...] = values

        self.copy(write, into)
        there = {
            id(tensor): view(into, offset, tensor.shape, tensor.dtype)
            for tensor, offset in zip(tensors, offsets, strict=False)
        }
        return with_tensors(batch, lambda tensor: there[id(tensor)])

    def copy(self, write: Callable[[NDArray[np.uint8]], None], into: Tensor) -> None:
        """Copy to `into` (uint8, on the device) what `write` puts into a buffer of at least that size."""
        read = self._read[0]
        # Ask first: a wait is a call to the driver, even for an event that has happened.
        if read is not None and not read.query():  # type: ignore[no-untyped-call]
            read.synchronize()
        host = self._host[0] = self._room(self._host[0], len(into))
        write(host.numpy())
        into.copy_(host[: len(into)], non_blocking=True)
        self._read[0] = _event(self.device)
        self._host.reverse()
        self._read.reverse()

    def _room(self, buffer: Tensor, size: int) -> Tensor:
        if len(buffer) >= size:
            return buffer
        return torch.empty(2 * size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def view(buffer: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a view of `buffer` (uint8) at byte `offset`, with this shape and dtype."""
    return buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


@dataclass(frozen=True)
class Sampled:
    """What a step has found, on its way to the host: tokens, whether their logits were finite, log-probabilities."""

    tokens: Tensor  # [r] int64
    finite: Tensor  # [r] bool
    scores: StepScores
    there: torch.cuda.Event | None  # happens when they arrive; None: they have

    @classmethod
    def fetch(cls, tokens: Tensor, finite: Tensor, scores: StepScores) -> "Sampled":
        """Begin to copy `tokens`, `finite` and `scores` from their device."""
        return cls(_to_host(tokens), _to_host(finite), with_tensors(scores, _to_host), _event(tokens.device))

    def wait(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Wait for the step to end; return (token ids [r], finite [r])."""
        if self.there is not None:
            self.there.synchronize()
        return self.tokens.numpy(), self.finite.numpy()


def _to_host(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor to the host; on the CPU it is copied too, because a replay overwrites it."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that happens when the device has done all work queued so far; None on the CPU."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def tensors_of(value: object) -> list[Tensor]:
    """Return all tensors of a batch, each once; their order depends only on the batch's structure."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(id(tensor), tensor)
        return tensor

    with_tensors(value, keep)
    return list(found.values())


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of a nested dataclass, tuple or dict with `change` applied to every tensor in it."""
    return cast(T, _changed(value, change))


def _changed(value: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _changed(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(_changed(part, change) for part in value)
    if isinstance(value, dict):
        return {key: _changed(part, change) for key, part in value.items()}
    return value
