"""A mixture of experts: which experts a token goes to, the products of their rows, and the sum of what they return.

Shapes: T tokens, E experts, k of them chosen for a token, M rows in the order of their experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from batchinfer.kernels.rows import Rows

FOUR_BITS = (
    "the experts' weights are in 4 bits, which have no kernel on a GPU yet; take --quantization w8a8-int8 or none, or "
    "--device cpu"
)
DIFFERENT_INPUTS = (
    "the experts of a layer round their inputs differently, which has no kernel on a GPU; take --quantization none or "
    "--device cpu"
)
"""What a GPU's kernel refuses, as users read it."""


@dataclass(frozen=True)
class ExpertRows:
    """Tokens in the order of their experts; a token has a row for each expert that was chosen for it."""

    tokens: Tensor  # [M] int64, the token of each row; any token for padding
    places: Tensor  # [T, k] int64, the row of each token's j-th expert

    @property
    def parts(self) -> "Sequence[ExpertRows]":
        """The same rows in parts, to be computed one after the other; their `places` are those of the whole."""
        return (self,)


class ProductByExpert(Protocol):
    """The product of each expert's rows with a weight of its own."""

    def __call__(self, x: Rows, at: ExpertRows) -> Rows:
        """Multiply rows [M, K]; the result is [M, N]."""
        ...


def route(
    logits_TE: Tensor,
    chosen: int,
    scores: str,
    normalized: bool,
    factor: float,
    bias_E: Tensor | None = None,
    groups: int = 1,
    chosen_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return (chosen experts int64 [T, k], their weights float32 [T, k]) of float32 logits.

    `Router` in `models/feed_forward.py` says what the arguments mean.
    """
    scores_TE = logits_TE.softmax(-1) if scores == "softmax" else logits_TE.sigmoid()
    ranks_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if groups > 1:
        by_group = ranks_TE.view(len(ranks_TE), groups, -1)
        best = by_group.topk(2, -1).values.sum(-1).topk(chosen_groups, -1).indices
        left = torch.ones(by_group.shape[:2], dtype=torch.bool, device=best.device).scatter_(1, best, False)
        ranks_TE = by_group.masked_fill(left[..., None], float("-inf")).flatten(1)
    experts_Tk = ranks_TE.topk(chosen, -1).indices
    weights_Tk = scores_TE.gather(1, experts_Tk)
    if normalized:
        weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
    return experts_Tk, weights_Tk * factor


def weighted_sum(y_MD: Tensor, weights_Tk: Tensor, places_Tk: Tensor) -> Tensor:
    """Return the weighted sum of each token's rows, float32 [T, D], in the order in which its experts were chosen."""
    total = torch.zeros(len(places_Tk), y_MD.shape[1], device=y_MD.device)
    for rows, weights in zip(places_Tk.unbind(1), weights_Tk.unbind(1), strict=True):
        total.addcmul_(y_MD[rows].float(), weights[:, None])
    return total
