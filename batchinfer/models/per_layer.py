"""`PerLayerEmbeddings` and `PerLayerBlock`: the description of vectors that each token has for each layer.

This module does not import torch.
"""

from dataclasses import dataclass

from batchinfer.models.tensors import Matrix, Norm


@dataclass(frozen=True)
class PerLayerEmbeddings:
    """A vector for each token and layer (Gemma 3n, Gemma Team 2025): `norm(projection(x)) + factor * table[token]`.

    x is the token's embedding as the first layer takes it. The vectors of all layers lie side by side.
    """

    size: int  # of one vector
    table: Matrix  # [tokens, layers * size]
    factor: float
    projection: Matrix  # [layers * size, hidden size]
    norm: Norm  # of each vector


@dataclass(frozen=True)
class PerLayerBlock:
    """What a layer makes of a token's vector e for it: x += norm(projection(activation(gate(x)) * e))."""

    gate: Matrix
    projection: Matrix
    norm: Norm
    activation: str

    @property
    def weights_per_token(self) -> int:
        """Number of weights that a token is multiplied by."""
        return self.gate.size + self.projection.size
