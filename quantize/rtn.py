"""Round to nearest: the plain quantization of weights."""

import torch
from torch import Tensor

from batchinfer.quantize.matrix import QuantizedMatrix
from batchinfer.quantize.rounding import Grid
from batchinfer.quantize.scheme import WeightScheme

FP8_MOST = torch.finfo(torch.float8_e4m3fn).max


def quantize_channels(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits per output channel, symmetric: (int8 [N, K], scale float32 [N]) with weight about int8 * scale."""
    weight = weight_NK.to(torch.float32, copy=True)
    scale = weight.abs().amax(-1).div_(127.0).clamp_(min=1e-30)
    return weight.div_(scale[:, None]).round_().to(torch.int8), scale


def round_to_nearest(weight_NK: Tensor, scheme: WeightScheme, clip: bool = False) -> QuantizedMatrix:
    """The weight in the scheme's bits, each group (or channel) with a scale of its own.

    With `clip`, a group's scale is searched for the least squared error; else its largest value just fits. Scales are
    rounded to the weight's type first, in which they will be stored. A `ValueError` if the groups do not divide K or
    the weight is not finite.
    """
    n, k = weight_NK.shape
    size = scheme.group_size or k
    if k % size:
        raise ValueError(f"group size {size} does not divide {k} columns; take a smaller one, or 0 for whole channels")
    if not bool(weight_NK.isfinite().all()):
        raise ValueError("the weight has values that are not finite")
    groups = weight_NK.float().view(n, k // size, size)
    if scheme.floating:
        scale = groups.abs().amax(-1, keepdim=True).div_(FP8_MOST).clamp_(min=1e-10)
        scale = scale.to(weight_NK.dtype).float()
        values = (groups / scale).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn)
    else:
        grid = Grid(scheme.bits)
        scale = grid.scales(groups, clip).to(weight_NK.dtype).float()
        values = grid.round(groups, scale).to(torch.int8)
    return QuantizedMatrix(values.view(n, k), scale.view(n, -1), (1, size), scheme.bits, scheme.activations)
