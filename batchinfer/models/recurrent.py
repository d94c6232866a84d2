"""What mixers other than attention compute between their matrix products: short convolutions and gated DeltaNets."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.gated_delta import DeltaTokens, delta_rule
from batchinfer.kernels.norm import rms_norm
from batchinfer.kernels.short_convolution import convolve
from batchinfer.kernels.state_pool import StateBatch, StatePool, StateShape
from batchinfer.models.mixer import GatedDeltaNet, ShortConvolution
from batchinfer.models.tensors import Vectors

LEAST = 1e-6
"""Added to the square of the length by which queries and keys are divided."""

Read = Callable[[str, tuple[int, ...]], Tensor]
"""Returns a tensor of the layer by its name and shape."""


@dataclass(frozen=True)
class ConvolutionWeights:
    """The weights of a short convolution beside its matrices, float32."""

    shape: ShortConvolution
    taps: Tensor  # [length, channels]
    bias: Tensor | None  # [channels]

    @classmethod
    def of(cls, shape: ShortConvolution, read: Read) -> "ConvolutionWeights":
        """Read the weights."""
        bias = shape.taps_bias
        return cls(shape, _taps(shape.taps, read), None if bias is None else read(bias.name, bias.shape).float())

    @property
    def state(self) -> StateShape:
        """The sizes of the layer's state."""
        return state_shape(self.shape)

    def mix(self, made: dict[str, Tensor], pool: StatePool, batch: StateBatch) -> Tensor:
        """Return the input [T, channels] of the product `output`; `made` are the products before it, by name."""
        b, c, x = made["qkv"].chunk(3, -1)
        return c * convolve(b * x, pool.inputs, batch, self.taps, self.bias)


@dataclass(frozen=True)
class DeltaWeights:
    """The weights of a gated DeltaNet beside its matrices, float32."""

    shape: GatedDeltaNet
    taps: Tensor  # [length, channels]
    decay_log: Tensor  # [heads]
    decay_bias: Tensor  # [heads]
    norm: Tensor  # [value_dim]
    eps: float  # of the norm

    @classmethod
    def of(cls, shape: GatedDeltaNet, read: Read, eps: float) -> "DeltaWeights":
        """Read the weights."""
        log, bias = (read(v.name, v.shape).float() for v in (shape.decay_log, shape.decay_bias))
        norm = read(f"{shape.norm.name}.weight", (shape.norm.size,)).float()
        return cls(shape, _taps(shape.taps, read), log, bias, norm, eps)

    @property
    def state(self) -> StateShape:
        """The sizes of the layer's state."""
        return state_shape(self.shape)

    def mix(self, made: dict[str, Tensor], pool: StatePool, batch: StateBatch) -> Tensor:
        """Return the input [T, heads * value_dim] of the product `output`; `made` are the products before it."""
        assert pool.matrices is not None
        shape = self.shape
        qkv, z = torch.split(made["qkv"], [shape.channels, shape.heads * shape.value_dim], -1)
        mixed = F.silu(convolve(qkv, pool.inputs, batch, self.taps)).float()
        keys = shape.key_heads * shape.key_dim
        query, key, value = torch.split(mixed, [keys, keys, shape.heads * shape.value_dim], -1)
        query, key = (_unit(x.view(len(x), -1, shape.key_dim)) for x in (query, key))
        rate, decay = self._rates(made["rates"])
        value = value.reshape(len(value), -1, shape.value_dim)
        tokens = DeltaTokens(query * shape.key_dim**-0.5, key, value, rate, decay)
        normed = rms_norm(delta_rule(tokens, pool.matrices, batch), self.norm, self.eps)
        return (normed.flatten(1) * F.silu(z.float())).to(z.dtype)

    def _rates(self, made_TX: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's rate and the logarithm of its decay, float32 [T, heads].

        They are computed in float64: torch's functions of few numbers in float32 round by how many there are.
        """
        b, a = made_TX.double().chunk(2, -1)
        decay = -self.decay_log.double().exp() * F.softplus(a + self.decay_bias.double())
        return b.sigmoid().float(), decay.float()


RecurrentWeights = ConvolutionWeights | DeltaWeights


def recurrent_weights(shape: ShortConvolution | GatedDeltaNet, read: Read, eps: float) -> RecurrentWeights:
    """Read the weights of a mixer beside its matrices; `eps` is that of norms."""
    if isinstance(shape, ShortConvolution):
        return ConvolutionWeights.of(shape, read)
    return DeltaWeights.of(shape, read, eps)


def state_shape(shape: ShortConvolution | GatedDeltaNet) -> StateShape:
    """Return the sizes of the state of a layer with this mixer."""
    if isinstance(shape, ShortConvolution):
        return StateShape(shape.length - 1, shape.channels)
    return StateShape(shape.length - 1, shape.channels, shape.heads, shape.key_dim, shape.value_dim)


def _taps(taps: Vectors, read: Read) -> Tensor:
    """Return the taps [length, channels] of a tensor [channels, 1, length]."""
    return read(taps.name, taps.shape).float()[:, 0].t().contiguous()


def _unit(x: Tensor) -> Tensor:
    """Divide by the length over the last dimension."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + LEAST)
