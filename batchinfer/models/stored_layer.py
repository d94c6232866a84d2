"""From the tensors of a checkpoint to the weights that a layer computes with, as `models/layer.py` describes both."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.kernels.norm import LayerNorm, NormWeights
from batchinfer.models.tensors import Matrix, Norm

Weight = TypeVar("Weight", Tensor, QuantizedMatrix, Tensor | QuantizedMatrix)


def weight_of(matrix: Matrix, module: Weight) -> Weight:
    """Return the matrix's weight [rows, columns], taken from that of its module [stored rows, columns]."""
    if not matrix.stored_otherwise:
        return module
    weight = module[rows_of(matrix)]
    if matrix.factor == 1.0:
        return weight
    return (weight.float() if isinstance(weight, Tensor) else weight) * matrix.factor


def bias_of(matrix: Matrix, module_bias: Tensor) -> Tensor:
    """Return the matrix's bias [rows], taken from that of its module [stored rows]."""
    bias = module_bias[rows_of(matrix)]
    return bias if matrix.factor == 1.0 else bias.float() * matrix.factor


def norm_weights(
    norm: Norm, read: Callable[[str, tuple[int, ...]], Tensor], dtype: torch.dtype, device: torch.device
) -> NormWeights:
    """Return a norm's weights on the device: in `dtype`, or in float32 if they are not what is stored.

    They are [size], or [heads, size] if each head has its own. `read(name, shape)` returns a tensor of the checkpoint.
    """

    def stored(kind: str, missing: float) -> Tensor:
        tensors = [read(name, norm.shape) for name in norm.names(kind)]
        whole = torch.cat(tensors).view(shape) if tensors else torch.full(shape, missing)
        if norm.order is not None:
            whole = whole.view(-1, len(norm.order))[:, list(norm.order)].view(shape)
        return whole.to(device, torch.float32 if changed else dtype)

    shape = (norm.size,) if norm.heads is None else (norm.heads, norm.size)
    changed = norm.added != 0.0 or norm.factor != 1.0
    weight = (stored("weight", 1.0) + norm.added) * norm.factor
    return LayerNorm(weight, stored("bias", 0.0) * norm.factor) if norm.centered else weight


def rows_of(matrix: Matrix) -> slice | Tensor:
    """Return the rows of the module that are the matrix's, in its order."""
    if matrix.order is None:
        return slice(matrix.first, matrix.first + matrix.rows * matrix.step, matrix.step)
    size = len(matrix.order)
    heads = matrix.first + torch.arange(matrix.rows // size) * (matrix.head_rows or size)
    return (heads[:, None] + torch.tensor(matrix.order)).flatten()
