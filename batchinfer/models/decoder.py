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
from batchinfer.kernels.state_pool import StatePool
from batchinfer.models.batch import Batch
from batchinfer.models.config import ModelConfig
from batchinfer.models.feed_forward_weights import ExpertsWeights, FeedForwardWeights
from batchinfer.models.layer import Layer
from batchinfer.models.mixer import Attention, QueryGrowth
from batchinfer.models.per_layer import PerLayerBlock, PerLayerEmbeddings
from batchinfer.models.recurrent import RecurrentWeights

Cache = KVCache | StatePool
"""What a layer keeps of earlier tokens: keys and values, or states."""


class TokenInputs(NamedTuple):
    """What a step's tokens bring to every layer, beside the residual stream."""

    angles: list[tuple[Tensor, Tensor]]  # (cos, sin) of each rotary embedding, [T, head_dim / 2] each
    growth: dict[QueryGrowth, Tensor]  # [T, 1, 1] factors on queries, where these grow with the position
    cache_rows: dict[int, Tensor]  # by number of key heads, in the form of the backend's `rotate_and_store`
    per_layer: Tensor | None  # [T, layers, size] per-layer embeddings


@dataclass(frozen=True)
class PerLayerWeights:
    """The loaded weights that make per-layer embeddings."""

    shape: PerLayerEmbeddings
    table: Tensor  # [tokens, layers * size]
    projection: Product
    norm: NormWeights  # [size]


@dataclass(frozen=True)
class PerLayerBlockWeights:
    """The loaded weights with which a layer takes its per-layer embeddings."""

    shape: PerLayerBlock
    gate: Product
    projection: Product
    norm: NormWeights  # [D]


