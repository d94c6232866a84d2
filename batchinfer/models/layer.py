"""`Layer`: the description of one decoder layer: its matrices, its norms, and the names of both in a checkpoint.

A model family (`models/families/`) makes it from `config.json`. The loader, the decoder, quantization, the reader of
GGUF files and the cost of a step all use this one description. This module does not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    head_rows: int | None = None
    """Rows of the module from one head to the next; None: as many as `order` names. A module may hold, for each head,
    its queries and then something else."""

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
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap), as in Gemma 2
    query_growth: "QueryGrowth | None" = None
    gate: Matrix | None = None  # the outputs are multiplied by sigmoid(gate(x)), as in Qwen3.5

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, as `Layer.products`."""
        return {"qkv": (self.q, self.k, self.v, *filter(None, [self.gate])), "output": (self.output,)}

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms inside."""
        return self.head_norms or ()

    @property
    def vectors(self) -> tuple["Vectors", ...]:
        """The tensors that are neither matrices nor norms: none."""
        return ()

    @property
    def width(self) -> int:
        """Size of a token's queries, keys and values together."""
        return self.q.rows + self.k.rows + self.v.rows

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
class Vectors:
    """A tensor that is neither a matrix nor a norm: numbers for each channel or head. It is never quantized."""

    name: str  # in a checkpoint, without the layer's prefix
    shape: tuple[int, ...]


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
class Ends:
    """What a model computes before its first layer and after its last one."""

    norm: Norm  # of the last layer's output
    embedding_factor: float = 1.0  # embeddings are multiplied by it
    logits_factor: float = 1.0  # logits are multiplied by it
    softcap: float | None = None  # after that, logits x become softcap * tanh(x / softcap)
    eps: float | None = None  # of all norms; None: `rms_norm_eps`
    tied: bool | None = None  # whether the head is the embedding's matrix; None: `tie_word_embeddings`
    left_aside: tuple[str, ...] = ()  # beginnings of the names of tensors that are not read


@dataclass(frozen=True)
class Layer:
    """One layer: x += mixer(x), then x += feed_forward(x), with norms before or after each of the two, or both."""

    prefix: str  # beginning of the layer's tensor names, such as "model.layers.0."
    mixer: Mixer
    feed_forward: FeedForward
    input_norm: Norm | None = None  # of the mixer's input
    attention_norm: Norm | None = None  # of the mixer's output
    mlp_norm: Norm | None = None  # of the feed-forward block's input
    mlp_output_norm: Norm | None = None  # of the feed-forward block's output

    @property
    def attention(self) -> Attention:
        """The mixer of a layer that is known to have attention."""
        assert isinstance(self.mixer, Attention), f"{self.prefix} has no attention"
        return self.mixer

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, in the order of computing. Matrices with the same input share a product.

        Those of the mixer's input come first, `qkv` in front, and `output` is its last one.
        """
        f = self.feed_forward
        inner = (f.up,) if f.gate is None else (f.gate, f.up)
        return {**self.mixer.products, "gate_up": inner, "down": (f.down,)}

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
        around = (self.input_norm, *self.mixer.norms, self.attention_norm)
        return tuple(norm for norm in (*around, self.mlp_norm, self.mlp_output_norm) if norm is not None)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each of the layer's tensors in a floating-point checkpoint."""
        for norm in self.norms:
            yield f"{self.prefix}{norm.name}.weight", (norm.size,)
        for vectors in self.mixer.vectors:
            yield f"{self.prefix}{vectors.name}", vectors.shape
        for matrix in (module for modules in self.modules.values() for module in modules):
            yield f"{self.prefix}{matrix.name}.weight", (matrix.rows, matrix.columns)
            if matrix.bias:
                yield f"{self.prefix}{matrix.name}.bias", (matrix.rows,)
