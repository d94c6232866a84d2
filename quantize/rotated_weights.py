"""`RotatedWeights`: a checkpoint with rotated hidden states, which computes the same as before.

These are the rotations of QuaRot (Ashkboos et al. 2024) that can be merged into the weights. The norms' weights (gains)
are moved into the matrices that follow, because a norm without gains commutes with a rotation. Matrices that write the
hidden state then write it rotated, and matrices that read it rotate it back. In the same way values are rotated within
each head, and the output projection rotates them back.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from batchinfer.models.config import ModelConfig
from batchinfer.models.layer import Attention
from batchinfer.models.weights import SafetensorsWeights
from batchinfer.quantize.rotation import rotation


class RotatedWeights:
    """Tensors by name, which are rotated as they are read.

    A tied head becomes a matrix of its own, because the final norm's gains are moved into it.
    """

    def __init__(self, weights: SafetensorsWeights, config: ModelConfig, seed: int) -> None:
        _refuse_other_layers(config)
        self.weights, self.config = weights, config
        self.hidden = rotation(config.hidden_size, seed)
        self.head = rotation(config.attention.head_dim, seed + 1)
        self._readers = dict(self._by_name())

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return sorted({*self.weights.names(), f"{self.config.head.name}.weight"})

    def read(self, name: str) -> Tensor:
        """Return a tensor: matrices of layers in float32, other tensors in their own type."""
        return self._readers.get(name, self.weights.read)(name)

    def _by_name(self) -> Iterator[tuple[str, Callable[[str], Tensor]]]:
        """Yield (name, function that reads it) for each tensor that the rotation changes."""
        c = self.config
        yield f"{c.embedding.name}.weight", self._embedding
        yield f"{c.head.name}.weight", self._lm_head
        yield f"{c.norm.name}.weight", self._ones
        for layer in c.layers:
            at, a, f = layer.prefix, layer.attention, layer.feed_forward
            for norm, readers in ((layer.input_norm, (a.q, a.k, a.v)), (layer.mlp_norm, (f.gate, f.up))):
                assert norm is not None
                gain = f"{at}{norm.name}.weight"
                yield gain, self._ones
                for matrix in filter(None, readers):
                    yield f"{at}{matrix.name}.weight", partial(self._reading, gain=gain, values=matrix is a.v)
            for matrix in (a.output, f.down):
                yield f"{at}{matrix.name}.weight", partial(self._writing, values=matrix is a.output)
                yield f"{at}{matrix.name}.bias", self._writing_bias
            yield f"{at}{a.v.name}.bias", self._value_bias

    def _ones(self, name: str) -> Tensor:
        """Return a norm's weight without its gains, which are moved into the matrices that follow."""
        return torch.ones_like(self.weights.read(name))

    def _embedding(self, name: str) -> Tensor:
        embedding = self.weights.read(name)
        return (embedding.float() @ self.hidden).to(embedding.dtype)

    def _lm_head(self, name: str) -> Tensor:
        weight = self.weights.read(f"{self.config.embedding.name}.weight" if self.config.tied else name)
        return (self._gained(weight, f"{self.config.norm.name}.weight") @ self.hidden).to(weight.dtype)

    def _reading(self, name: str, gain: str, values: bool) -> Tensor:
        """Read a matrix that takes the hidden state from a norm."""
        weight = self._gained(self.weights.read(name), gain) @ self.hidden
        return self._by_head(weight.t()).t() if values else weight

    def _writing(self, name: str, values: bool) -> Tensor:
        """Read a matrix whose output is added to the hidden state."""
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
        """Rotate the last dimension, heads * head_dim, within each head."""
        return (x_NX.reshape(len(x_NX), -1, self.config.attention.head_dim) @ self.head).flatten(1)


def _refuse_other_layers(config: ModelConfig) -> None:
    """Raise `ValueError` unless all layers have Llama's form: attention, norms before blocks, matrices stored apart."""
    for layer in config.layers:
        before = (layer.input_norm, layer.mlp_norm, config.norm)
        plain = isinstance(layer.mixer, Attention) and all(norm is not None and not norm.added for norm in before)
        plain &= layer.attention_norm is None and layer.mlp_output_norm is None and layer.feed_forward.gate is not None
        plain &= all(matrix.stored_rows == matrix.rows for matrix in layer.matrices)
        if not plain:
            raise ValueError(
                f"{layer.prefix}: --rotate is for layers of Llama's form, with a norm before each block, attention, "
                "and matrices that are stored apart; leave it out"
            )
