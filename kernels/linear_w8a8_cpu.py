"""`PackedW8A8`: the product of 8-bit rows with 8-bit weights by the kernel in C (`linear_w8a8_cpu.c`)."""

import ctypes

import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, integers, pointers
from batchinfer.kernels.packed_cpu import PackedProduct

MOST_COLUMNS = 1 << 16
"""A sum of more products of bytes may not fit in 32 bits."""


class _Product(Arguments):
    _fields_ = (*pointers("x weight sums scale out"), *integers("rows outputs columns"))


class PackedW8A8(PackedProduct):
    """The product `(x - 128) @ weight.T` with int8 weights [N, K] and float32 per-channel scales [N].

    Integer sums are exact. Raises `ValueError` for more than `MOST_COLUMNS` columns.
    """

    def __init__(self, library: ctypes.CDLL, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None) -> None:
        n, k = weight_NK.shape
        if k > MOST_COLUMNS:
            raise ValueError(f"the weight has {k} columns; 8-bit products take at most {MOST_COLUMNS}")
        super().__init__((n, k), bias_N)
        self._library, self.scale = library, scale_N.contiguous()
        self.weight = torch.empty(library.packed_w8_bytes(n, k), dtype=torch.int8)
        self._sums = torch.zeros(-(-n // 16) * 16, dtype=torch.int32)
        library.pack_w8(address(weight_NK.contiguous()), n, k, address(self.weight), address(self._sums))

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and the sums of its rows."""
        return self.weight.nbytes + self.scale.nbytes + self._sums.nbytes

    def _multiply(self, x_MK: Tensor, out_MN: Tensor) -> None:
        operands = map(address, (x_MK, self.weight, self._sums, self.scale, out_MN))
        self._library.linear_w8a8(ctypes.byref(_Product(*operands, x_MK.shape[0], *self.shape)))
