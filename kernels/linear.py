"""`Linear`: a floating-point matrix product in which a row's bits do not depend on the number of rows."""

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.processor import least_rows_in_bfloat16, multiplied_in
from batchinfer.kernels.rows import Rows

_WIDENED = 1 << 19
"""Numbers of a weight that are widened to float32 at a time: they stay in the cache until they are multiplied."""


class Linear:
    """The product `x @ weight.T + bias` in the weight's dtype. The number of rows is a multiple of `MIN_ROWS`."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self.weight = weight_NK
        self.bias = bias_N
        self.row_grain = self.least_rows = MIN_ROWS
        widened = multiplied_in(weight_NK.dtype) != weight_NK.dtype
        self.path = f"{str(weight_NK.dtype).removeprefix('torch.')}, widened to float32" if widened else "cpu"
        self._least_rows = least_rows_in_bfloat16() if weight_NK.dtype == torch.bfloat16 else 1

    @property
    def takes(self) -> torch.dtype:
        """Type in which rows are multiplied; rows of another type are converted."""
        return self.weight.dtype

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row."""
        return 2 * self.weight.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes

    def __call__(self, x: Rows) -> Rows:
        """Multiply rows [M, K]; the result [M, N] is dense, in the weight's dtype.

        Raises `ValueError` if M is not a multiple of `MIN_ROWS`.
        """
        x_MK = x.dense()
        rows = x_MK.shape[0]
        if rows % MIN_ROWS:
            raise ValueError(f"linear got {rows} rows; pad them to a multiple of {MIN_ROWS}")
        x_MK = x_MK.to(self.weight.dtype)
        if rows < self._least_rows:
            x_MK = F.pad(x_MK, (0, 0, 0, self._least_rows - rows))
        return Rows(linear(x_MK, self.weight, self.bias)[:rows])


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, [M, N], in the type of all three, with sums in float32.

    Where torch is slow in that type (`multiplied_in`), the weight is widened to float32 piece by piece.
    """
    wide = multiplied_in(weight_NK.dtype)
    if wide == weight_NK.dtype:
        return F.linear(x_MK, weight_NK, bias_N)
    out_MN = x_MK.new_empty(len(x_MK), len(weight_NK))
    x_MK = x_MK.to(wide)
    size = max(1, _WIDENED // weight_NK.shape[1])
    for first in range(0, len(weight_NK), size):
        piece = slice(first, first + size)
        bias = None if bias_N is None else bias_N[piece].to(wide)
        out_MN[:, piece] = F.linear(x_MK, weight_NK[piece].to(wide), bias)
    return out_MN
