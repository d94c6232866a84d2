"""Matrix products on a GPU: by the vendor's library where it serves as well, by Triton elsewhere."""

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels import linear_w4a16_triton, linear_w8a8_triton
from batchinfer.kernels.four_bits_triton import repack
from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.linear_triton import linear
from batchinfer.kernels.linear_w4a16_triton import linear_w4a16
from batchinfer.kernels.linear_w8a8_triton import linear_w8a8
from batchinfer.kernels.rows import Rows

SCALED_BY_LIBRARY = ((8, 9), (9, 0), (10, 0), (12, 0))
"""Compute capabilities of the devices on which `torch._scaled_mm` multiplies float8 with per-row and per-channel
scales. Whether it is faster than the Triton kernel is unmeasured; `make gpu-check` compares them."""
LIBRARY_GRAIN = 16  # `torch._scaled_mm` takes weights whose rows and columns are multiples of this


class DenseProduct:
    """The product `x @ weight.T + bias` in the weight's type.

    With `deterministic`, a row's bits do not depend on the rows beside it.
    """

    row_grain = least_rows = 1

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, deterministic: bool) -> None:
        self.weight, self.bias, self.deterministic = weight_NK, bias_N, deterministic
        self.path = "triton, one tile" if deterministic else "torch"

    @property
    def takes(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def operations_per_row(self) -> int:
        return 2 * self.weight.numel()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Rows) -> Rows:
        """Multiply rows [M, K]; the result [M, N] is dense."""
        if self.deterministic:
            return Rows(linear(x.values, self.weight, self.bias))
        return Rows(F.linear(x.values, self.weight, self.bias))


class EightBitProduct:
    """The product of rows and weights in int8 or float8_e4m3fn, with per-row and per-channel scales.

    The result is in `out`.
    """

    row_grain = least_rows = 1

    def __init__(
        self,
        values_NK: Tensor,
        scale_N: Tensor,
        bias_N: Tensor | None,
        out: torch.dtype,
        gpu: Gpu,
        deterministic: bool,
    ) -> None:
        self.weight, self.scale, self.bias, self.out = values_NK.contiguous(), scale_N, bias_N, out
        self.gpu, self.deterministic = gpu, deterministic
        self.by_library = not deterministic and _library_takes(values_NK, out, gpu)
        self.path = "torch" if self.by_library else "triton"

    @property
    def takes(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def operations_per_row(self) -> int:
        return 2 * self.weight.numel()

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes

    def __call__(self, x: Rows) -> Rows:
        """Multiply rows [M, K]; the result [M, N] is dense."""
        if self.by_library and x.scale is not None:
            scale = self.scale.view(1, -1)
            return Rows(torch._scaled_mm(x.values, self.weight.t(), x.scale, scale, self.bias, out_dtype=self.out))
        return Rows(linear_w8a8(x, self.weight, self.scale, self.bias, self.out, self.gpu, self.deterministic))


class FourBitProduct:
    """The product of floating-point rows with weights that stay in 4 bits in memory."""

    row_grain = least_rows = 1
    path = "triton"

    def __init__(
        self,
        values_NK: Tensor,
        scale_NG: Tensor,
        zero_point_NG: Tensor | None,
        bias_N: Tensor | None,
        dtype: torch.dtype,
        gpu: Gpu,
        deterministic: bool,
    ) -> None:
        self.weight = repack(values_NK, scale_NG, zero_point_NG, dtype, gpu)
        self.bias, self.takes, self.gpu, self.deterministic = bias_N, dtype, gpu, deterministic

    @property
    def operations_per_row(self) -> int:
        return 2 * self.weight.rows * self.weight.columns

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Rows) -> Rows:
        """Multiply rows [M, K]; the result [M, N] is dense."""
        return Rows(linear_w4a16(x.values, self.weight, self.bias, self.gpu, self.deterministic))


def row_steps() -> tuple[int, ...]:
    """Return numbers of rows that together meet every program of the products: warmed once, none is compiled later."""
    return tuple(sorted({*linear_w8a8_triton.row_steps(), *linear_w4a16_triton.row_steps()}))


def _library_takes(values_NK: Tensor, out: torch.dtype, gpu: Gpu) -> bool:
    if values_NK.dtype != torch.float8_e4m3fn or out != torch.bfloat16 or not values_NK.is_cuda:
        return False
    fits = all(size % LIBRARY_GRAIN == 0 for size in values_NK.shape)
    return fits and gpu.capability in SCALED_BY_LIBRARY
