"""`PackedW8A8`: the product of 8-bit rows with 8-bit weights by the kernel in C (`linear_w8a8_cpu.c`)."""

import ctypes

import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, integers, pointers
from batchinfer.kernels.linear_w8a8 import with_bias
from batchinfer.kernels.rows import Rows

MOST_COLUMNS = 1 << 16
"""A sum of more products of bytes may not fit in 32 bits."""


class _Product(Arguments):
    _fields_ = (*pointers("x weight sums scale out"), *integers("rows outputs columns"))


class PackedW8A8:
    """The product `(x - 128) @ weight.T` with int8 weights [N, K] and float32 per-channel scales [N].

    Integer sums are exact, so a row's result depends on no other row. One packed copy of the weights serves any number
    of rows. Raises `ValueError` for more than `MOST_COLUMNS` columns.
    """

    takes = torch.uint8
    row_grain = least_rows = 1

    def __init__(self, library: ctypes.CDLL, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None) -> None:
        n, k = weight_NK.shape
        if k > MOST_COLUMNS:
            raise ValueError(f"the weight has {k} columns; 8-bit products take at most {MOST_COLUMNS}")
        self._library = library
        self.shape, self.scale, self.bias = (n, k), scale_N.contiguous(), bias_N
        self.weight = torch.empty(library.packed_w8_bytes(n, k), dtype=torch.int8)
        self._sums = torch.zeros(-(-n // 16) * 16, dtype=torch.int32)
        library.pack_w8(address(weight_NK.contiguous()), n, k, address(self.weight), address(self._sums))

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row."""
        return 2 * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and the sums of its rows."""
        return self.weight.nbytes + self.scale.nbytes + self._sums.nbytes

    def __call__(self, x: Rows) -> Rows:
        """Multiply uint8 rows [M, K]; the result [M, N] is float32.

        The rows' scales are passed on in the result, or multiplied in if there is a bias.
        """
        values = x.values.contiguous()
        assert values.dtype == torch.uint8 and values.shape[1] == self.shape[1]
        out = torch.empty(len(values), self.shape[0])
        operands = (values, self.weight, self._sums, self.scale, out)
        self._library.linear_w8a8(ctypes.byref(_Product(*map(address, operands), len(values), *self.shape)))
        return with_bias(Rows(out, x.scale), self.bias)