@dataclass(frozen=True)
class LayerWeights:
    """The loaded weights of one layer. The matrices q, k and v are one product.

    Mixers other than attention have what they make of the layer's input in place of q, k and v.
    """

    shape: Layer
    input_norm: NormWeights | None  # [D], as the other norms of the residual stream and of what is added to it
    qkv: Product
    head_norms: tuple[NormWeights, ...]
    """Norms of queries and of keys, if the model has them, or of queries alone if the layer has no keys. Their weights
    are [head_dim] each; or [heads, head_dim] and [kv_heads, head_dim], a weight for each head; or [heads * head_dim]
    and [kv_heads * head_dim], over all heads together."""
    sinks: Tensor | None  # [heads] float32
    output: Product
    attention_norm: NormWeights | None
    mlp_norm: NormWeights | None
    feed_forward: FeedForwardWeights | ExpertsWeights
    mlp_output_norm: NormWeights | None
    per_layer: PerLayerBlockWeights | None
    scalar: float  # the residual stream is multiplied by it
    rates: Product | None = None  # of a gated DeltaNet
    recurrence: RecurrentWeights | None = None  # None: the mixer is attention

    @property
    def products(self) -> tuple[Product, ...]:
        """The layer's matrix products."""
        return (*self.mixer_products, *self.feed_forward.products, *self.per_layer_products)

    @property
    def mixer_products(self) -> tuple[Product, ...]:
        """The products of what mixes positions."""
        return (self.qkv, *filter(None, [self.rates]), self.output)

    @property
    def per_layer_products(self) -> tuple[Product, ...]:
        """The products with which the layer takes its per-layer embeddings."""
        return () if self.per_layer is None else (self.per_layer.gate, self.per_layer.projection)

    @property
    def operations_per_row(self) -> int:
        """Number of multiplications and additions for one input row in the layer's matrix products."""
        others = (*self.mixer_products, *self.per_layer_products)
        return sum(product.operations_per_row for product in others) + self.feed_forward.operations_per_row


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
        per_layer: PerLayerWeights | None = None,
    ) -> None:
        self.config, self.backend, self.stream = config, backend, stream
        self.embedding, self.layers, self.norm, self.head = embedding_VD, layers, norm_D, head
        self.per_layer = per_layer
        ropes = list(dict.fromkeys(a.rope for a in config.attentions))
        mixers = enumerate(layer.mixer for layer in config.layers)
        self.rope_of = {i: ropes.index(mixer.rope) for i, mixer in mixers if isinstance(mixer, Attention)}
        tables = [rope.tables(config.max_positions) for rope in ropes]
        self.angles = [(cos.to(backend.device), sin.to(backend.device)) for cos, sin in tables]
        growing = {attention.query_growth for attention in config.attentions}
        self.growth = {g: g.factors(config.max_positions).to(backend.device) for g in growing if g is not None}

    def caches(self, blocks: int, block_size: int, dtype: torch.dtype, states: int = 0) -> list[Cache]:
        """Make an empty cache for each layer: of keys and values in `dtype`, or of `states` states.

        A layer that reads the keys of another has the other's cache.
        """
        b, caches = self.backend, list[Cache]()
        for layer in self.layers:
            if layer.recurrence is not None:
                caches.append(StatePool(states, layer.recurrence.state, self.stream, b.device))
                continue
            a = layer.shape.attention
            if a.source is not None:
                caches.append(caches[a.source])
                continue
            shape = blocks, a.kv_heads, block_size, a.head_dim
            caches.append(KVCache(*shape, dtype, b.device, b.values_by_column, b.keys_by_column))
        return caches

    @property
    def operations_per_token(self) -> int:
        """Operations of a token in the layers' matrix products, without the head: only sampled tokens need that."""
        first = 0 if self.per_layer is None else self.per_layer.projection.operations_per_row
        return first + sum(layer.operations_per_row for layer in self.layers)

    @property
    def row_grain(self) -> int:
        """Row grain: the number of a step's tokens must be a multiple of it."""
        return max(product.row_grain for product in self._products)

    @property
    def weight_bytes(self) -> int:
        """Bytes that all matrices take in memory."""
        held = sum(product.nbytes for product in self._products) + self.embedding.nbytes
        held += 0 if self.per_layer is None else self.per_layer.table.nbytes
        shared = getattr(self.head, "weight", None) is self.embedding
        return held if shared else held + self.head.nbytes

    @property
    def _products(self) -> list[Product]:
        """All matrix products but the head's."""
        before = [] if self.per_layer is None else [self.per_layer.projection]
        return [*before, *(product for layer in self.layers for product in layer.products)]

    def forward(self, batch: Batch, caches: list[Cache]) -> Tensor:
        """Compute one step: store what the tokens leave, and return the sampled tokens' float32 logits [S, V]."""
        return self.logits(*self.hidden(batch, caches))

    def hidden(self, batch: Batch, caches: list[Cache]) -> tuple[Tensor, Rows]:
        """Compute one step but its logits; return what `logits` takes, of the sampled tokens: two times [S, D]."""
        at = self.token_inputs(batch, caches)
        x, y = self.embed(batch), None
        for i, cache in enumerate(caches):
            x, y = self.layer(i, cache, x, y, batch, at)
        assert y is not None, "a model has a layer or more"
        return x, y

    def embed(self, batch: Batch) -> Tensor:
        """Return the residual stream [T, D] before the first layer."""
        x = F.embedding(batch.tokens, self.embedding).to(self.stream)
        return x if (factor := self.config.ends.embedding_factor) == 1.0 else x.mul_(factor)

    def token_inputs(self, batch: Batch, caches: list[Cache]) -> TokenInputs:
        """Return the rotary angles, cache rows and per-layer embeddings of the step's tokens, for all layers."""
        at = batch.positions
        angles = [(cos[at], sin[at]) for cos, sin in self.angles]
        growth = {kind: factors[at, None, None] for kind, factors in self.growth.items()}
        one_of_each = {cache.kv_heads: cache for cache in caches if isinstance(cache, KVCache)}
        rows = {kv_heads: self.backend.cache_rows(batch.slots, cache) for kv_heads, cache in one_of_each.items()}
        return TokenInputs(angles, growth, rows, self._per_layer_embeddings(batch))

    def _per_layer_embeddings(self, batch: Batch) -> Tensor | None:
        """Return the tokens' per-layer embeddings [T, layers, size], if the model has them."""
        if (p := self.per_layer) is None:
            return None
        projected = p.projection(self.backend.rows(self.embed(batch), p.projection.takes)).dense()
        vectors = projected.to(self.stream).view(-1, p.shape.size)
        normed = self.backend.add_norm(vectors, None, p.norm, self.config.norm_eps, self.stream).dense()
        own = F.embedding(batch.tokens, p.table).to(self.stream).mul_(p.shape.factor)
        return own.view(len(own), -1, p.shape.size).add_(normed.view(len(own), -1, p.shape.size))

    def layer(
        self, i: int, cache: Cache, x_TD: Tensor, y: Rows | None, batch: Batch, at: TokenInputs
    ) -> tuple[Tensor, Rows]:
        """Compute layer i: return the residual stream [T, D] and the output that is still to be added to it.

        x is the residual stream, and y the output of the layer before, which is still to be added to it. Both are
        overwritten. The last layer returns the sampled tokens only, [S, D].
        """
        layer, x = self.layers[i], x_TD
        if isinstance(cache, KVCache):
            mixed = self._attend(i, cache, self._into(x, y, layer.input_norm, layer.qkv.takes), batch, at)
        else:
            mixed = self._recur(layer, cache, x, y, batch)
        rows = batch.prompt_tokens + batch.query_tokens
        if i + 1 == len(self.layers):  # from here on only the sampled tokens are needed
            x, mixed, rows = x[batch.sampled], mixed[batch.sampled], batch.logits_rows
        y = self._normed(layer.output(self.backend.rows(mixed, layer.output.takes)), layer.attention_norm)
        rows, takes = rows if self.backend.spares_padding else x.shape[0], layer.feed_forward.takes
        if layer.shape.parallel:
            inner = self._into(x, None, layer.mlp_norm, takes)
            add_rows(x, y)
        else:
            inner = self._into(x, y, layer.mlp_norm, takes)
        y = self._normed(layer.feed_forward(self.backend, inner, rows), layer.mlp_output_norm)
        if layer.per_layer is not None and at.per_layer is not None:
            vectors = at.per_layer[:, i]
            y = self._per_layer(layer.per_layer, x, y, vectors if i + 1 < len(self.layers) else vectors[batch.sampled])
        if layer.scalar != 1.0:
            x.mul_(layer.scalar)
            y.values.mul_(layer.scalar)
        return x, y

    def _attend(self, i: int, cache: KVCache, x: Rows, batch: Batch, at: TokenInputs) -> Tensor:
        """Return the outputs of all heads of layer i, [T, heads * head_dim], for the rows x [T, D]."""
        layer, a = self.layers[i], self.layers[i].shape.attention
        qkv, gate = layer.qkv(x).dense(), None
        if a.gate is not None:
            qkv, gate = torch.split(qkv, [a.width, a.gate.rows], -1)
        if a.limit is not None:
            qkv.clamp_(-a.limit, a.limit)
        angles = at.angles[self.rope_of[i]]
        if a.source is None:
            query = self._store(layer, cache, qkv, angles, at.cache_rows[a.kv_heads])
        else:
            query = self._queries(layer, qkv, angles)
        if a.query_growth is not None:
            query = (query * at.growth[a.query_growth]).to(query.dtype)
        seen = batch.attention[a.shape]
        mixed = self.backend.attention(query, cache, seen, a.scale, a.softcap, layer.sinks).flatten(1)
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

    def _per_layer(self, block: PerLayerBlockWeights, x_TD: Tensor, y: Rows, vectors: Tensor) -> Rows:
        """Add y to x in place; return what the block makes of x and the tokens' per-layer embeddings [T, size]."""
        gate = block.gate(self._into(x_TD, y, None, block.gate.takes)).dense()
        inner = Rows(torch.cat([gate, vectors.to(gate.dtype)], -1))
        made = block.projection(self.backend.activate(inner, block.shape.activation, True, block.projection.takes))
        return self._normed(made, block.norm)

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

    def _store(
        self, layer: LayerWeights, cache: KVCache, qkv_TX: Tensor, angles: tuple[Tensor, Tensor], rows: Tensor
    ) -> Tensor:
        """Write keys and values of a layer to its cache; return the queries [T, heads, head_dim]."""
        eps = self.config.norm_eps
        a, norms = layer.shape.attention, layer.head_norms
        if a.normed_together:
            query, key, value = torch.split(qkv_TX, [a.q.rows, a.k.rows, a.v.rows], -1)
            parts = zip((query, key), norms, strict=True)
            whole = [self.backend.add_norm(part.contiguous(), None, norm, eps, self.stream) for part, norm in parts]
            qkv_TX, norms = torch.cat([*(part.dense() for part in whole), value], -1), ()
        pair = (norms[0], norms[1]) if norms else None
        return self.backend.rotate_and_store(
            qkv_TX, cache, a.heads, *angles, rows, pair, a.value_norm, eps, a.normed_after_rope
        )

    def _queries(self, layer: LayerWeights, query_TX: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Return the queries [T, heads, head_dim] of a layer that reads the keys and values of another layer."""
        a = layer.shape.attention
        norm = layer.head_norms[0] if layer.head_norms else None
        return self.backend.rotate_queries(query_TX, a.heads, *angles, norm, self.config.norm_eps)

    def logits(self, x_SD: Tensor, y: Rows | None) -> Tensor:
        """Return float32 logits [S, V] from the residual stream x and the last layer's output y."""
        ends = self.config.ends
        logits = self.head(self._into(x_SD, y, self.norm, self.head.takes)).dense().float()
        if ends.logits_factor != 1.0:
            logits = logits * ends.logits_factor
        return logits if ends.softcap is None else torch.tanh(logits / ends.softcap).mul_(ends.softcap)
