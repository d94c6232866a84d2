"""One decoder for all families: it computes the layers that `models/layer.py` describes.

Shapes: T tokens of a step, S of them sampled, D hidden, V vocabulary.
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


class Places(NamedTuple):
    """Where a step's tokens stand: the angles of their positions [T, head_dim / 2], and their places in the caches."""

    cos: Tensor
    sin: Tensor
    cache: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """What the loader made of one layer; q, k and v are one product, gate and up another."""

    shape: Layer
    input_norm: Tensor  # [D]
    qkv: Product
    head_norms: tuple[Tensor, Tensor] | None  # of queries and keys, [head_dim] each
    output: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product

    @property
    def products(self) -> tuple[Product, ...]:
        """Its four matrix products."""
        return (self.qkv, self.output, self.gate_up, self.down)


class Decoder:
    """`forward(batch, caches) -> logits [S, V]`, float32. `load_decoder` makes one of a checkpoint.

    The residual stream and what is still to be added to it go from layer to layer side by side: the sum is taken where
    it is normed. What a product takes, its own rows in floating point or in 8 bits, decides in what the operation
    before it ends.
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
        """An empty cache for each layer."""
        shapes = [layer.shape.attention for layer in self.layers]
        return [KVCache(blocks, a.kv_heads, block_size, a.head_dim, dtype, self.backend.device) for a in shapes]

    @property
    def operations_per_token(self) -> int:
        """Of the layers' matrix products; the head runs for sampled tokens only."""
        return sum(p.operations_per_row for layer in self.layers for p in layer.products)

    @property
    def row_grain(self) -> int:
        """The tokens of a step must be a multiple of this."""
        return max(p.row_grain for layer in self.layers for p in layer.products)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices as they are held."""
        held = sum(p.nbytes for layer in self.layers for p in layer.products) + self.embedding.nbytes
        shared = getattr(self.head, "weight", None) is self.embedding
        return held if shared else held + self.head.nbytes

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor:
        """One step: stores the tokens' keys and values, returns float32 logits of the sampled tokens."""
        places = self.places(batch, caches[0])
        x, y = self.embed(batch), None
        for i, cache in enumerate(caches):
            x, y = self.layer(i, cache, x, y, batch, places)
        return self.logits(x, y)

    def embed(self, batch: Batch) -> Tensor:
        """The residual stream [T, D] before the first layer."""
        return F.embedding(batch.tokens, self.embedding).to(self.stream)

    def places(self, batch: Batch, cache: KVCache) -> Places:
        """What all layers need to know of the step; their caches are of one shape."""
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]
        return Places(cos, sin, self.backend.cache_places(batch.slots, cache))

    def layer(
        self, i: int, cache: KVCache, x_TD: Tensor, y: Rows | None, batch: Batch, places: Places
    ) -> tuple[Tensor, Rows]:
        """The residual stream [T, D] and what layer i adds to it; after the last one [S, D]. x and y are spent.

        y is what the layer before adds.
        """
        layer, do, x = self.layers[i], self.backend, x_TD
        a, eps = layer.shape.attention, self.config.norm_eps
        qkv = layer.qkv(do.add_norm(x, y, layer.input_norm, eps, layer.qkv.takes)).dense()
        query = do.rotate_and_store(qkv, cache, a.heads, places.cos, places.sin, places.cache, layer.head_norms, eps)
        mixed = do.attention(query, cache, batch.attention[a.window], a.head_dim**-0.5).flatten(1)
        if i + 1 == len(self.layers):  # nothing reads the other tokens any more
            x, mixed = x[batch.sampled], mixed[batch.sampled]
        y = layer.output(do.rows(mixed, layer.output.takes))
        gate_up = layer.gate_up(do.add_norm(x, y, layer.mlp_norm, eps, layer.gate_up.takes))
        return x, layer.down(do.silu_mul(gate_up, layer.down.takes))

    def logits(self, x_SD: Tensor, y: Rows | None) -> Tensor:
        """Of the residual stream after the last layer and what that adds, float32 [S, V]."""
        c = self.config
        return self.head(self.backend.add_norm(x_SD, y, self.norm, c.norm_eps, self.head.takes)).dense().float()
