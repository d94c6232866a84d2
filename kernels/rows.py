"""`Rows`: a matrix passed between operations whose row scales are multiplied in only when an operation needs that."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """A matrix [M, N] that stands for `values * scale`, or for `(values - 128) * scale` if the values are uint8.

    Scaling rows commutes with matrix products and with quantization by rows. So scales are passed on beside the
    values, which saves a pass over memory after each product.
    """

    values: Tensor  # [M, N] floating point, or uint8
    scale: Tensor | None = None  # [M, 1] float32

    def dense(self) -> Tensor:
        """Return `values * scale` for floating-point values. This overwrites `values`: do not use them afterwards."""
        return self.values if self.scale is None else self.values.mul_(self.scale)

    def between(self, begin: int, end: int | None = None) -> "Rows":
        """Return a view of the rows [begin, end)."""
        return Rows(self.values[begin:end], None if self.scale is None else self.scale[begin:end])

    def at(self, rows_m: Tensor) -> "Rows":
        """Return copies of the rows of these numbers, int64 [m]."""
        scale = None if self.scale is None else self.scale.index_select(0, rows_m)
        return Rows(self.values.index_select(0, rows_m), scale)


_TO_LOW_BYTE = 1.5 * 2.0**23 + 128.0
"""Adding this to a small float32 leaves, in the lowest byte of the bits, the number rounded half to even plus 128."""


def quantize_rows(x_MN: Tensor, scale_M1: Tensor | None = None) -> Rows:
    """Round each row to uint8 with a scale of its own, absmax / 127 (symmetric, dynamic, per token).

    x is float32 and is overwritten. `scale_M1`, if given, is a factor that has not been multiplied into x; it goes into
    the result's scale. A row with a value that is not finite gets a scale that is not finite, so that the row can be
    recognized in the results.
    """
    absmax = torch.maximum(x_MN.amax(-1, keepdim=True), x_MN.amin(-1, keepdim=True).neg_())
    step = absmax.clamp(min=1e-30).div_(127.0)
    # torch has no vector code for converting float32 to uint8: that would take longer than all the rest.
    values = x_MN.mul_(step.reciprocal()).add_(_TO_LOW_BYTE).view(torch.int32).to(torch.uint8)
    return Rows(values, step if scale_M1 is None else step.mul_(scale_M1))


def add_rows(x_MN: Tensor, y: Rows) -> Tensor:
    """Add y to x in place and return x: the residual connection."""
    return x_MN.add_(y.values) if y.scale is None else x_MN.addcmul_(y.values, y.scale)
