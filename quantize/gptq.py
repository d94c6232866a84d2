"""GPTQ (Frantar et al. 2022): round columns one after the other, and let the columns that remain correct the error.

Groups are rounded in the order of their importance, and so are the columns within a group. The columns keep their
groups, so nothing must be reordered when the model runs. A group's scales are searched just before its columns are
rounded, with each column's error weighted by its cost.
"""

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.scheme import WeightScheme
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.rounding import Grid, stored_scale
from batchinfer.quantize.rtn import grouped

DAMPING = (0.01, 0.1, 1.0)
"""Fractions of the mean of the Hessian's diagonal that are added to the diagonal, tried in this order. The first with
which the rounded Hessian is positive definite is taken."""
_BLOCK = 128


def gptq(weight_NK: Tensor, scheme: WeightScheme, inputs: Inputs) -> QuantizedMatrix:
    """Quantize a weight so that its products with the inputs change as little as possible.

    Raises `ValueError` if the group size does not divide K, or if the weight or the inputs are not finite.
    """
    groups_NGg = grouped(weight_NK, scheme)
    n, groups, size = groups_NGg.shape
    grid = Grid(scheme.bits)
    order, group_order = _order(inputs.mean_square, size)
    factor = _inverse_factor(inputs, order)
    # The cost of rounding a column, after the columns that follow have corrected as much as they can.
    cost = factor.diagonal().square().reciprocal()
    # The weight is transposed, because the loop works on whole columns.
    left_KN = weight_NK.float().t()[order].contiguous()
    numbers_KN = torch.empty(left_KN.shape, dtype=torch.int8)
    scales = torch.empty(n, groups)
    for start, group in zip(range(0, len(order), size), group_order.tolist(), strict=True):
        end = start + size
        scale = stored_scale(grid.scales(left_KN[start:end].t(), cost[start:end]), scheme)[:, 0]
        scales[:, group] = scale
        for first in range(start, end, _BLOCK):
            last = min(first + _BLOCK, end)
            errors = torch.empty(last - first, n)
            for i in range(first, last):
                number = grid.round(left_KN[i], scale)
                numbers_KN[i] = number
                errors[i - first] = (left_KN[i] - number * scale) / factor[i, i]
                left_KN[i + 1 : last].addr_(factor[i, i + 1 : last], errors[i - first], alpha=-1)
            left_KN[last:].addmm_(factor[first:last, last:].t(), errors, alpha=-1)
    values_KN = torch.empty_like(numbers_KN)
    values_KN[order] = numbers_KN
    return QuantizedMatrix(values_KN.t().contiguous(), scales, (1, size), scheme.bits, scheme.activations)


def _order(mean_square_K: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return (columns in the order of rounding [K], groups in the order of rounding [K / size])."""
    by_group = mean_square_K.view(-1, size)
    group_order = by_group.sum(1).argsort(descending=True, stable=True)
    within = by_group.argsort(dim=1, descending=True, stable=True)
    return (group_order[:, None] * size + within[group_order]).flatten(), group_order


def _inverse_factor(inputs: Inputs, order: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse, float32 [K, K]."""
    for damping in DAMPING:
        matrix = inputs.hessian(order)
        diagonal = matrix.diagonal()
        diagonal += damping * diagonal.mean()
        # For an input channel that is always zero, any weight will do.
        diagonal[diagonal == 0] = 1.0
        # Everything is computed in place, because this matrix is one of the largest in memory.
        if not torch.linalg.cholesky_ex(matrix, out=(matrix, torch.empty((), dtype=torch.int32))).info:
            torch.cholesky_inverse(matrix, out=matrix)
            torch.linalg.cholesky(matrix, upper=True, out=matrix)
            return matrix.float()
        inputs.notes.append(f"its inputs' Hessian is not positive definite with damping {damping}; more was added")
    raise ValueError("its inputs' Hessian is not positive definite: calibrate with more or other rows")
