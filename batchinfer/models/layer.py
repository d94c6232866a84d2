"""`Layer`: the description of one decoder layer: its matrices, its norms, and the names of both in a checkpoint.

A model family (`models/families/`) makes it from `config.json`. The loader, the decoder, quantization, the reader of
GGUF files and the cost of a step all use this one description. This module does not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

LAYERS = "model.layers."
"""Beginning of the names of all layers' tensors; the layer's number follows."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over `size` numbers."""

    name: str  # module name in a checkpoint, without the layer's prefix
    size: int


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns], which maps a token's `columns` numbers to `rows` numbers."""

    name: str  # module name in a checkpoint, without the layer's prefix
    rows: int
    columns: int
    bias: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with rotary embedding, scaled by 1 / sqrt(head_dim)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # number of positions that a token sees, its own included; None: all up to its own
    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix
    head_norms: tuple[Norm, Norm] | None = None  # norms of each query head and each key head, before rotary embedding

    @property
    def width(self) -> int:
        """Size of a token's queries, keys and values together."""
        return self.q.rows + self.k.rows + self.v.rows


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward block `down(silu(gate(x)) * up(x))` (SwiGLU, Shazeer 2020)."""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Layer:
    """One layer: x += attention(input_norm(x)), then x += feed_forward(mlp_norm(x))."""

    prefix: str  # beginning of the layer's tensor names, such as "model.layers.0."
    input_norm: Norm
    attention: Attention
    mlp_norm: Norm
    feed_forward: FeedForward

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, in the order of computing. Matrices with the same input share a product."""
        a, f = self.attention, self.feed_forward
        return {"qkv": (a.q, a.k, a.v), "output": (a.output,), "gate_up": (f.gate, f.up), "down": (f.down,)}

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices, in the order of `products`."""
        return [matrix for matrices in self.products.values() for matrix in matrices]

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms."""
        return (self.input_norm, *(self.attention.head_norms or ()), self.mlp_norm)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each of the layer's tensors in a floating-point checkpoint."""
        for norm in self.norms:
            yield f"{self.prefix}{norm.name}.weight", (norm.size,)
        for matrix in self.matrices:
            yield f"{self.prefix}{matrix.name}.weight", (matrix.rows, matrix.columns)
            if matrix.bias:
                yield f"{self.prefix}{matrix.name}.bias", (matrix.rows,)
