"""Round to nearest: the simplest quantization of weights."""

import torch
from torch import Tensor

from batchinfer.formats.matrix import FP8_MOST, QuantizedMatrix
from batchinfer.formats.scheme import WeightScheme
from batchinfer.quantize.rounding import Grid, stored_scale


def round_to_nearest(weight_NK: Tensor, scheme: WeightScheme, importance_K: Tensor | None = None) -> QuantizedMatrix:
    """Round a weight to the scheme's bits, with a scale per group or channel.

    Without `importance_K` the largest value of a group just fits. With it, scales are searched for the least squared
    error weighted by column. Ones minimize the error of the weights, and the inputs' mean squares the error of the
    products. FP8 ignores it, because its steps grow with the values. Raises `ValueError` if the group size does not
    divide K or if the weight is not finite.
    """
    groups = grouped(weight_NK, scheme)
    if scheme.floating:
        scale = groups.abs().amax(-1, keepdim=True).div_(FP8_MOST).clamp_(min=1e-10)
        scale = stored_scale(scale, scheme)
        values = (groups / scale).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
    else:
        grid = Grid(scheme.bits)
        weights = None if importance_K is None else importance_K.view(groups.shape[1:])
        scale = stored_scale(grid.scales(groups, weights), scheme)
        values = grid.round(groups, scale).to(torch.int8)
    n, k = weight_NK.shape
    return QuantizedMatrix(values.view(n, k), scale.view(n, -1), (1, groups.shape[-1]), scheme.bits, scheme.activations)


def grouped(weight_NK: Tensor, scheme: WeightScheme) -> Tensor:
    """Return the weight in groups of columns, float32 [N, groups, group size].

    Raises `ValueError` if the group size does not divide K or if the weight is not finite.
    """
    n, k = weight_NK.shape
    size = scheme.group_size or k
    if k % size:
        raise ValueError(f"group size {size} does not divide {k} columns; take a smaller one, or 0 for whole channels")
    if not bool(weight_NK.isfinite().all()):
        raise ValueError("the weight has values that are not finite")
    return weight_NK.float().view(n, k // size, size)
