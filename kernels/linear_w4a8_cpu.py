"""`PackedW4A8`: the product of 8-bit rows with weights that stay in 4 bits, by `linear_w4a8_cpu.c`."""

import ctypes

import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, integers, pointers
from batchinfer.kernels.linear_w4a16 import GRAIN, GROUPS
from batchinfer.kernels.packed_cpu import PackedProduct


class _Product(Arguments):
    _fields_ = (*pointers("x weight scale shift out"), *integers("rows outputs columns group"))


class PackedW4A8(PackedProduct):
    """The product `(x - 128) @ ((values - zero_point) * scale).T` with values from -8 to 7, [N, K].

    K / G columns share a scale and a zero point, which is a whole number. The sum over such a group is exact, and
    groups are added in the order of the columns, in float32. Each weight is read from memory once for all rows, in half
    the bytes of an 8-bit one.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        values_NK: Tensor,
        scale_NG: Tensor,
        zero_point_NG: Tensor,
        bias_N: Tensor | None = None,
    ) -> None:
        """Pack int8 values with scales and zero points in float32; the bias is float32 too.

        N is a multiple of `GRAIN`, and K / G one of `GROUPS`, as `LinearW4A16` asks.
        """
        n, k = values_NK.shape
        super().__init__((n, k), bias_N)
        self._library, self.group = library, k // scale_NG.shape[1]
        assert n % GRAIN == 0 and self.group in GROUPS and k == self.group * scale_NG.shape[1]
        self.weight = torch.empty(n, k // 2, dtype=torch.uint8)
        library.pack_w4(address(values_NK.contiguous()), n, k, address(self.weight))
        self._scale = _by_panel(scale_NG)
        self._shift = _by_panel(scale_NG * zero_point_NG) if bool(zero_point_NG.any()) else None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and its zero points."""
        return self.weight.nbytes + self._scale.nbytes + (0 if self._shift is None else self._shift.nbytes)

    def _multiply(self, x_MK: Tensor, out_MN: Tensor) -> None:
        operands = map(address, (x_MK, self.weight, self._scale, self._shift, out_MN))
        self._library.linear_w4a8(ctypes.byref(_Product(*operands, x_MK.shape[0], *self.shape, self.group)))


def _by_panel(of_NG: Tensor) -> Tensor:
    """Put numbers of each row and group into the order in which panels of 16 rows use them."""
    n, groups = of_NG.shape
    return of_NG.float().view(n // GRAIN, GRAIN, groups).transpose(1, 2).contiguous()
