"""`RotatedWeights`: a checkpoint whose hidden states are rotated, which leaves what it computes as it was.

QuaRot's offline part (Ashkboos et al. 2024): the norms' gains go into the matrices behind them, for a norm without
gains commutes with a rotation. What writes the hidden state then writes it rotated, and what reads it turns it back.
Values are rotated within each head likewise, and turned back by the output projection.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from batchinfer.models.config import ModelConfig
from batchinfer.models.weights import SafetensorsWeights
from batchinfer.quantize.rotation import rotation


class RotatedWeights:
    """Tensors by name, rotated as they are read. A tied head becomes one of its own, for the gains are in it."""

    def __init__(self, weights: SafetensorsWeights, config: ModelConfig, seed: int) -> None:
        self.weights, self.config = weights, config
        self.hidden = rotation(config.hidden_size, seed)
        self.head = rotation(config.attention.head_dim, seed + 1)
        self._readers = dict(self._by_name())

    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted({*self.weights.names(), f"{self.config.head.name}.weight"})

    def read(self, name: str) -> Tensor:
        """The tensor: matrices of layers in float32, the others in their own type."""
        return self._readers.get(name, self.weights.read)(name)

    def _by_name(self) -> Iterator[tuple[str, Callable[[str], Tensor]]]:
        """How each tensor that a rotation changes is read."""
        c = self.config
        yield f"{c.embedding.name}.weight", self._embedding
        yield f"{c.head.name}.weight", self._lm_head
        yield f"{c.norm.name}.weight", self._ones
        for layer in c.layers:
            at, a, f = layer.prefix, layer.attention, layer.feed_forward
            for norm, readers in ((layer.input_norm, (a.q, a.k, a.v)), (layer.mlp_norm, (f.gate, f.up))):
                gain = f"{at}{norm.name}.weight"
                yield gain, self._ones
                for matrix in readers:
                    yield f"{at}{matrix.name}.weight", partial(self._reading, gain=gain, values=matrix is a.v)
            for matrix in (a.output, f.down):
                yield f"{at}{matrix.name}.weight", partial(self._writing, values=matrix is a.output)
                yield f"{at}{matrix.name}.bias", self._writing_bias
            yield f"{at}{a.v.name}.bias", self._value_bias

    def _ones(self, name: str) -> Tensor:
        """A norm without its gains, which are in the matrices behind it."""
        return torch.ones_like(self.weights.read(name))

    def _embedding(self, name: str) -> Tensor:
        embedding = self.weights.read(name)
        return (embedding.float() @ self.hidden).to(embedding.dtype)

    def _lm_head(self, name: str) -> Tensor:
        weight = self.weights.read(f"{self.config.embedding.name}.weight" if self.config.tied else name)
        return (self._gained(weight, f"{self.config.norm.name}.weight") @ self.hidden).to(weight.dtype)

    def _reading(self, name: str, gain: str, values: bool) -> Tensor:
        """A matrix that reads the hidden state behind a norm."""
        weight = self._gained(self.weights.read(name), gain) @ self.hidden
        return self._by_head(weight.t()).t() if values else weight

    def _writing(self, name: str, values: bool) -> Tensor:
        """A matrix that adds to the hidden state."""
        weight = self.weights.read(name).float()
        return self.hidden.t() @ (self._by_head(weight) if values else weight)

    def _writing_bias(self, name: str) -> Tensor:
        bias = self.weights.read(name)
        return (bias.float() @ self.hidden).to(bias.dtype)

    def _value_bias(self, name: str) -> Tensor:
        bias = self.weights.read(name)
        return self._by_head(bias.float()[None])[0].to(bias.dtype)

    def _gained(self, weight_NK: Tensor, norm: str) -> Tensor:
        return weight_NK.float() * self.weights.read(norm).float()

    def _by_head(self, x_NX: Tensor) -> Tensor:
        """The last dimension, heads * head_dim, rotated within each head."""
        return (x_NX.reshape(len(x_NX), -1, self.config.attention.head_dim) @ self.head).flatten(1)
