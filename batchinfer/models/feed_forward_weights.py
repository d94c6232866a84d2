"""The loaded feed-forward block of a layer: one block, or a mixture of experts with what chooses among them.

Shapes: T rows, D the hidden size, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.kernels.backend import Backend
from batchinfer.kernels.experts import ProductByExpert, route, weighted_sum
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows
from batchinfer.models.feed_forward import Experts, FeedForward


@dataclass(frozen=True)
class FeedForwardWeights:
    """The weights of one feed-forward block. The matrices gate and up are one product."""

    shape: FeedForward
    gate_up: Product
    down: Product

    @property
    def takes(self) -> torch.dtype:
        """Type of the input rows."""
        return self.gate_up.takes

    @property
    def products(self) -> tuple[Product, ...]:
        """The block's matrix products."""
        return (self.gate_up, self.down)

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row."""
        return sum(product.operations_per_row for product in self.products)

    def __call__(self, do: Backend, x: Rows, rows: int) -> Rows:
        """Return the block's output [T, D] for rows x [T, D], of which the first `rows` are no padding."""
        return self.down(activated(do, self.shape, self.gate_up(x), self.down.takes))


@dataclass(frozen=True)
class ExpertsWeights:
    """The weights of a mixture of experts."""

    shape: Experts
    router: Product  # in float32, as the shared expert's gate
    bias: Tensor | None  # [E] float32, added to the scores to choose
    experts: tuple[FeedForwardWeights, ...]
    gate_up: ProductByExpert
    down: ProductByExpert
    shared: FeedForwardWeights | None
    shared_gate: Product | None
    takes: torch.dtype  # type of the input rows: floating point, because the router takes no rounded ones

    @property
    def products(self) -> tuple[Product, ...]:
        """The products of all experts, and of what chooses among them."""
        beside = filter(None, (self.router, self.shared_gate))
        blocks = self.experts if self.shared is None else (*self.experts, self.shared)
        return (*beside, *(product for block in blocks for product in block.products))

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row, which only the chosen experts compute."""
        chosen = self.shape.router.chosen * self.experts[0].operations_per_row
        beside = sum(p.operations_per_row for p in self.products if p in (self.router, self.shared_gate))
        return chosen + beside + (0 if self.shared is None else self.shared.operations_per_row)

    def __call__(self, do: Backend, x: Rows, rows: int) -> Rows:
        """Return the mixture's output [T, D] for rows x [T, D], of which the first `rows` are no padding.

        Padding is left to the shared expert, so that no expert's weights are read for it.
        """
        x_TD = x.dense()
        if not rows:  # the last layer of a step that samples nothing
            return Rows(torch.zeros_like(x_TD))
        logits = self.router(Rows(x_TD.float())).dense()
        gate = None if self.shared_gate is None else self.shared_gate(Rows(x_TD.float())).dense().sigmoid_()
        r = self.shape.router
        experts, weights = route(
            logits[:rows], r.chosen, r.scores, r.normalized, r.factor, self.bias, r.groups, r.chosen_groups
        )
        chosen = do.expert_rows(experts, len(self.experts))
        first = self.experts[0]
        inputs = do.rows(x_TD[chosen.tokens], first.takes)
        inner = activated(do, first.shape, self.gate_up(inputs, chosen), first.down.takes)
        out = torch.zeros(x_TD.shape, device=do.device)
        out[:rows] = weighted_sum(self.down(inner, chosen).dense(), weights, chosen.places)
        if self.shared is not None:
            shared = self.shared(do, do.rows(x_TD, self.shared.takes), rows).dense()
            out += shared if gate is None else shared * gate
        return Rows(out.to(self.takes))


def activated(do: Backend, shape: FeedForward, inner: Rows, takes: torch.dtype) -> Rows:
    """Return the activation of the first product's output, as rows for a product with this `takes`."""
    return do.activate(inner, shape.activation, shape.gate is not None, takes)
