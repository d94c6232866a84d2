"""GPTQ (Frantar et al. 2022): columns are rounded one after the other, and those not yet rounded make up for it.

The order is by importance, groups first and columns within their group: the groups stay where they are, so nothing is
gathered when the model runs. The scales of a group are searched when its turn comes, each column's error weighted by
what it will cost.
"""

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.scheme import WeightScheme
from batchinfer.quantize.inputs import Inputs
from batchinfer.quantize.rounding import Grid, stored_scale
from batchinfer.quantize.rtn import grouped

DAMPING = (0.01, 0.1, 1.0)
"""Added to the Hessian's diagonal, as a part of its mean: the first that leaves it positive in spite of rounding."""
_BLOCK = 128


def gptq(weight_NK: Tensor, scheme: WeightScheme, inputs: Inputs) -> QuantizedMatrix:
    """The weight in the scheme's whole numbers, so that its products with the inputs change least.

    A `ValueError` if the groups do not divide K, or weight or inputs are not finite.
    """
    groups_NGg = grouped(weight_NK, scheme)
    n, groups, size = groups_NGg.shape
    grid = Grid(scheme.bits)
    order, group_order = _order(inputs.mean_square, size)
    factor = _inverse_factor(inputs, order)
    # What rounding a column costs, once the columns after it have made up for what they can.
    cost = factor.diagonal().square().reciprocal()
    # The weight lies transposed, for whole columns are what is worked on.
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
    """(columns in the order of rounding [K], groups in that order [K / size])."""
    by_group = mean_square_K.view(-1, size)
    group_order = by_group.sum(1).argsort(descending=True, stable=True)
    within = by_group.argsort(dim=1, descending=True, stable=True)
    return (group_order[:, None] * size + within[group_order]).flatten(), group_order


def _inverse_factor(inputs: Inputs, order: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, float32 [K, K]."""
    for damping in DAMPING:
        matrix = inputs.hessian(order)
        diagonal = matrix.diagonal()
        diagonal += damping * diagonal.mean()
        # An input that was never anything but zero has nothing to say; any weight does.
        diagonal[diagonal == 0] = 1.0
        # In place throughout: there is hardly anything larger.
        if not torch.linalg.cholesky_ex(matrix, out=(matrix, torch.empty((), dtype=torch.int32))).info:
            torch.cholesky_inverse(matrix, out=matrix)
            torch.linalg.cholesky(matrix, upper=True, out=matrix)
            return matrix.float()
        inputs.notes.append(f"the products of its inputs are not positive with a damping of {damping}; more was added")
    raise ValueError("the products of its inputs are not positive: calibrate with more or other rows")
