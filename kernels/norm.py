"""RMSNorm (Zhang and Sennrich 2019), alone or with quantization behind it."""

import torch
from torch import Tensor

from batchinfer.kernels.rows import Rows, quantize_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, computed in float32; shape and dtype of x."""
    x32 = x.float()
    return (x32 * _inverse_rms(x32, eps)).to(x.dtype).mul_(weight)


def rms_norm_quantize(x_MD: Tensor, weight_D: Tensor, eps: float) -> Rows:
    """RMSNorm and 8 bits by rows at once, of x float32 [M, D].

    The root mean square is one factor a row, so it never touches the elements: it goes into the scale.
    """
    return quantize_rows(x_MD * weight_D, _inverse_rms(x_MD, eps))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return squares
