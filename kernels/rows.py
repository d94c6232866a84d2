"""`Rows`: the matrix that passes between operations, with its rows' scales kept apart until someone needs them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """A matrix [M, N] whose true value is `values * scale`, or `(values - 128) * scale` where values are uint8.

    A scale by rows commutes with every matrix product and with quantization by rows, so it rides along instead of
    costing a pass over memory at each step.
    """

    values: Tensor  # [M, N] floating point, or uint8
    scale: Tensor | None = None  # [M, 1] float32

    def dense(self) -> Tensor:
        """The true floating-point values; scales in place, so that `values` are spent afterwards."""
        return self.values if self.scale is None else self.values.mul_(self.scale)


_TO_LOW_BYTE = 1.5 * 2.0**23 + 128.0
"""Added to a small float32, it leaves the number, rounded half to even, plus 128 in the lowest byte of the bits."""


def quantize_rows(x_MN: Tensor, scale_M1: Tensor | None = None) -> Rows:
    """Round each row to 8 bits with a scale of its own, absmax / 127 (symmetric, dynamic, per token).

    x is float32 and is spent. If given, `scale_M1` is a factor that x still lacks. A row with a value that is not
    finite gets a scale that is not finite, so that its results stay marked.
    """
    absmax = torch.maximum(x_MN.amax(-1, keepdim=True), x_MN.amin(-1, keepdim=True).neg_())
    step = absmax.clamp(min=1e-30).div_(127.0)
    # The plain conversion of float32 to uint8 has no vector code in torch: it takes longer than all the rest together.
    values = x_MN.mul_(step.reciprocal()).add_(_TO_LOW_BYTE).view(torch.int32).to(torch.uint8)
    return Rows(values, step if scale_M1 is None else step.mul_(scale_M1))


def add_rows(x_MN: Tensor, y: Rows) -> Tensor:
    """`x + y`, in place in x: the residual connection."""
    return x_MN.add_(y.values) if y.scale is None else x_MN.addcmul_(y.values, y.scale)
