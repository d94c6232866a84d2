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
    """A norm over `size` numbers: an RMSNorm, or a LayerNorm, which subtracts their mean first."""

    name: str  # module name in a checkpoint, without the layer's prefix
    size: int
    added: float = 0.0  # the weight is what is stored plus this: Gemma stores the weight's distance from 1
    factor: float = 1.0  # the result is multiplied by it
    order: tuple[int, ...] | None = None  # of the numbers within a head, as of the matrix before it
    centered: bool = False  # whether it is a LayerNorm
    weight: bool = True  # whether a checkpoint stores a weight; without one, it is 1
    bias: bool = False  # whether a checkpoint stores a bias, which only a LayerNorm may have
    heads: int | None = None  # number of heads, if each has a weight of its own
    modules: tuple[str, ...] = ()  # if each head's weights are a module of their own: these, not `name`

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each of its tensors in a checkpoint."""
        return (self.size,) if self.heads is None or self.modules else (self.heads, self.size)

    def names(self, kind: str) -> list[str]:
        """Return the names of its tensors of a kind, weight or bias, in a checkpoint."""
        stored = self.weight if kind == "weight" else self.bias
        return [f"{module}.{kind}" for module in self.modules or (self.name,)] if stored else []

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each of its tensors in a checkpoint."""
        yield from ((name, self.shape) for kind in ("weight", "bias") for name in self.names(kind))


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns], which maps a token's `columns` numbers to `rows` numbers.

    A checkpoint may store several as one module, one below the other. Then they have the same name, and each says where
    it lies: in rows `first`, `first + step` and so on.
    """

    name: str  # module name in a checkpoint, without the layer's prefix
    rows: int
    columns: int
    bias: bool = False
    first: int = 0  # the row of the module that it begins with
    module_rows: int | None = None  # of the whole module; None: its own
    step: int = 1  # it takes every so-manieth row of the module
    factor: float = 1.0  # the product is multiplied by it
    order: tuple[int, ...] | None = None
    """Order of the rows within each head: row i of a head is the head's row `order[i]` in the checkpoint."""
    stack: "Stack | None" = None
    """How the modules of several experts, one below the other in `module_rows`, are stored as one tensor."""
    head_rows: int | None = None
    """Rows of the module from one head to the next; None: as many as `order` names. A module may hold, for each head,
    its rows and then those of something else."""

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
        return Matrix(self.name, self.stored_rows, self.columns, self.bias, stack=self.stack)

    @property
    def stored_otherwise(self) -> bool:
        """Whether the module in the checkpoint is another matrix than this one."""
        return self.stored_rows != self.rows or self.factor != 1.0 or self.order is not None

    @property
    def weight_name(self) -> str:
        """Name of the weight's tensor, without the layer's prefix."""
        return self.name if self.stack is not None and self.stack.bare else f"{self.name}.weight"

    @property
    def bias_name(self) -> str:
        """Name of the bias's tensor, without the layer's prefix."""
        return f"{self.name}_bias" if self.stack is not None and self.stack.bare else f"{self.name}.bias"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of the module's tensors as a floating-point checkpoint stores them."""
        rows, stack = self.stored_rows, self.stack
        yield self.weight_name, (rows, self.columns) if stack is None else stack.weight_shape(rows, self.columns)
        if self.bias:
            yield self.bias_name, (rows,) if stack is None else (stack.experts, rows // stack.experts)


@dataclass(frozen=True)
class Stack:
    """The form of a tensor with the matrices of all experts: [experts, rows, columns], or transposed ones."""

    experts: int
    transposed: bool = False  # [experts, columns, rows]
    bare: bool = False  # the tensors' names are the module's, and its name with _bias

    def weight_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Return the shape of the tensor that holds so many rows, those of all experts together."""
        each = rows // self.experts
        return (self.experts, columns, each) if self.transposed else (self.experts, each, columns)


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

    `activation` is silu, gelu, gelu_tanh, relu2, or clamped_swiglu, which computes of gate g and up u
    `min(g, 7) * sigmoid(1.702 * min(g, 7)) * (clamp(u, -7, 7) + 1)`, as in gpt-oss.
    """

    gate: Matrix | None
    up: Matrix
    down: Matrix
    activation: str = "silu"

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, in the order of computing."""
        return {"gate_up": (self.up,) if self.gate is None else (self.gate, self.up), "down": (self.down,)}

    @property
    def weights_per_token(self) -> int:
        """Number of weights that a token is multiplied by."""
        return sum(matrix.size for matrices in self.products.values() for matrix in matrices)

    @property
    def numbers_per_token(self) -> int:
        """Number of numbers of a token that pass through the norm before it, the activation and the residual sum."""
        return 2 * self.up.columns + 3 * self.down.columns


@dataclass(frozen=True)
class Router:
    """Chooses experts for each token by scores, softmax or sigmoid of its logits, computed in float32.

    Their weights are the scores of the chosen ones. `bias` names a tensor [experts] that is added to the scores only to
    choose, as in DeepSeek-V3. There the experts also lie in groups, and only those of the best groups are chosen, by
    the sum of a group's two best scores.
    """

    matrix: Matrix  # [experts, D]
    chosen: int  # number of experts that are chosen for a token
    scores: str = "softmax"
    normalized: bool = True  # the weights are divided by their sum
    factor: float = 1.0  # then they are multiplied by it
    bias: str | None = None
    bias_shape: tuple[int, ...] = ()  # as stored
    groups: int = 1
    chosen_groups: int = 1


@dataclass(frozen=True)
class Experts:
    """A mixture of experts (Shazeer et al. 2017): the weighted sum of the chosen experts, and of one that all share."""

    router: Router
    experts: tuple[FeedForward, ...]  # all of one shape
    shared: FeedForward | None = None
    shared_gate: Matrix | None = None  # [1, D]: the shared expert's output is multiplied by the sigmoid of its product

    @property
    def products(self) -> dict[str, tuple[Matrix, ...]]:
        """Matrices of each matrix product, in the order of computing."""
        blocks = {f"expert {i}": expert for i, expert in enumerate(self.experts)}
        if self.shared is not None:
            blocks["shared expert"] = self.shared
        return {f"{of} {name}": found for of, block in blocks.items() for name, found in block.products.items()}

    @property
    def unquantized(self) -> tuple[Matrix, ...]:
        """Matrices that stay in floating point: they are small, and decide which experts compute."""
        return (self.router.matrix,) if self.shared_gate is None else (self.router.matrix, self.shared_gate)

    @property
    def weights_per_token(self) -> int:
        """Number of weights that a token is multiplied by."""
        shared = 0 if self.shared is None else self.shared.weights_per_token
        return self.router.matrix.size + self.router.chosen * self.experts[0].weights_per_token + shared

    @property
    def numbers_per_token(self) -> int:
        """Number of numbers of a token that pass through the norm before it, the activation and the residual sum."""
        blocks = [self.experts[0]] * self.router.chosen + ([] if self.shared is None else [self.shared])
        return sum(block.numbers_per_token for block in blocks)


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


@dataclass(frozen=True)
class Ends:
    """What a model computes before its first layer and after its last one."""

    norm: Norm  # of the last layer's output
    norm_eps: float  # of all norms: added to the mean square before the root is taken
    embedding: str = "model.embed_tokens"  # module names of embedding and output head in a checkpoint
    head: str = "lm_head"
    head_bias: bool = False  # whether the output head has a bias
    embedding_factor: float = 1.0  # embeddings are multiplied by it
    logits_factor: float = 1.0  # logits are multiplied by it
    softcap: float | None = None  # after that, logits x become softcap * tanh(x / softcap)
    per_layer: PerLayerEmbeddings | None = None  # for the layers that have a `PerLayerBlock`
    tied: bool | None = None  # whether the head is the embedding's matrix; None: `tie_word_embeddings`
    left_aside: tuple[str, ...] = ()  # beginnings of the names of tensors that are not read


@dataclass(frozen=True)
class Layer:
    """One layer: x += mixer(x), then x += feed_forward(x), with norms before or after each of the two, or both.

    In a parallel layer both see the same x: x += mixer(x) + feed_forward(x). Then, in some models, x += per_layer(x),
    and x *= scalar.
    """

    prefix: str  # beginning of the layer's tensor names, such as "model.layers.0."
    mixer: Mixer
    feed_forward: FeedForward | Experts
    input_norm: Norm | None = None  # of the mixer's input
    attention_norm: Norm | None = None  # of the mixer's output
    mlp_norm: Norm | None = None  # of the feed-forward block's input
    mlp_output_norm: Norm | None = None  # of the feed-forward block's output
    parallel: bool = False
    per_layer: PerLayerBlock | None = None
    scalar: str | None = None  # name of a tensor [1] in a checkpoint, without the layer's prefix
    unread: tuple[str, ...] = ()  # beginnings of the names of tensors that checkpoints have and nobody reads

    @property
    def block(self) -> FeedForward:
        """The feed-forward block of a layer that has no experts."""
        assert isinstance(self.feed_forward, FeedForward)
        return self.feed_forward

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
        p = self.per_layer
        last = {} if p is None else {"per_layer_gate": (p.gate,), "per_layer_projection": (p.projection,)}
        return {**self.mixer.products, **self.feed_forward.products, **last}

    @property
    def numbers_behind_attention(self) -> int:
        """Number of numbers of a token that pass through norms, activations and residual sums behind attention."""
        p = self.per_layer
        return self.feed_forward.numbers_per_token + (0 if p is None else 2 * p.gate.columns + 3 * p.projection.columns)

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
        """All norms, each once."""
        around = (self.input_norm, *self.mixer.norms, self.attention_norm, self.mlp_norm, self.mlp_output_norm)
        last = None if self.per_layer is None else self.per_layer.norm
        return tuple(dict.fromkeys(norm for norm in (*around, last) if norm is not None))

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each of the layer's tensors in a floating-point checkpoint."""
        for norm in self.norms:
            yield from ((f"{self.prefix}{name}", shape) for name, shape in norm.tensors())
        found = [module for modules in self.modules.values() for module in modules]
        if isinstance(self.feed_forward, Experts):
            router = self.feed_forward.router
            found += self.feed_forward.unquantized
            if router.bias is not None:
                yield f"{self.prefix}{router.bias}", router.bias_shape
        for vectors in self.mixer.vectors:
            yield f"{self.prefix}{vectors.name}", vectors.shape
        if self.scalar is not None:
            yield f"{self.prefix}{self.scalar}", (1,)
        for name, shape in dict(tensor for module in found for tensor in module.tensors()).items():
            yield f"{self.prefix}{name}", shape
