"""`Layer`: the description of one decoder layer: its matrices, its norms, and the names of both in a checkpoint.

A model family (`models/families/`) makes it from `config.json`. The loader, the decoder, quantization, the reader of
GGUF files and the cost of a step all use this one description. This module does not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.models.rope import Rope

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = "model.layers."
"""Beginning of the names of all layers' tensors; the layer's number follows."""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm over `size` numbers."""

    name: str  # module name in a checkpoint, without the layer's prefix
    size: int
    added: float = 0.0  # the weight is what is stored plus this: Gemma stores the weight's distance from 1
    factor: float = 1.0  # the weight is multiplied by it
    order: tuple[int, ...] | None = None  # of the numbers within a head, as of the matrix before it


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns], which maps a token's `columns` numbers to `rows` numbers.

    A checkpoint may store several as one module, one below the other. Then they have the same name, and each says where
    it lies.
    """

    name: str  # module name in a checkpoint, without the layer's prefix
    rows: int
    columns: int
    bias: bool = False
    first: int = 0  # the row of the module that it begins with
    module_rows: int | None = None  # of the whole module; None: its own
    factor: float = 1.0  # the product is multiplied by it
    order: tuple[int, ...] | None = None
    """Order of the rows within each head: row i of a head is the head's row `order[i]` in the checkpoint."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    @property
    def stored_rows(self) -> int:
        """Number of rows of the module in the checkpoint."""
        return self.rows if self.module_rows is None else self.module_rows

    @property
    def module(self) -> "Matrix":
        """The matrix that the checkpoint stores, of which this one is all or a part."""
        return Matrix(self.name, self.stored_rows, self.columns, self.bias)

    @property
    def stored_otherwise(self) -> bool:
        """Whether the module in the checkpoint is another matrix than this one."""
        return self.stored_rows != self.rows or self.factor != 1.0 or self.order is not None


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
    """Norms of queries and of keys before rotary embedding: of each head, or of all heads together."""
    value_norm: bool = False  # whether each head of the values is divided by its root mean square
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap), as in Gemma 2
    query_growth: "QueryGrowth | None" = None
    source: int | None = None
    """The layer whose keys and values it reads: then it makes none, and k, v and the norm of keys are that layer's."""

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The matrices of the product with the layer's input: of queries alone if another layer makes the rest."""
        return (self.q, self.k, self.v) if self.source is None else (self.q,)

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms of what the layer's own matrices make."""
        return (self.head_norms or ())[: len(self.matrices)]

    @property
    def shape(self) -> AttentionShape:
        """What a step's inputs to attention depend on."""
        return AttentionShape(self.window, self.heads, self.kv_heads, self.head_dim)

    def kv_bytes(self, number: int) -> int:
        """Return the bytes of a token's keys and values, where a number takes `number`; 8-bit heads have a scale."""
        return 2 * self.kv_heads * (self.head_dim * number + (4 if number == 1 else 0))

    @property
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
class FeedForward:
    """The block `down(activation(gate(x)) * up(x))` (GLU, Shazeer 2020), or `down(activation(up(x)))` without a gate.

    `activation` is silu, gelu_tanh or relu2.
    """

    gate: Matrix | None
    up: Matrix
    down: Matrix
    activation: str = "silu"


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


@dataclass(frozen=True)
class Ends:
    """What a model computes before its first layer and after its last one."""

    norm: Norm  # of the last layer's output
    embedding_factor: float = 1.0  # embeddings are multiplied by it
    logits_factor: float = 1.0  # logits are multiplied by it
    softcap: float | None = None  # after that, logits x become softcap * tanh(x / softcap)
    per_layer: PerLayerEmbeddings | None = None  # for the layers that have a `PerLayerBlock`


@dataclass(frozen=True)
class Layer:
    """One layer: x += attention(x), then x += feed_forward(x), with norms before or after each of the two, or both.

    Then, in some models, x += per_layer(x), and x *= scalar.
    """

    prefix: str  # beginning of the layer's tensor names, such as "model.layers.0."
    attention: Attention
    feed_forward: FeedForward
    input_norm: Norm | None = None  # of attention's input
    attention_norm: Norm | None = None  # of attention's output
    mlp_norm: Norm | None = None  # of the feed-forward block's input
    mlp_output_norm: Norm | None = None  # of the feed-forward block's output
    per_layer: PerLayerBlock | None = None
    scalar: str | None = None  # name of a tensor [1] in a checkpoint, without the layer's prefix
    unread: tuple[str, ...] = ()  # beginnings of the names of tensors that checkpoints have and nobody reads

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, in the order of computing. Matrices with the same input share a product."""
        a, f = self.attention, self.feed_forward
        inner = (f.up,) if f.gate is None else (f.gate, f.up)
        products = {"qkv": a.matrices, "output": (a.output,), "gate_up": inner, "down": (f.down,)}
        if (p := self.per_layer) is not None:
            products |= {"per_layer_gate": (p.gate,), "per_layer_projection": (p.projection,)}
        return products

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices, in the order of `products`."""
        return [matrix for matrices in self.products.values() for matrix in matrices]

    @property
    def modules(self) -> dict[str, tuple[Matrix, ...]]:
        """The matrices of each product as the checkpoint stores them."""
        return {name: tuple({m.name: m.module for m in found}.values()) for name, found in self.products.items()}

    @property
    def norms(self) -> tuple[Norm, ...]:
        """All norms."""
        around = (self.input_norm, *self.attention.norms, self.attention_norm, self.mlp_norm, self.mlp_output_norm)
        last = None if self.per_layer is None else self.per_layer.norm
        return tuple(norm for norm in (*around, last) if norm is not None)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each of the layer's tensors in a floating-point checkpoint."""
        for norm in self.norms:
            yield f"{self.prefix}{norm.name}.weight", (norm.size,)
        for matrix in (module for modules in self.modules.values() for module in modules):
            yield f"{self.prefix}{matrix.name}.weight", (matrix.rows, matrix.columns)
            if matrix.bias:
                yield f"{self.prefix}{matrix.name}.bias", (matrix.rows,)
        if self.scalar is not None:
            yield f"{self.prefix}{self.scalar}", (1,)
