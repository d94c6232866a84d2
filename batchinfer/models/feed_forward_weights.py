"""The loaded feed-forward block of a layer: one block, or a mixture of experts with what chooses among them.

Shapes: T rows, D the hidden size, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.backend import Backend
from batchinfer.kernels.experts import ExpertRows, ProductByExpert, route
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
        inputs = self._inputs(do, x_TD)
        at = do.expert_rows(experts, len(self.experts), self.experts[0].products)
        made = [self._outputs(do, inputs[self.experts[0].takes].at(part.tokens), part) for part in at.parts]
        total = do.weighted_sum(made, weights, at.places)
        out = F.pad(total, (0, 0, 0, len(x_TD) - rows))
        if self.shared is not None:
            shared = self.shared(do, inputs[self.shared.takes], rows).dense()
            out += shared if gate is None else shared * gate
        return Rows(out.to(self.takes))

    def _inputs(self, do: Backend, x_TD: Tensor) -> dict[torch.dtype, Rows]:
        """Return the rows for the products of experts, and of the shared one, by the type that they take.

        x may be overwritten.
        """
        kinds = {block.takes for block in (self.experts[0], self.shared) if block is not None}
        return {kind: do.rows(x_TD if len(kinds) == 1 else x_TD.clone(), kind) for kind in kinds}

    def _outputs(self, do: Backend, x: Rows, at: ExpertRows) -> Tensor:
        """Return the outputs [M, D] of the experts for their rows [M, D]."""
        first = self.experts[0]
        return self.down(activated(do, first.shape, self.gate_up(x, at), first.down.takes), at).dense()


def activated(do: Backend, shape: FeedForward, inner: Rows, takes: torch.dtype) -> Rows:
    """Return the activation of the first product's output, as rows for a product with this `takes`."""
    return do.activate(inner, shape.activation, shape.gate is not None, takes)
