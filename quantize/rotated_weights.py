"""`RotatedWeights`: a checkpoint with rotated hidden states, which computes the same as before.

These are the rotations of QuaRot (Ashkboos et al. 2024) that can be merged into the weights. The norms' weights (gains)
are moved into the matrices that follow, because an RMSNorm without gains commutes with a rotation. Matrices that write
the hidden state then write it rotated, and matrices that read it rotate it back. In the same way values are rotated
within each head, and the output projection rotates them back.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from batchinfer.models.config import ModelConfig
from batchinfer.models.feed_forward import FeedForward
from batchinfer.models.mixer import Attention
from batchinfer.quantize.expanded_weights import NamedWeights
from batchinfer.quantize.rotation import rotation


class RotatedWeights:
    """Tensors by name, which are rotated as they are read.

    A tied head becomes a matrix of its own, because the final norm's gains are moved into it.
    """

    def __init__(self, weights: NamedWeights, config: ModelConfig, seed: int) -> None:
        _refuse_other_layers(config)
        self.weights, self.config = weights, config
        self.hidden = rotation(config.hidden_size, seed)
        sizes = {layer.attention.head_dim for layer in config.layers}
        self.heads = {size: rotation(size, seed + 1) for size in sizes}
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
            at, a, f = layer.prefix, layer.attention, layer.block
            for norm, readers in ((layer.input_norm, (a.q, a.k, a.v)), (layer.mlp_norm, (f.gate, f.up))):
                assert norm is not None
                gain = f"{at}{norm.name}.weight"
                yield gain, self._ones
                for matrix in filter(None, readers):
                    yield (
                        f"{at}{matrix.name}.weight",
                        partial(self._reading, gain=gain, head=self._head(matrix is a.v, a)),
                    )
            for matrix in (a.output, f.down):
                yield f"{at}{matrix.name}.weight", partial(self._writing, head=self._head(matrix is a.output, a))
                yield f"{at}{matrix.name}.bias", self._writing_bias
            yield f"{at}{a.v.name}.bias", partial(self._value_bias, head=self.heads[a.head_dim])

    def _ones(self, name: str) -> Tensor:
        """Return a norm's weight without its gains, which are moved into the matrices that follow."""
        return torch.ones_like(self.weights.read(name))

    def _embedding(self, name: str) -> Tensor:
        embedding = self.weights.read(name)
        return (embedding.float() @ self.hidden).to(embedding.dtype)

    def _lm_head(self, name: str) -> Tensor:
        weight = self.weights.read(f"{self.config.embedding.name}.weight" if self.config.tied else name)
        return (self._gained(weight, f"{self.config.norm.name}.weight") @ self.hidden).to(weight.dtype)

    def _head(self, values: bool, attention: Attention) -> Tensor | None:
        """Return the rotation of a head, for matrices that read or write values; None for others."""
        return self.heads[attention.head_dim] if values else None

    def _reading(self, name: str, gain: str, head: Tensor | None) -> Tensor:
        """Read a matrix that takes the hidden state from a norm; `head` rotates the values that it makes."""
        weight = self._gained(self.weights.read(name), gain) @ self.hidden
        return weight if head is None else _by_head(weight.t(), head).t()

    def _writing(self, name: str, head: Tensor | None) -> Tensor:
        """Read a matrix whose output is added to the hidden state; `head` has rotated the values that it takes."""
        weight = self.weights.read(name).float()
        return self.hidden.t() @ (weight if head is None else _by_head(weight, head))

    def _writing_bias(self, name: str) -> Tensor:
        bias = self.weights.read(name)
        return (bias.float() @ self.hidden).to(bias.dtype)

    def _value_bias(self, name: str, head: Tensor) -> Tensor:
        bias = self.weights.read(name)
        return _by_head(bias.float()[None], head)[0].to(bias.dtype)

    def _gained(self, weight_NK: Tensor, norm: str) -> Tensor:
        return weight_NK.float() * self.weights.read(norm).float()


def _by_head(x_NX: Tensor, head: Tensor) -> Tensor:
    """Rotate the last dimension, heads * head_dim, by `head` within each head."""
    return (x_NX.reshape(len(x_NX), -1, len(head)) @ head).flatten(1)


def _keeps_values(a: Attention) -> bool:
    """Return whether attention's outputs are sums of what a matrix of its own makes, and of nothing else."""
    return a.limit is None and a.source is None and a.gate is None and a.v.name != a.k.name


def _refuse_other_layers(config: ModelConfig) -> None:
    """Raise `ValueError` unless all layers have Llama's form: an RMSNorm before each block, matrices stored apart."""
    for layer in config.layers:
        before = (layer.input_norm, layer.mlp_norm, config.norm)
        plain = isinstance(layer.mixer, Attention)
        plain &= all(norm is not None and not norm.added and not norm.centered for norm in before)
        plain &= layer.attention_norm is None and layer.mlp_output_norm is None
        plain &= isinstance(layer.feed_forward, FeedForward) and layer.feed_forward.gate is not None
        plain &= not layer.parallel and layer.per_layer is None and layer.scalar is None
        plain = plain and _keeps_values(layer.attention)
        plain &= all(matrix.stored_rows == matrix.rows for matrix in layer.matrices)
        if not plain:
            raise ValueError(
                f"{layer.prefix}: --rotate is for layers of Llama's form, with an RMSNorm before each block, "
                "attention, and matrices that are stored apart; leave it out"
            )
