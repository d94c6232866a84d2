"""`Mixer`: the description of what mixes positions in a layer: attention, a short convolution or a gated DeltaNet.

This module does not import torch, except to compute factors.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.kernels.grain import TILE
from batchinfer.models.rope import Rope
from batchinfer.models.tensors import Matrix, Norm, Vectors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with rotary embedding."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # number of positions that a token sees, its own included; None: all up to its own
    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix
    rope: Rope
    scale: float  # of the products of queries and keys
    head_norms: tuple[Norm, Norm] | None = None
    """Norms of queries and of keys: of each head, or of all heads together."""
    normed_after_rope: bool = False  # whether each head is normed after rotary embedding, not before it
    value_norm: bool = False  # whether each head of the values is divided by its root mean square
    limit: float | None = None  # queries, keys and values are clamped to [-limit, limit] when they are made
    sinks: str | None = None
    """Name of a tensor [heads]: softmax counts one score more for each head, which stands for no value (gpt-oss)."""
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap), as in Gemma 2
    query_growth: "QueryGrowth | None" = None
    source: int | None = None
    """The layer whose keys and values it reads: then it makes none, and k, v and the norm of keys are that layer's."""
    gate: Matrix | None = None  # the outputs are multiplied by sigmoid(gate(x)), as in Qwen3.5

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices of the product with the layer's input: of queries alone if another layer makes the rest."""
        return (self.q, self.k, self.v) if self.source is None else (self.q,)

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, as `Layer.products`."""
        return {"qkv": (*self.matrices, *filter(None, [self.gate])), "output": (self.output,)}

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms of what the layer's own matrices make."""
        return (self.head_norms or ())[: len(self.matrices)]

    @property
    def vectors(self) -> tuple["Vectors", ...]:
        """The tensors that are neither matrices nor norms."""
        return () if self.sinks is None else (Vectors(self.sinks, (self.heads,)),)

    @cached_property
    def shape(self) -> AttentionShape:
        """What a step's inputs to attention depend on."""
        return AttentionShape(self.window, self.heads, self.kv_heads, self.head_dim)

    def kv_bytes(self, number: int) -> int:
        """Return the bytes of a token's keys and values, where a number takes `number`; 8-bit heads have a scale."""
        return 2 * self.kv_heads * (self.head_dim * number + (4 if number == 1 else 0))

    @cached_property
    def width(self) -> int:
        """Size of what the layer's own matrices make of a token: of its queries, keys and values together."""
        return sum(matrix.rows for matrix in self.matrices)

    @property
    def normed_together(self) -> bool:
        """Whether the norms of queries and keys are over all heads together."""
        return self.head_norms is not None and self.head_norms[0].size != self.head_dim


@dataclass(frozen=True)
class QueryGrowth:
    """The query at position p is multiplied by `1 + beta * log(1 + floor(p / span))`, as in Llama 4 and Ministral 3."""

    beta: float
    span: int

    def factors(self, positions: int) -> "Tensor":
        """Return the factor of each position, float32 [positions]."""
        import torch

        return 1 + self.beta * torch.log1p(torch.arange(positions).div(self.span, rounding_mode="floor"))


@dataclass(frozen=True)
class ShortConvolution:
    """LFM2's mixer (Liquid AI 2025), `output(c * convolution(b * x))`, where b, c and x are made of its input.

    The convolution goes over the last `length` positions, each channel by itself.
    """

    length: int
    bcx: tuple[Matrix, Matrix, Matrix]
    output: Matrix
    taps: Vectors  # [channels, 1, length], the last one of the position itself
    taps_bias: Vectors | None = None  # [channels]

    @property
    def channels(self) -> int:
        """Number of channels of the convolution."""
        return self.taps.shape[0]

    @property
    def state_numbers(self) -> tuple[int, int]:
        """Numbers of a sequence's state: the last inputs of the convolution, and sums over all positions (none)."""
        return (self.length - 1) * self.channels, 0

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, as `Layer.products`."""
        return {"qkv": self.bcx, "output": (self.output,)}

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms inside: none."""
        return ()

    @property
    def vectors(self) -> tuple[Vectors, ...]:
        """The tensors that are neither matrices nor norms."""
        return (self.taps, *filter(None, [self.taps_bias]))


@dataclass(frozen=True)
class GatedDeltaNet:
    """Linear attention with the gated delta rule (Yang, Kautz and Hatamizadeh 2024), as in Qwen3.5.

    Queries, keys and values go through a convolution over the last `length` positions and through SiLU. The state of a
    head of values is a matrix [key_dim, value_dim]. The outputs are normed by head and multiplied by `silu(z(x))`.
    """

    heads: int  # of values
    key_heads: int  # of queries and of keys; each serves heads / key_heads neighbouring heads of values
    key_dim: int
    value_dim: int
    length: int
    qkv: tuple[Matrix, Matrix, Matrix]
    z: Matrix
    rates: tuple[Matrix, Matrix]
    """Two numbers for each head of values: how much of the old value is replaced, and how fast the state decays."""
    output: Matrix
    taps: Vectors  # [channels, 1, length], the last one of the position itself
    decay_log: Vectors  # [heads], the logarithm of the decay's factor
    decay_bias: Vectors  # [heads]
    norm: Norm  # of each head's outputs

    @property
    def channels(self) -> int:
        """Number of channels of the convolution."""
        return self.taps.shape[0]

    @property
    def state_numbers(self) -> tuple[int, int]:
        """Numbers of a sequence's state: the last inputs of the convolution, and sums over all positions."""
        return (self.length - 1) * self.channels, self.heads * self.key_dim * self.value_dim

    @property
    def tile_multiplications(self) -> int:
        """Number of multiplications of a tile of a prompt: with the state, and of its tokens with each other."""
        k, v = self.key_dim, self.value_dim
        return self.heads * TILE * (3 * k * v + TILE * (2 * k + 3 * v // 2))

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, as `Layer.products`.

        The rates have one of their own: checkpoints in few bits often leave these small matrices in floating point.
        """
        return {"qkv": (*self.qkv, self.z), "rates": self.rates, "output": (self.output,)}

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms inside."""
        return (self.norm,)

    @property
    def vectors(self) -> tuple[Vectors, ...]:
        """The tensors that are neither matrices nor norms."""
        return (self.taps, self.decay_log, self.decay_bias)


Mixer = Attention | ShortConvolution | GatedDeltaNet
"""What mixes positions in a layer. All but attention keep a state of fixed size for each sequence."""


def state_bytes(mixer: ShortConvolution | GatedDeltaNet, number: int) -> int:
    """Return the bytes of a sequence's state, where an input of the convolution takes `number`; sums are float32."""
    inputs, sums = mixer.state_numbers
    return number * inputs + 4 * sums
