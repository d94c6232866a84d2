"""`Layer`: one layer of a decoder, described once: its matrices, its norms, and the names of both in a checkpoint.

A model family (`models/families/`) makes the description from `config.json`. The loader, the decoder, calibration, the
quantizer, rotation, the names in GGUF files and the cost of a step read it. Free of torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

LAYERS = "model.layers."
"""What the names of all layers' tensors begin with; the layer's number follows."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over `size` numbers."""

    name: str  # of the module in a checkpoint; of one in a layer, behind the layer's prefix
    size: int


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns]: it makes `rows` numbers of a token's `columns`."""

    name: str  # as a norm's
    rows: int
    columns: int
    bias: bool = False

    @property
    def size(self) -> int:
        """The number of its elements."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023) over rotated queries and keys, scaled by 1 / sqrt(head_dim)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # positions that a token sees, its own included; None: all before it
    q: Matrix
    k: Matrix
    v: Matrix
    output: Matrix
    head_norms: tuple[Norm, Norm] | None = None  # of each head of queries, and of keys, before they are rotated

    @property
    def width(self) -> int:
        """Numbers of a token's queries, keys and values together."""
        return self.q.rows + self.k.rows + self.v.rows


@dataclass(frozen=True)
class FeedForward:
    """`down(silu(gate(x)) * up(x))` (SwiGLU, Shazeer 2020)."""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Layer:
    """x += attention(input_norm(x)), then x += feed_forward(mlp_norm(x))."""

    prefix: str  # of the layer's tensors in a checkpoint: "model.layers.0."
    input_norm: Norm
    attention: Attention
    mlp_norm: Norm
    feed_forward: FeedForward

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """The matrix products in the order in which they are computed; matrices that read the same input are one."""
        a, f = self.attention, self.feed_forward
        return {"qkv": (a.q, a.k, a.v), "output": (a.output,), "gate_up": (f.gate, f.up), "down": (f.down,)}

    @property
    def matrices(self) -> list[Matrix]:
        """All of them, in the order of `products`."""
        return [matrix for matrices in self.products.values() for matrix in matrices]

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All of them."""
        return (self.input_norm, *(self.attention.head_norms or ()), self.mlp_norm)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of each tensor that a checkpoint holds of this layer."""
        for norm in self.norms:
            yield f"{self.prefix}{norm.name}.weight", (norm.size,)
        for matrix in self.matrices:
            yield f"{self.prefix}{matrix.name}.weight", (matrix.rows, matrix.columns)
            if matrix.bias:
                yield f"{self.prefix}{matrix.name}.bias", (matrix.rows,)
