"""`Decoder`: computes the layers that `models/layer.py` describes, for all model families.

Shapes: T tokens in a step, S of them sampled; D is the hidden size, V the vocabulary size.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.backend import Backend
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.norm import NormWeights
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows, add_rows
from batchinfer.models.batch import Batch
from batchinfer.models.config import ModelConfig
from batchinfer.models.feed_forward import ExpertsWeights, FeedForwardWeights
from batchinfer.models.layer import Layer


class TokenPositions(NamedTuple):
    """What depends on the positions of a step's tokens, and the rows of the KV cache for their keys and values."""

    angles: list[tuple[Tensor, Tensor]]  # (cos, sin) of each rotary embedding, [T, head_dim / 2] each
    growth: Tensor | None  # [T, 1, 1] factor on queries, for models whose queries grow with the position
    cache_rows: Tensor  # in the form of the backend's `rotate_and_store`


@dataclass(frozen=True)
class LayerWeights:
    """The loaded weights of one layer. The matrices q, k and v are one product."""

    shape: Layer
    input_norm: NormWeights | None  # [D], as the other norms of the residual stream and of what is added to it
    qkv: Product
    head_norms: tuple[NormWeights, NormWeights] | None
    """Norms of queries and of keys. Their weights are [head_dim] each; or [heads, head_dim] and [kv_heads, head_dim], a
    weight for each head; or [heads * head_dim] and [kv_heads * head_dim], over all heads together."""
    sinks: Tensor | None  # [heads] float32
    output: Product
    attention_norm: NormWeights | None
    mlp_norm: NormWeights | None
    feed_forward: FeedForwardWeights | ExpertsWeights
    mlp_output_norm: NormWeights | None

    @property
    def products(self) -> tuple[Product, ...]:
        """The layer's matrix products."""
        return (self.qkv, self.output, *self.feed_forward.products)

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row in the layer's matrix products."""
        attention = self.qkv.operations_per_row + self.output.operations_per_row
        return attention + self.feed_forward.operations_per_row


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
        norm_D: NormWeights,
        head: Product,
    ) -> None:
        self.config, self.backend, self.stream = config, backend, stream
        self.embedding, self.layers, self.norm, self.head = embedding_VD, layers, norm_D, head
        ropes = [layer.attention.rope for layer in config.layers]
        self.ropes = list(dict.fromkeys(ropes))
        self.rope_of = [self.ropes.index(rope) for rope in ropes]
        tables = [rope.tables(config.max_positions) for rope in self.ropes]
        self.angles = [(cos.to(backend.device), sin.to(backend.device)) for cos, sin in tables]
        growth = config.attention.query_growth
        self.growth = None if growth is None else growth.factors(config.max_positions).to(backend.device)

    def caches(self, blocks: int, block_size: int, dtype: torch.dtype) -> list[KVCache]:
        """Make an empty KV cache for each layer."""
        shapes, b = [layer.shape.attention for layer in self.layers], self.backend
        return [
            KVCache(blocks, a.kv_heads, block_size, a.head_dim, dtype, b.device, b.values_by_column) for a in shapes
        ]

    @property
    def operations_per_token(self) -> int:
        """Operations of a token in the layers' matrix products, without the head: only sampled tokens need that."""
        return sum(layer.operations_per_row for layer in self.layers)

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
        x = F.embedding(batch.tokens, self.embedding).to(self.stream)
        return x if (factor := self.config.ends.embedding_factor) == 1.0 else x.mul_(factor)

    def token_positions(self, batch: Batch, cache: KVCache) -> TokenPositions:
        """Return the rotary angles and cache rows of the step's tokens, for all layers: their caches have one shape."""
        at = batch.positions
        angles = [(cos[at], sin[at]) for cos, sin in self.angles]
        growth = None if self.growth is None else self.growth[at, None, None]
        return TokenPositions(angles, growth, self.backend.cache_rows(batch.slots, cache))

    def layer(
        self, i: int, cache: KVCache, x_TD: Tensor, y: Rows | None, batch: Batch, at: TokenPositions
    ) -> tuple[Tensor, Rows]:
        """Compute layer i: return the residual stream [T, D] and the output that is still to be added to it.

        x is the residual stream, and y the output of the layer before, which is still to be added to it. Both are
        overwritten. The last layer returns the sampled tokens only, [S, D].
        """
        layer, x = self.layers[i], x_TD
        mixed = self._attend(i, cache, self._into(x, y, layer.input_norm, layer.qkv.takes), batch, at)
        rows = batch.prompt_tokens + batch.query_tokens
        if i + 1 == len(self.layers):  # from here on only the sampled tokens are needed
            x, mixed, rows = x[batch.sampled], mixed[batch.sampled], len(batch.sequences)
        y = self._normed(layer.output(self.backend.rows(mixed, layer.output.takes)), layer.attention_norm)
        rows, takes = rows if self.backend.spares_padding else len(x), layer.feed_forward.takes
        if layer.shape.parallel:
            inner = self._into(x, None, layer.mlp_norm, takes)
            add_rows(x, y)
        else:
            inner = self._into(x, y, layer.mlp_norm, takes)
        return x, self._normed(layer.feed_forward(self.backend, inner, rows), layer.mlp_output_norm)

    def _attend(self, i: int, cache: KVCache, x: Rows, batch: Batch, at: TokenPositions) -> Tensor:
        """Return the outputs of all heads of layer i, [T, heads * head_dim], for the rows x [T, D]."""
        layer = self.layers[i]
        a = layer.shape.attention
        qkv = layer.qkv(x).dense()
        query = self._store(i, cache, qkv if a.limit is None else qkv.clamp_(-a.limit, a.limit), at)
        seen = batch.attention[a.window]
        return self.backend.attention(query, cache, seen, a.scale, a.softcap, layer.sinks).flatten(1)

    def _into(self, x_TD: Tensor, y: Rows | None, norm_D: NormWeights | None, takes: torch.dtype) -> Rows:
        """Add y to x in place, and return x, after its norm if it has one, as rows for a product with this `takes`."""
        if norm_D is not None:
            return self.backend.add_norm(x_TD, y, norm_D, self.config.norm_eps, takes)
        if y is not None:
            x_TD.add_(y.dense())
        return self.backend.rows(x_TD.clone(), takes)

    def _normed(self, y: Rows, norm_D: NormWeights | None) -> Rows:
        """Return what is to be added to the residual stream, after its norm if it has one."""
        if norm_D is None:
            return y
        return self.backend.add_norm(y.dense(), None, norm_D, self.config.norm_eps, self.stream)

    def _store(self, i: int, cache: KVCache, qkv_TX: Tensor, at: TokenPositions) -> Tensor:
        """Write keys and values of layer i to its cache; return the queries [T, heads, head_dim]."""
        layer, eps = self.layers[i], self.config.norm_eps
        a, norms = layer.shape.attention, layer.head_norms
        if norms is not None and a.normed_together:
            query, key, value = torch.split(qkv_TX, [a.q.rows, a.k.rows, a.v.rows], -1)
            parts = zip((query, key), norms, strict=True)
            whole = [self.backend.add_norm(part.contiguous(), None, norm, eps, self.stream) for part, norm in parts]
            qkv_TX, norms = torch.cat([*(part.dense() for part in whole), value], -1), None
        cos, sin = at.angles[self.rope_of[i]]
        query = self.backend.rotate_and_store(
            qkv_TX, cache, a.heads, cos, sin, at.cache_rows, norms, eps, a.normed_after_rope
        )
        return query if at.growth is None else (query * at.growth).to(query.dtype)

    def logits(self, x_SD: Tensor, y: Rows | None) -> Tensor:
        """Return float32 logits [S, V] from the residual stream x and the last layer's output y."""
        ends = self.config.ends
        logits = self.head(self._into(x_SD, y, self.norm, self.head.takes)).dense().float()
        if ends.logits_factor != 1.0:
            logits = logits * ends.logits_factor
        return logits if ends.softcap is None else torch.tanh(logits / ends.softcap).mul_(ends.softcap)
