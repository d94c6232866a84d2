"""A mixture of experts on a CPU: the host knows which rows are an expert's, and multiplies one expert after the other.

Shapes: T tokens, k experts chosen for each, M rows in the order of their experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.experts import ExpertRows
from batchinfer.kernels.grain import expert_size
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows

PART_ROWS = 256
"""Rows that go through all of a block before the next ones do, so that what lies between its products stays in the
cache. One expert's rows are never split."""


@dataclass(frozen=True)
class ExpertSpans(ExpertRows):
    """Rows of which the host knows where those of an expert lie."""

    spans: list[tuple[int, int]]  # (expert, its rows with padding) of each expert that has rows, in the rows' order

    @property
    def parts(self) -> Sequence["ExpertSpans"]:
        """The rows of a few experts each."""
        groups, taken = [list[tuple[int, int]]()], 0
        for span in self.spans:
            if taken and taken + span[1] > PART_ROWS:
                groups.append([])
                taken = 0
            groups[-1].append(span)
            taken += span[1]
        tokens = torch.split(self.tokens, [sum(rows for _, rows in group) for group in groups])
        return [ExpertSpans(part, self.places, group) for part, group in zip(tokens, groups, strict=True)]


def expert_spans(experts_Tk: Tensor, experts: int, row_grain: int, least_rows: int) -> ExpertSpans:
    """Sort tokens by the k of all `experts` that were chosen for each.

    Each expert's rows are padded to numbers that suit its products (`expert_size`), so that no row's bits depend on
    which other tokens share its expert.
    """
    entries = experts_Tk.numpy().ravel()
    order = entries.argsort(kind="stable")
    counts = np.bincount(entries, minlength=experts)
    touched = counts.nonzero()[0].tolist()
    spans = [(expert, expert_size(int(counts[expert]), row_grain, least_rows)) for expert in touched]
    padding = np.zeros(experts, np.int64)
    padding[touched] = [rows for _, rows in spans] - counts[touched]
    before = padding.cumsum() - padding  # padding before each expert's rows
    row = np.arange(len(entries)) + before[entries[order]]
    tokens = np.zeros(len(entries) + padding.sum(), np.int64)
    tokens[row] = order // experts_Tk.shape[1]
    places = np.empty_like(entries)
    places[order] = row
    return ExpertSpans(torch.from_numpy(tokens), torch.from_numpy(places).view_as(experts_Tk), spans)


class ProductBySpan:
    """The products of all experts, one after the other."""

    def __init__(self, products: list[Product]) -> None:
        self.products = products

    def __call__(self, x: Rows, at: ExpertRows) -> Rows:
        """Multiply rows [M, K]; the result is [M, N]."""
        assert isinstance(at, ExpertSpans)
        counts = [rows for _, rows in at.spans]
        scales = [None] * len(counts) if x.scale is None else torch.split(x.scale, counts)
        spans = zip(at.spans, torch.split(x.values, counts), scales, strict=True)
        made = [self.products[expert](Rows(values, scale)) for (expert, _), values, scale in spans]
        scaled = [rows.scale for rows in made if rows.scale is not None]
        if len(made) == 1:
            return made[0]
        return Rows(torch.cat([rows.values for rows in made]), torch.cat(scaled) if scaled else None)


class WeightedSum:
    """The weighted sum of each token's rows, in the order in which its experts were chosen.

    The rows of all experts lie in memory that is kept from layer to layer: the C library asks the system for blocks as
    large as these anew each time, and the system clears their pages.
    """

    def __init__(self) -> None:
        self._kept = torch.empty(0)

    def __call__(self, parts: list[Tensor], weights_Tk: Tensor, places_Tk: Tensor) -> Tensor:
        """Return the sums, float32 [T, D]. The rows [M, D] are those of all `parts`; `places` are their numbers."""
        rows, columns = sum(map(len, parts)), parts[0].shape[1]
        if self._kept.numel() < rows * columns:
            with torch.inference_mode(False):
                self._kept = torch.empty(rows * columns)
        y_MD = torch.cat(parts, out=self._kept[: rows * columns].view(rows, columns))
        return F.embedding_bag(places_Tk, y_MD, per_sample_weights=weights_Tk, mode="sum")
