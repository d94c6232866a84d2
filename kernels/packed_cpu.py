"""`PackedProduct`: what the products in C have in common, whatever the bits of their weights."""

import torch
from torch import Tensor

from batchinfer.kernels.linear_w8a8 import with_bias
from batchinfer.kernels.rows import Rows


class PackedProduct:
    """The product of 8-bit rows with weights [N, K] that are packed once, for any number of rows.

    A row's result depends on no other row. A subclass packs the weights and multiplies.
    """

    takes = torch.uint8
    row_grain = least_rows = 1

    def __init__(self, shape: tuple[int, int], bias_N: Tensor | None) -> None:
        self.shape, self.bias = shape, bias_N

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row."""
        return 2 * self.shape[0] * self.shape[1]

    def __call__(self, x: Rows) -> Rows:
        """Multiply uint8 rows [M, K]; the result [M, N] is float32.

        The rows' scales are passed on in the result, or multiplied in if there is a bias.
        """
        values = x.values.contiguous()
        assert values.dtype == torch.uint8 and values.shape[1] == self.shape[1]
        out = torch.empty(values.shape[0], self.shape[0])
        self._multiply(values, out)
        return with_bias(Rows(out, x.scale), self.bias)

    def _multiply(self, x_MK: Tensor, out_MN: Tensor) -> None:
        """Write the product of the rows, without their scales and the bias, to `out`."""
        raise NotImplementedError
