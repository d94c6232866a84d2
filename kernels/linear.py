"""`Linear`: a floating-point matrix product in which a row's bits do not depend on the number of rows."""

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.processor import least_rows_in_bfloat16
from batchinfer.kernels.rows import Rows


class Linear:
    """The product `x @ weight.T + bias` in the weight's dtype. The number of rows is a multiple of `MIN_ROWS`."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self.weight = weight_NK
        self.bias = bias_N
        self.row_grain = MIN_ROWS
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
        return Rows(F.linear(x_MK, self.weight, self.bias)[:rows])
