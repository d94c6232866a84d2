"""From the tensors of a checkpoint to the weights that a layer computes with, as `models/layer.py` describes both."""

from typing import TypeVar

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.models.layer import Matrix, Norm

Weight = TypeVar("Weight", Tensor, QuantizedMatrix, Tensor | QuantizedMatrix)


def weight_of(matrix: Matrix, module: Weight) -> Weight:
    """Return the matrix's weight [rows, columns], taken from that of its module [stored rows, columns]."""
    if not matrix.stored_otherwise:
        return module
    weight = module[_rows(matrix)]
    if matrix.factor == 1.0:
        return weight
    return (weight.float() if isinstance(weight, Tensor) else weight) * matrix.factor


def bias_of(matrix: Matrix, module_bias: Tensor) -> Tensor:
    """Return the matrix's bias [rows], taken from that of its module [stored rows]."""
    bias = module_bias[_rows(matrix)]
    return bias if matrix.factor == 1.0 else bias.float() * matrix.factor


def norm_weight(norm: Norm, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a norm's weight [size]: in `dtype`, or in float32 if it is not what is stored."""
    weight = stored if norm.order is None else stored.view(-1, len(norm.order))[:, list(norm.order)].flatten()
    if norm.added or norm.factor != 1.0:
        return (weight.float() + norm.added) * norm.factor
    return weight.to(dtype)


def _rows(matrix: Matrix) -> slice | Tensor:
    """Return the rows of the module that are the matrix's, in its order."""
    if matrix.order is None:
        return slice(matrix.first, matrix.first + matrix.rows)
    size = len(matrix.order)
    heads = matrix.first + torch.arange(matrix.rows // size) * (matrix.head_rows or size)
    return (heads[:, None] + torch.tensor(matrix.order)).flatten()
