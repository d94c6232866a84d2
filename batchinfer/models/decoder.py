"""`Decoder`: computes the layers that `models/layer.py` describes, for all model families.

Shapes: T tokens in a step, S of them sampled; D is the hidden size, V the vocabulary size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.backend import Backend, Product
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.rows import Rows
from batchinfer.models.batch import Batch
from batchinfer.models.config import ModelConfig
from batchinfer.models.layer import Layer


class TokenPositions(NamedTuple):
    """The rotary angles of a step's tokens, and the rows of the KV cache for their keys and values."""

    cos: Tensor  # [T, head_dim / 2]
    sin: Tensor  # [T, head_dim / 2]
    cache_rows: Tensor  # in the form of the backend's `rotate_and_store`


@dataclass(frozen=True)
class LayerWeights:
    """The loaded weights of one layer. The matrices q, k and v are one product; gate and up are another."""

    shape: Layer
    input_norm: Tensor  # [D]
    qkv: Product
    head_norms: tuple[Tensor, Tensor] | None  # weights of the norms of query heads and key heads, [head_dim] each
    output: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product

    @property
    def products(self) -> tuple[Product, ...]:
        """The layer's four matrix products."""
        return (self.qkv, self.output, self.gate_up, self.down)


class Decoder:
    """A model on its device: `forward(batch, caches)` returns float32 logits [S, V]. `load_decoder` makes one.

    Layers pass on two things: the residual stream x, and the output y of the last product, which is still to be added
    to x. The norm that comes next adds them. Each operation writes the type of rows that the product after it takes:
    floating point or 8 bits.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        stream: torch.dtype,
        embedding_VD: Tensor,
        layers: list[LayerWeights],
        norm_D: Tensor,
        head: Product,
    ) -> None:
        self.config, self.backend, self.stream = config, backend, stream
        self.embedding, self.layers, self.norm, self.head = embedding_VD, layers, norm_D, head
        cos, sin = config.rope.tables(config.max_positions)
        self.cos, self.sin = cos.to(backend.device), sin.to(backend.device)

    def caches(self, blocks: int, block_size: int, dtype: torch.dtype) -> list[KVCache]:
        """Make an empty KV cache for each layer."""
        shapes, b = [layer.shape.attention for layer in self.layers], self.backend
        return [
            KVCache(blocks, a.kv_heads, block_size, a.head_dim, dtype, b.device, b.values_by_column) for a in shapes
        ]

    @property
    def operations_per_token(self) -> int:
        """Operations of a token in the layers' matrix products, without the head: only sampled tokens need that."""
        return sum(p.operations_per_row for layer in self.layers for p in layer.products)

    @property
    def row_grain(self) -> int:
        """Row grain: the number of a step's tokens must be a multiple of it."""
        return max(p.row_grain for layer in self.layers for p in layer.products)

    @property
    def weight_bytes(self) -> int:
        """Bytes that all matrices take in memory."""
        held = sum(p.nbytes for layer in self.layers for p in layer.products) + self.embedding.nbytes
        shared = getattr(self.head, "weight", None) is self.embedding
        return held if shared else held + self.head.nbytes

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor:
        """Compute one step: store the tokens' keys and values, and return the sampled tokens' float32 logits [S, V]."""
        at = self.token_positions(batch, caches[0])
        x, y = self.embed(batch), None
        for i, cache in enumerate(caches):
            x, y = self.layer(i, cache, x, y, batch, at)
        return self.logits(x, y)

    def embed(self, batch: Batch) -> Tensor:
        """Return the residual stream [T, D] before the first layer."""
        return F.embedding(batch.tokens, self.embedding).to(self.stream)

    def token_positions(self, batch: Batch, cache: KVCache) -> TokenPositions:
        """Return the rotary angles and cache rows of the step's tokens, for all layers: their caches have one shape."""
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]
        return TokenPositions(cos, sin, self.backend.cache_rows(batch.slots, cache))

    def layer(
        self, i: int, cache: KVCache, x_TD: Tensor, y: Rows | None, batch: Batch, at: TokenPositions
    ) -> tuple[Tensor, Rows]:
        """Compute layer i: return the residual stream [T, D] and the output that is still to be added to it.

        x is the residual stream, and y the output of the layer before, which is still to be added to it. Both are
        overwritten. The last layer returns the sampled tokens only, [S, D].
        """
        layer, do, x = self.layers[i], self.backend, x_TD
        a, eps = layer.shape.attention, self.config.norm_eps
        qkv = layer.qkv(do.add_norm(x, y, layer.input_norm, eps, layer.qkv.takes)).dense()
        query = do.rotate_and_store(qkv, cache, a.heads, at.cos, at.sin, at.cache_rows, layer.head_norms, eps)
        mixed = do.attention(query, cache, batch.attention[a.window], a.head_dim**-0.5).flatten(1)
        if i + 1 == len(self.layers):  # from here on only the sampled tokens are needed
            x, mixed = x[batch.sampled], mixed[batch.sampled]
        y = layer.output(do.rows(mixed, layer.output.takes))
        gate_up = layer.gate_up(do.add_norm(x, y, layer.mlp_norm, eps, layer.gate_up.takes))
        return x, layer.down(do.silu_mul(gate_up, layer.down.takes))

    def logits(self, x_SD: Tensor, y: Rows | None) -> Tensor:
        """Return float32 logits [S, V] from the residual stream x and the last layer's output y."""
        c = self.config
        return self.head(self.backend.add_norm(x_SD, y, self.norm, c.norm_eps, self.head.takes)).dense().float()
