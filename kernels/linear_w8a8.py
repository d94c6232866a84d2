"""`LinearW8A8`: the integer matrix product of 8-bit rows with 8-bit weights.

Integer sums are exact, so a row's result depends on no other row, on any path.
"""

from functools import cache

import torch
from torch import Tensor

from batchinfer.kernels import dispatch
from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.rows import Rows


class LinearW8A8:
    """The product `(x - 128) @ weight.T` with int8 weights [N, K] and float32 per-channel scales [N].

    The path "cpu" is oneDNN's product of uint8 and int8 on prepacked weights; for int8 and int8, oneDNN has only scalar
    reference code. On a processor where that product loses sums (see `saturates`), each row is multiplied as two rows
    of 7-bit numbers, which takes twice the operations. The path "reference" is `torch._int_mm`.
    """

    takes = torch.uint8
    row_grain = MIN_ROWS  # not for the bits: oneDNN makes a kernel for each new number of rows
    least_rows = 1

    def __init__(self, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None) -> None:
        self.shape = (weight_NK.shape[0], weight_NK.shape[1])
        self.scale = scale_N
        self.bias = bias_N
        available = ("reference", "cpu") if "x86" in torch.backends.quantized.supported_engines else ("reference",)
        self.path = dispatch.choose(available)
        if self.path == "cpu":
            self.path = "cpu, in 7 bits" if saturates() else "cpu"
            self.weight = torch.ops.onednn.qlinear_prepack(weight_NK, None)
            self.zero_points = torch.zeros(self.shape[0], dtype=torch.int64)
        else:
            self.weight = weight_NK.t().contiguous()

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row."""
        return 2 * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.shape[0] * self.shape[1] + self.scale.nbytes

    def __call__(self, x: Rows) -> Rows:
        """Multiply uint8 rows [M, K]; the result [M, N] is float32.

        The rows' scales are passed on in the result, or multiplied in if there is a bias.
        """
        product = self._reference(x.values) if self.path == "reference" else self._packed(x.values)
        return with_bias(Rows(product, x.scale), self.bias)

    def _packed(self, x_MK: Tensor) -> Tensor:
        # This product takes one activation scale, not one per row. So it gets 1.0, and `Rows` keeps the rows' scales.
        if self.path == "cpu":
            return _product(x_MK, 128, self.weight, self.scale, self.zero_points)
        # x - 128 = 2 * (x // 2 - 64) + x % 2: two numbers from -64 to 63, one product for both, the weights read once.
        halves = torch.cat([x_MK >> 1, (x_MK & 1) | 64])
        high, low = _product(halves, 64, self.weight, torch.ones_like(self.scale), self.zero_points).chunk(2)
        return high.mul_(2).add_(low).mul_(self.scale)

    def _reference(self, x_MK: Tensor) -> Tensor:
        centered = (x_MK.to(torch.int16) - 128).to(torch.int8)
        return torch._int_mm(centered, self.weight).float().mul_(self.scale)


def with_bias(product: Rows, bias_N: Tensor | None) -> Rows:
    """Add a bias, if there is one; then the rows' scales are multiplied in."""
    return product if bias_N is None else Rows(product.dense().add_(bias_N))


def _product(x_MK: Tensor, zero_point: int, packed: Tensor, scale_N: Tensor, zero_points_N: Tensor) -> Tensor:
    """Return `(x - zero_point) @ weight.T * scale`, float32 [M, N], by oneDNN; x is uint8."""
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        x_MK, 1.0, zero_point, packed, scale_N, zero_points_N, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


@cache
def saturates() -> bool:
    """Return whether oneDNN's product of uint8 and int8 loses sums on this processor.

    Without VNNI instructions, oneDNN adds two products in 16 bits, where 2 * 255 * 127 does not fit (oneDNN's
    developer guide, "Nuances of int8 computations"). No error says so, so one product is computed to find out.
    """
    x, weight = torch.full((MIN_ROWS, 64), 255, dtype=torch.uint8), torch.full((64, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    found = _product(x, 0, packed, torch.ones(64), torch.zeros(64, dtype=torch.int64))
    return bool((found != 64 * 255 * 127).any())
