"""`Product`: a matrix product with weights that it holds, of any kind."""

from typing import Protocol

import torch

from batchinfer.kernels.rows import Rows


class Product(Protocol):
    """A matrix product with weights [N, K], which it holds."""

    @property
    def takes(self) -> torch.dtype:
        """Type of the input rows. 8-bit rows come with a scale each."""
        ...

    @property
    def row_grain(self) -> int:
        """Row grain: a step's number of input rows must be a multiple of it."""
        ...

    @property
    def least_rows(self) -> int:
        """The fewest input rows with which a row's bits are those that it has among others."""
        ...

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the weight with its scales and zero points."""
        ...

    def __call__(self, x: Rows) -> Rows:
        """Multiply rows [M, K]; the result is [M, N]."""
        ...
