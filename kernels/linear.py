"""`Linear`: a matrix product in floating point whose rows do not depend on each other's number."""

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.processor import least_rows_in_bfloat16
from batchinfer.kernels.rows import Rows


class Linear:
    """`x @ weight.T + bias` in the weight's dtype. Rows come in multiples of `MIN_ROWS`; fewer is a `ValueError`."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self.weight = weight_NK
        self.bias = bias_N
        self.row_grain = MIN_ROWS
        self._least_rows = least_rows_in_bfloat16() if weight_NK.dtype == torch.bfloat16 else 1

    @property
    def takes(self) -> torch.dtype:
        """Rows are brought to it, whatever they come in."""
        return self.weight.dtype

    @property
    def operations_per_row(self) -> int:
        """Multiplications and additions."""
        return 2 * self.weight.numel()

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes."""
        return self.weight.nbytes

    def __call__(self, x: Rows) -> Rows:
        """[M, K] to [M, N], in the weight's dtype, dense."""
        x_MK = x.dense()
        rows = x_MK.shape[0]
        if rows % MIN_ROWS:
            raise ValueError(f"linear got {rows} rows; pad them to a multiple of {MIN_ROWS}")
        x_MK = x_MK.to(self.weight.dtype)
        if rows < self._least_rows:
            x_MK = F.pad(x_MK, (0, 0, 0, self._least_rows - rows))
        return Rows(F.linear(x_MK, self.weight, self.bias)[:rows])
