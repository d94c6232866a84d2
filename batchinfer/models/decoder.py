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
from batchinfer.kernels.state_pool import StatePool
from batchinfer.models.batch import Batch
from batchinfer.models.config import ModelConfig
from batchinfer.models.layer import Layer
from batchinfer.models.recurrent import RecurrentWeights

Cache = KVCache | StatePool
"""What a layer keeps of earlier tokens: keys and values, or states."""


class TokenPositions(NamedTuple):
    """What depends on the positions of a step's tokens, and the rows of the KV cache for their keys and values."""

    angles: list[tuple[Tensor, Tensor]]  # (cos, sin) of each rotary embedding, [T, head_dim / 2] each
    growth: Tensor | None  # [T, 1, 1] factor on queries, for models whose queries grow with the position
    cache_rows: Tensor  # in the form of the backend's `rotate_and_store`


@dataclass(frozen=True)
class LayerWeights:
    """The loaded weights of one layer. The matrices q, k and v are one product; gate and up are another.

    Mixers other than attention have what they make of the layer's input in place of q, k and v.
    """

    shape: Layer
    input_norm: Tensor | None  # [D], as the other norms of the residual stream and of what is added to it
    qkv: Product
    head_norms: tuple[Tensor, Tensor] | None
    """Weights of the norms of queries and of keys: [head_dim] each, or [heads * head_dim] and [kv_heads * head_dim]."""
    output: Product
    attention_norm: Tensor | None
    mlp_norm: Tensor | None
    gate_up: Product
    down: Product
    mlp_output_norm: Tensor | None
    rates: Product | None = None  # of a gated DeltaNet
    recurrence: RecurrentWeights | None = None  # None: the mixer is attention

    @property
    def products(self) -> tuple[Product, ...]:
        """The layer's matrix products."""
        return (self.qkv, *filter(None, [self.rates]), self.output, self.gate_up, self.down)


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
        self.ropes = list(dict.fromkeys(a.rope for a in config.attentions))
        tables = [rope.tables(config.max_positions) for rope in self.ropes]
        self.angles = [(cos.to(backend.device), sin.to(backend.device)) for cos, sin in tables]
        growth = config.attention.query_growth
        self.growth = None if growth is None else growth.factors(config.max_positions).to(backend.device)

    def caches(self, blocks: int, block_size: int, dtype: torch.dtype, states: int = 0) -> list[Cache]:
        """Make an empty cache for each layer: of keys and values in `dtype`, or of `states` states."""
        b = self.backend

        def cache(layer: LayerWeights) -> Cache:
            if layer.recurrence is not None:
                return StatePool(states, layer.recurrence.state, self.stream, b.device)
            a = layer.shape.attention
            return KVCache(blocks, a.kv_heads, block_size, a.head_dim, dtype, b.device, b.values_by_column)

        return list(map(cache, self.layers))

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

    def forward(self, batch: Batch, caches: list[Cache]) -> Tensor:
        """Compute one step: store what the tokens leave, and return the sampled tokens' float32 logits [S, V]."""
        at = self.token_positions(batch, caches)
        x, y = self.embed(batch), None
        for i, cache in enumerate(caches):
            x, y = self.layer(i, cache, x, y, batch, at)
        return self.logits(x, y)

    def embed(self, batch: Batch) -> Tensor:
        """Return the residual stream [T, D] before the first layer."""
        x = F.embedding(batch.tokens, self.embedding).to(self.stream)
        return x if (factor := self.config.ends.embedding_factor) == 1.0 else x.mul_(factor)

    def token_positions(self, batch: Batch, caches: list[Cache]) -> TokenPositions:
        """Return the rotary angles and cache rows of the step's tokens, for all layers: KV caches have one shape."""
        at = batch.positions
        angles = [(cos[at], sin[at]) for cos, sin in self.angles]
        growth = None if self.growth is None else self.growth[at, None, None]
        cache = next(cache for cache in caches if isinstance(cache, KVCache))
        return TokenPositions(angles, growth, self.backend.cache_rows(batch.slots, cache))

    def layer(
        self, i: int, cache: Cache, x_TD: Tensor, y: Rows | None, batch: Batch, at: TokenPositions
    ) -> tuple[Tensor, Rows]:
        """Compute layer i: return the residual stream [T, D] and the output that is still to be added to it.

        x is the residual stream, and y the output of the layer before, which is still to be added to it. Both are
        overwritten. The last layer returns the sampled tokens only, [S, D].
        """
        layer, x = self.layers[i], x_TD
        if isinstance(cache, KVCache):
            mixed = self._attend(layer, cache, self._into(x, y, layer.input_norm, layer.qkv.takes), batch, at)
        else:
            mixed = self._recur(layer, cache, x, y, batch)
        if i + 1 == len(self.layers):  # from here on only the sampled tokens are needed
            x, mixed = x[batch.sampled], mixed[batch.sampled]
        y = self._normed(layer.output(self.backend.rows(mixed, layer.output.takes)), layer.attention_norm)
        y = self._feed_forward(layer, self._into(x, y, layer.mlp_norm, layer.gate_up.takes))
        return x, self._normed(y, layer.mlp_output_norm)

    def _attend(self, layer: LayerWeights, cache: KVCache, x: Rows, batch: Batch, at: TokenPositions) -> Tensor:
        """Return the outputs of all heads of a layer, [T, heads * head_dim], for the rows x [T, D]."""
        a = layer.shape.attention
        qkv = layer.qkv(x).dense()
        gate = None if a.gate is None else qkv[:, a.width :]
        query = self._store(layer, cache, qkv[:, : a.width], at)
        mixed = self.backend.attention(query, cache, batch.attention[a.window], a.scale, a.softcap).flatten(1)
        return mixed if gate is None else mixed.mul_(gate.sigmoid())

    def _recur(self, layer: LayerWeights, pool: StatePool, x_TD: Tensor, y: Rows | None, batch: Batch) -> Tensor:
        """Return what a layer with a state mixes, [T, width], of the sum of x and y; x is overwritten with that sum."""
        assert layer.recurrence is not None and batch.states is not None
        products = {"qkv": layer.qkv} if layer.rates is None else {"qkv": layer.qkv, "rates": layer.rates}
        kinds = {product.takes for product in products.values()}
        if len(kinds) == 1:
            rows = dict.fromkeys(kinds, self._into(x_TD, y, layer.input_norm, layer.qkv.takes))
        else:
            dense = self._into(x_TD, y, layer.input_norm, self.stream).dense()
            rows = {kind: self.backend.rows(dense.clone(), kind) for kind in kinds}
        made = {name: product(rows[product.takes]).dense() for name, product in products.items()}
        return layer.recurrence.mix(made, pool, batch.states).to(self.stream)

    def _feed_forward(self, layer: LayerWeights, x: Rows) -> Rows:
        """Return the output of a layer's feed-forward block for the rows x [T, D]."""
        f = layer.shape.feed_forward
        inner = layer.gate_up(x)
        return layer.down(self.backend.activate(inner, f.activation, f.gate is not None, layer.down.takes))

    def _into(self, x_TD: Tensor, y: Rows | None, norm_D: Tensor | None, takes: torch.dtype) -> Rows:
        """Add y to x in place, and return x, after its norm if it has one, as rows for a product with this `takes`."""
        if norm_D is not None:
            return self.backend.add_norm(x_TD, y, norm_D, self.config.norm_eps, takes)
        if y is not None:
            x_TD.add_(y.dense())
        return self.backend.rows(x_TD.clone(), takes)

    def _normed(self, y: Rows, norm_D: Tensor | None) -> Rows:
        """Return what is to be added to the residual stream, after its norm if it has one."""
        if norm_D is None:
            return y
        return self.backend.add_norm(y.dense(), None, norm_D, self.config.norm_eps, self.stream)

    def _store(self, layer: LayerWeights, cache: KVCache, qkv_TX: Tensor, at: TokenPositions) -> Tensor:
        """Write keys and values of a layer to its cache; return the queries [T, heads, head_dim]."""
        eps = self.config.norm_eps
        a, norms = layer.shape.attention, layer.head_norms
        if norms is not None and a.normed_together:
            query, key, value = torch.split(qkv_TX, [a.q.rows, a.k.rows, a.v.rows], -1)
            parts = zip((query, key), norms, strict=True)
            whole = [self.backend.add_norm(part.contiguous(), None, norm, eps, self.stream) for part, norm in parts]
            qkv_TX, norms = torch.cat([*(part.dense() for part in whole), value], -1), None
        cos, sin = at.angles[self.ropes.index(a.rope)]
        query = self.backend.rotate_and_store(qkv_TX, cache, a.heads, cos, sin, at.cache_rows, norms, eps)
        return query if at.growth is None else (query * at.growth).to(query.dtype)

    def logits(self, x_SD: Tensor, y: Rows | None) -> Tensor:
        """Return float32 logits [S, V] from the residual stream x and the last layer's output y."""
        ends = self.config.ends
        logits = self.head(self._into(x_SD, y, self.norm, self.head.takes)).dense().float()
        if ends.logits_factor != 1.0:
            logits = logits * ends.logits_factor
        return logits if ends.softcap is None else torch.tanh(logits / ends.softcap).mul_(ends.softcap)
