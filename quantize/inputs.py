"""`Inputs`: what a matrix is multiplied with, summed up over the calibration's tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLE = 512
"""Tokens that are kept as they are, for measuring the error of a product."""
_STRIPE = 512


class Inputs:
    """Sums over inputs x [K] in float32; `hessian` only if it was asked for.

    A `ValueError` if one of them is not finite.
    """

    def __init__(self, pieces_TK: Iterable[Tensor], tokens: int, columns: int, hessian: bool) -> None:
        """Read `pieces`, [T, K] each and `tokens` in all, of K `columns`."""
        self.notes: list[str] = []  # what quantizing with them had to do, for the report
        stride = max(1, tokens // SAMPLE)
        first = 0
        sample: list[Tensor] = []
        squares, most = torch.zeros(columns), torch.zeros(columns)
        self._products = torch.zeros(columns, columns) if hessian else None
        for piece in pieces_TK:
            x = piece.float()
            most = torch.maximum(most, piece.abs().amax(0).float())
            sample.append(x[-first % stride :: stride].clone())
            if self._products is None:
                squares += x.square().sum(0)
            else:
                _add_upper(self._products, x)
            first += len(x)
        if self._products is not None:
            self._products.triu_().add_(self._products.triu(1).t())
            squares = self._products.diagonal()
        if not bool(squares.isfinite().all()):
            raise ValueError("its inputs are not finite on the calibration's rows")
        self.mean_square = squares / first  # [K]
        self.most = most  # [K], the largest absolute values
        self.sample = torch.cat(sample)  # [about SAMPLE, K]

    def hessian(self, order_K: Tensor) -> Tensor:
        """The sum of x x^T, symmetric float64 [K, K], rows and columns in this order."""
        assert self._products is not None, "it was not asked for"
        return self._products.index_select(0, order_K).index_select(1, order_K).double()


def _add_upper(products_KK: Tensor, x_TK: Tensor) -> None:
    """Add x^T x, of whose two halves only the upper one is needed: stripes of rows, each from the diagonal on."""
    for start in range(0, len(products_KK), _STRIPE):
        stop = start + _STRIPE
        products_KK[start:stop, start:].addmm_(x_TK[:, start:stop].t(), x_TK[:, start:])
