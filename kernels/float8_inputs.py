"""Products whose inputs are rounded to float8_e4m3fn first, and multiplied in floating point.

They compute what a checkpoint with 8-bit inputs asks for, where no product of float8 numbers does so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows

MOST = torch.finfo(torch.float8_e4m3fn).max
_EXPONENT = 0x7F800000  # the bits of a float32's exponent


@dataclass(frozen=True)
class InputScales:
    """The scales with which a product's inputs are rounded to 8 bits. By default each row has one, of its own."""

    group: int = 0  # columns of a row that share a scale; 0: all of them
    static: float | None = None  # the one scale of all inputs, known beforehand; None: scales follow from the inputs

    def rounded_to_float8(self, x_MK: Tensor) -> Tensor:
        """Return the rows rounded to float8_e4m3fn and back, [M, K] in x's type.

        What exceeds a static scale's range becomes its largest number. Otherwise a row with a value that is not finite
        keeps one.
        """
        if self.static is not None:
            return _rounded(x_MK.float() / self.static).mul_(self.static).to(x_MK.dtype)
        columns = x_MK.shape[1]
        group, x = self.group or columns, x_MK.float()
        if columns % group:
            x = F.pad(x, (0, -columns % group))
        groups = x.reshape(len(x), -1, group)
        most = torch.maximum(groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True).neg_())
        scale = most.clamp_(min=1e-30).div_(MOST)
        return _rounded(groups / scale).mul_(scale).flatten(1)[:, :columns].to(x_MK.dtype)


PER_TOKEN = InputScales()


def _rounded(quotient: Tensor) -> Tensor:
    """Round float32 numbers in place to the nearest ones of float8_e4m3fn, half to even; return them.

    Converting to the type and back takes three times as long, as torch has no vector code for the way back.
    """
    quotient.clamp_(-MOST, MOST)
    # Between a power of two and the next, float8 numbers are an eighth of it apart; below 2^-6 they are 2^-9 apart.
    power = quotient.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32).clamp_(min=2.0**-6)
    # float32 numbers of this size are an eighth of the power apart too.
    large = power.mul_(1.5 * 2.0**20)
    return quotient.add_(large).sub_(large)


class Float8InputProduct:
    """A floating-point product of rows that are rounded to float8_e4m3fn first; a row's bits depend on no other row.

    `scales` says how the inputs of each stacked matrix are rounded (None: not at all), and `rows` how many rows it has.
    Matrices that share an input nearly always agree. Where they do not, the product is computed once for each way.
    """

    def __init__(self, product: Product, scales: list[InputScales | None], rows: list[int]) -> None:
        self.product, self.scales, self.rows = product, scales, rows

    @property
    def takes(self) -> torch.dtype:
        """Type in which rows are multiplied."""
        return self.product.takes

    @property
    def row_grain(self) -> int:
        """Row grain: the number of input rows must be a multiple of it."""
        return self.product.row_grain

    @property
    def least_rows(self) -> int:
        """The fewest input rows with which a row's bits are its own."""
        return self.product.least_rows

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row."""
        return self.product.operations_per_row

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.product.nbytes

    def __call__(self, x: Rows) -> Rows:
        """Multiply rows [M, K]; the result [M, N] is dense."""
        x_MK = x.dense()
        products = {way: self._product(x_MK, way) for way in dict.fromkeys(self.scales)}
        if len(products) == 1:
            return Rows(*products.values())
        parts = [torch.split(products[way], self.rows, 1)[i] for i, way in enumerate(self.scales)]
        return Rows(torch.cat(parts, 1))

    def _product(self, x_MK: Tensor, way: InputScales | None) -> Tensor:
        # A copy where nothing is rounded: the product may overwrite its input, which other ways still need.
        rows = x_MK.clone() if way is None else way.rounded_to_float8(x_MK)
        return self.product(Rows(rows)).dense()
