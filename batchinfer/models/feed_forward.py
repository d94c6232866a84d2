"""`FeedForward` and `Experts`: the description of a layer's feed-forward block, or of a mixture of them.

This module does not import torch.
"""

from dataclasses import dataclass

from batchinfer.models.fused_experts import QWEN_3_5, FusedExperts
from batchinfer.models.tensors import Matrix


@dataclass(frozen=True)
class FeedForward:
    """The block `down(activation(gate(x)) * up(x))` (GLU, Shazeer 2020), or `down(activation(up(x)))` without a gate.

    `activation` is silu, gelu, gelu_tanh, relu2, or clamped_swiglu, which computes of gate g and up u
    `min(g, 7) * sigmoid(1.702 * min(g, 7)) * (clamp(u, -7, 7) + 1)`, as in gpt-oss.
    """

    gate: Matrix | None
    up: Matrix
    down: Matrix
    activation: str = "silu"

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, in the order of computing."""
        return {"gate_up": (self.up,) if self.gate is None else (self.gate, self.up), "down": (self.down,)}

    @property
    def weights_per_token(self) -> int:
        """Number of weights that a token is multiplied by."""
        return sum(matrix.size for matrices in self.products.values() for matrix in matrices)

    @property
    def numbers_per_token(self) -> int:
        """Number of numbers of a token that pass through the norm before it, the activation and the residual sum."""
        return 2 * self.up.columns + 3 * self.down.columns


@dataclass(frozen=True)
class Router:
    """Chooses experts for each token by scores, softmax or sigmoid of its logits, computed in float32.

    Their weights are the scores of the chosen ones. `bias` names a tensor [experts] that is added to the scores only to
    choose, as in DeepSeek-V3. There the experts also lie in groups, and only those of the best groups are chosen, by
    the sum of a group's two best scores.
    """

    matrix: Matrix  # [experts, D]
    chosen: int  # number of experts that are chosen for a token
    scores: str = "softmax"
    normalized: bool = True  # the weights are divided by their sum
    factor: float = 1.0  # then they are multiplied by it
    bias: str | None = None
    bias_shape: tuple[int, ...] = ()  # as stored
    groups: int = 1
    chosen_groups: int = 1


@dataclass(frozen=True)
class Experts:
    """A mixture of experts (Shazeer et al. 2017): the weighted sum of the chosen experts, and of one that all share."""

    router: Router
    experts: tuple[FeedForward, ...]  # all of one shape
    shared: FeedForward | None = None
    shared_gate: Matrix | None = None  # [1, D]: the shared expert's output is multiplied by the sigmoid of its product
    fused: FusedExperts = QWEN_3_5  # how a checkpoint may hold the experts, other than by modules

    @property
    def blocks(self) -> dict[str, FeedForward]:
        """The blocks by name, in the order of computing."""
        blocks = {f"expert {i}": expert for i, expert in enumerate(self.experts)}
        return blocks if self.shared is None else {**blocks, "shared expert": self.shared}

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, in the order of computing."""
        return {f"{of} {name}": found for of, block in self.blocks.items() for name, found in block.products.items()}

    @property
    def unquantized(self) -> tuple[Matrix, ...]:
        """Matrices that stay in floating point: they are small, and decide which experts compute."""
        return (self.router.matrix,) if self.shared_gate is None else (self.router.matrix, self.shared_gate)

    @property
    def weights_per_token(self) -> int:
        """Number of weights that a token is multiplied by."""
        shared = 0 if self.shared is None else self.shared.weights_per_token
        return self.router.matrix.size + self.router.chosen * self.experts[0].weights_per_token + shared

    @property
    def numbers_per_token(self) -> int:
        """Number of numbers of a token that pass through the norm before it, the activation and the residual sum."""
        blocks = [self.experts[0]] * self.router.chosen + ([] if self.shared is None else [self.shared])
        return sum(block.numbers_per_token for block in blocks)
