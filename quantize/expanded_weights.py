"""`NamedWeights`: the tensors of a checkpoint, as the quantizer reads them; and `ExpandedWeights`, those of MXFP4."""

from typing import Protocol

import torch
from torch import Tensor

from batchinfer.formats.mxfp4 import BLOCK
from batchinfer.models.weights import SafetensorsWeights

_BLOCKS, _SCALES, _WEIGHT = "_blocks", "_scales", ".weight"


class NamedWeights(Protocol):
    """Tensors in floating point, by name."""

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises `ValueError` if it is missing."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a tensor. Raises `ValueError` if it is missing or damaged."""
        ...


class ExpandedWeights:
    """A checkpoint in MXFP4, whose blocks of 4-bit numbers are expanded to `dtype` when they are read.

    The numbers and their scales have few digits, so that bfloat16 holds them exactly.
    """

    def __init__(self, weights: SafetensorsWeights, dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted: a weight's where there are blocks and scales."""
        found = (name for name in self.weights.names() if not name.endswith(_SCALES))
        return sorted(name.removesuffix(_BLOCKS) + _WEIGHT if name.endswith(_BLOCKS) else name for name in found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises `ValueError` if it is missing."""
        if not self._in_blocks(name):
            return self.weights.shape(name)
        rows, *blocks = self.weights.shape(name.removesuffix(_WEIGHT) + _BLOCKS)
        return rows, blocks[0] * BLOCK

    def read(self, name: str) -> Tensor:
        """Return a tensor, expanded. Raises `ValueError` if it is missing or damaged."""
        if not self._in_blocks(name):
            return self.weights.read(name)
        rows, columns = self.shape(name)
        matrix = self.weights.matrix(name.removesuffix(_WEIGHT), (rows, columns))
        assert not isinstance(matrix, Tensor), "blocks are there"
        return matrix.dequantize().to(self.dtype)

    def _in_blocks(self, name: str) -> bool:
        return name.endswith(_WEIGHT) and self.weights.has(name.removesuffix(_WEIGHT) + _BLOCKS)
