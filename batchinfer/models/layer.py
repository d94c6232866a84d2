"""`Layer`: the description of one decoder layer: its matrices, its norms, and the names of both in a checkpoint.

A model family (`models/families/`) makes it from `config.json`. The loader, the decoder, quantization, the reader of
GGUF files and the cost of a step all use this one description. This module does not import torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from batchinfer.models.feed_forward import Experts, FeedForward
from batchinfer.models.mixer import Attention, Mixer
from batchinfer.models.per_layer import PerLayerBlock, PerLayerEmbeddings
from batchinfer.models.tensors import Matrix, Norm

LAYERS = "model.layers."
"""Beginning of the names of all layers' tensors; the layer's number follows."""


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
