"""`Inputs`: statistics of the inputs of a matrix over the calibration's tokens."""

from collections.abc import Iterable

import torch
from torch import Tensor

SAMPLE = 512
"""Number of tokens whose inputs are kept, for measuring the error of a product."""
_STRIPE = 512


class Inputs:
    """Statistics of inputs x [K], computed in float32: mean squares, maxima, a sample and, if wanted, the Hessian."""

    def __init__(self, chunks_TK: Iterable[Tensor], tokens: int, columns: int, hessian: bool) -> None:
        """Read the inputs in chunks [T, K] of K `columns`, with `tokens` rows in all. Without any, all inputs are taken
        to be alike, so that the error is that of the weights.

        `hessian` says whether `hessian()` will be called. Raises `ValueError` if the inputs are not finite.
        """
        self.notes: list[str] = []  # remarks for the report, from quantizing with these inputs
        stride = max(1, tokens // SAMPLE)
        first = 0
        sample: list[Tensor] = []
        squares, most = torch.zeros(columns), torch.zeros(columns)
        self._products = torch.zeros(columns, columns) if hessian else None
        if not tokens:
            self.notes.append("no row of the calibration reaches it")
            chunks_TK, tokens, stride = [torch.eye(columns)], columns, 1
        for chunk in filter(len, chunks_TK):
            x = chunk.float()
            most = torch.maximum(most, chunk.abs().amax(0).float())
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
        self.most = most  # [K], largest absolute values
        self.sample = torch.cat(sample)  # [about SAMPLE, K]

    def hessian(self, order_K: Tensor) -> Tensor:
        """Return the sum of x x^T, symmetric float64 [K, K], with rows and columns in this order."""
        assert self._products is not None, "the Hessian was not asked for"
        return self._products.index_select(0, order_K).index_select(1, order_K).double()


def _add_upper(products_KK: Tensor, x_TK: Tensor) -> None:
    """Add x^T x. It is symmetric, so only the upper half is computed: stripes of rows, each from the diagonal on."""
    for start in range(0, len(products_KK), _STRIPE):
        stop = start + _STRIPE
        products_KK[start:stop, start:].addmm_(x_TK[:, start:stop].t(), x_TK[:, start:])
