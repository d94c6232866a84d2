"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), alone or followed by quantization."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.rows import Rows, quantize_rows


class LayerNorm(NamedTuple):
    """The weight and bias of a LayerNorm, of one type: [D] each, or [heads, D] if each head has its own."""

    weight: Tensor
    bias: Tensor


NormWeights = Tensor | LayerNorm
"""What a norm holds: the weight of an RMSNorm, [D] or [heads, D], or a LayerNorm."""


def norm(x: Tensor, weights: NormWeights, eps: float) -> Tensor:
    """Return the norm of x over its last dimension, in x's shape and dtype. It is computed in float32."""
    return rms_norm(x, weights, eps) if isinstance(weights, Tensor) else layer_norm(x, weights, eps)


def norm_quantize(x_MD: Tensor, weights: NormWeights, eps: float) -> Rows:
    """Return the norm of x, float32 [M, D], rounded to 8 bits with a scale per row."""
    if isinstance(weights, Tensor):
        return rms_norm_quantize(x_MD, weights, eps)
    return quantize_rows(layer_norm(x_MD, weights, eps))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return `x / rms(x) * weight` over the last dimension, in x's shape and dtype. It is computed in float32."""
    x32 = x.float()
    normed = (x32 * _inverse_rms(x32, eps)).to(x.dtype)
    return normed if weight is None else normed.mul_(weight)


def rms_norm_quantize(x_MD: Tensor, weight_D: Tensor, eps: float) -> Rows:
    """Return the RMSNorm of x, float32 [M, D], rounded to 8 bits with a scale per row.

    The root mean square is one factor per row, so it goes into the row's scale and the elements need not be divided.
    """
    return quantize_rows(x_MD * weight_D, _inverse_rms(x_MD, eps))


def layer_norm(x: Tensor, weights: LayerNorm, eps: float) -> Tensor:
    """Return `(x - mean(x)) / deviation(x) * weight + bias` over the last dimension, in x's shape and dtype."""
    weight, bias = weights
    if weight.dim() == 1:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    unit = F.layer_norm(x.float(), weight.shape[-1:], eps=eps)
    return torch.addcmul(bias.float(), unit, weight.float()).to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return squares
