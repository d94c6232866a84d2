"""RMSNorm (Zhang and Sennrich 2019), alone or followed by quantization."""

import torch
from torch import Tensor

from batchinfer.kernels.rows import Rows, quantize_rows


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


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return squares
