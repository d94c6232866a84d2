"""One decoder for the Llama family: Llama, Mistral, Qwen2, Qwen3.

Shapes: T tokens of a step, S of them sampled, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.batch import Batch
from batchinfer.kernels.activation import silu_mul, silu_mul_quantize
from batchinfer.kernels.attention import attention
from batchinfer.kernels.kv_cache import KVCache, cache_rows, rotate
from batchinfer.kernels.linear import MIN_ROWS, Linear
from batchinfer.kernels.linear_w4a16 import GRAIN, GROUPS, LinearW4A16
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.norm import rms_norm, rms_norm_quantize
from batchinfer.kernels.rows import Rows, add_rows, quantize_rows
from batchinfer.model_config import ModelConfig
from batchinfer.quantize.matrix import QuantizedMatrix
from batchinfer.quantize.rtn import quantize_channels
from batchinfer.quantize.scheme import QuantScheme
from batchinfer.weights import WeightSource

Product = Linear | LinearW8A8 | LinearW4A16


class Places(NamedTuple):
    """Where a step's tokens stand: the angles of their positions [T, head_dim / 2], and their rows in the caches."""

    cos: Tensor
    sin: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Layer:
    """The weights of one layer; q, k and v are one product, gate and up another."""

    window: int | None
    input_norm: Tensor  # [D]
    qkv: Product
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None
    output: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product

    @property
    def products(self) -> tuple[Product, ...]:
        """Its four matrix products."""
        return (self.qkv, self.output, self.gate_up, self.down)


class Decoder:
    """`forward(batch, caches) -> logits [S, V]`, float32.

    With a quantized scheme the residual stream is float32 and matrix products are of 8-bit rows; otherwise both are
    in `dtype`, and matrices that the checkpoint holds in few bits are expanded to it, unless they are `packed`: of 4
    bits and left so. Embeddings and head are in `dtype` (the head in fewer bits if the scheme or the checkpoint says
    so). `four_bits` tells whether the checkpoint has such matrices, `unpacked` names the products that had to be
    expanded all the same.
    """

    def __init__(
        self, config: ModelConfig, scheme: QuantScheme, dtype: torch.dtype, weights: WeightSource, packed: bool = False
    ) -> None:
        self.config = config
        self.scheme = scheme
        self.stream = torch.float32 if scheme.quantized else dtype
        load = _Loader(config, scheme, dtype, weights, packed)
        self.embedding = load.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size)).to(dtype)
        self.layers = [load.layer(i) for i in range(config.layers)]
        self.norm = load.tensor("model.norm.weight", (config.hidden_size,)).to(self.stream)
        self.head = load.head(self.embedding)
        self.four_bits, self.unpacked = load.four_bits, load.unpacked
        weights.finish()
        self.cos, self.sin = config.rope.tables(config.max_positions)

    def caches(self, blocks: int, block_size: int, dtype: torch.dtype) -> list[KVCache]:
        """An empty cache for each layer."""
        c = self.config
        return [KVCache(blocks, c.kv_heads, block_size, c.head_dim, dtype) for _ in self.layers]

    @property
    def operations_per_token(self) -> int:
        """Of the layers' matrix products; the head runs for sampled tokens only."""
        return sum(p.operations_per_row for layer in self.layers for p in layer.products)

    @property
    def row_grain(self) -> int:
        """The tokens of a step must be a multiple of this."""
        packed = all(isinstance(p, LinearW4A16) for layer in self.layers for p in layer.products)
        return 1 if packed else MIN_ROWS

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices as they are held."""
        held = sum(p.nbytes for layer in self.layers for p in layer.products) + self.embedding.nbytes
        shared = isinstance(self.head, Linear) and self.head.weight is self.embedding
        return held if shared else held + self.head.nbytes

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor:
        """One step: stores the tokens' keys and values, returns float32 logits of the sampled tokens."""
        places = self.places(batch, caches[0])
        x = self.embed(batch)
        for i, cache in enumerate(caches):
            x = self.layer(i, cache, x, batch, places)
        return self.logits(x)

    def embed(self, batch: Batch) -> Tensor:
        """The residual stream [T, D] before the first layer."""
        return F.embedding(batch.tokens, self.embedding).to(self.stream)

    def places(self, batch: Batch, cache: KVCache) -> Places:
        """What all layers need to know of the step; their caches are of one shape."""
        cos, sin = self.cos[batch.positions], self.sin[batch.positions]
        return Places(cos, sin, cache_rows(batch.slots, self.config.kv_heads, cache.block_size))

    def layer(self, i: int, cache: KVCache, x_TD: Tensor, batch: Batch, places: Places) -> Tensor:
        """The residual stream [T, D] after layer i, and after the last one [S, D]; x is spent."""
        layer, c, x = self.layers[i], self.config, x_TD
        qkv = layer.qkv(self._norm(x, layer.input_norm, layer.qkv)).dense()
        query, key, value = self._heads(layer, qkv)
        query, key = rotate(query, places.cos, places.sin), rotate(key, places.cos, places.sin)
        cache.store(key, value, places.rows)
        mixed = attention(
            query, cache, batch.tiles, batch.decode.get(layer.window), c.head_dim**-0.5, layer.window
        ).flatten(1)
        if i + 1 == len(self.layers):  # nothing reads the other tokens any more
            x, mixed = x[batch.sampled], mixed[batch.sampled]
        x = add_rows(x, layer.output(_input(mixed, layer.output)))
        gate_up = layer.gate_up(self._norm(x, layer.mlp_norm, layer.gate_up))
        return add_rows(x, layer.down(_activated(gate_up, layer.down)))

    def logits(self, x_SD: Tensor) -> Tensor:
        """Of the residual stream after the last layer, float32 [S, V]."""
        x = rms_norm(x_SD, self.norm, self.config.norm_eps)
        return self.head(_input(x, self.head)).dense().float()

    def _norm(self, x: Tensor, weight: Tensor, product: Product) -> Rows:
        if isinstance(product, LinearW8A8):
            return rms_norm_quantize(x, weight, self.config.norm_eps)
        return Rows(rms_norm(x, weight, self.config.norm_eps))

    def _heads(self, layer: Layer, qkv_TX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [T, heads, head_dim], normed by head where the family does."""
        c = self.config
        heads = qkv_TX.view(len(qkv_TX), -1, c.head_dim)
        query, kv = heads[:, : c.heads], heads[:, c.heads :]
        key, value = kv.chunk(2, 1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = rms_norm(query, layer.query_norm, c.norm_eps)
            key = rms_norm(key, layer.key_norm, c.norm_eps)
        return query, key, value


def _input(x: Tensor, product: Product) -> Rows:
    return quantize_rows(x.float()) if isinstance(product, LinearW8A8) else Rows(x)


def _activated(gate_up: Rows, product: Product) -> Rows:
    if isinstance(product, LinearW8A8):
        return silu_mul_quantize(Rows(gate_up.values.float(), gate_up.scale))
    return Rows(silu_mul(gate_up.dense()))


class _Loader:
    """Tensors by name into layers: each is brought to its final type before the next is read."""

    def __init__(
        self, config: ModelConfig, scheme: QuantScheme, dtype: torch.dtype, weights: WeightSource, packed: bool
    ) -> None:
        self.c, self.scheme, self.dtype, self.weights, self.packed = config, scheme, dtype, weights, packed
        self.stream = torch.float32 if scheme.quantized else dtype
        self.four_bits = False
        self.unpacked: list[str] = []

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.weights.take(name, shape)

    def layer(self, i: int) -> Layer:
        c, at = self.c, f"model.layers.{i}."
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        d, f = c.hidden_size, c.intermediate_size

        def norm(name: str, size: int) -> Tensor:
            return self.tensor(f"{at}{name}.weight", (size,)).to(self.stream)

        def product(bias: bool, columns: int, **parts: int) -> Product:
            block = "self_attn" if "q_proj" in parts or "o_proj" in parts else "mlp"
            return self._product({f"{at}{block}.{name}": rows for name, rows in parts.items()}, columns, bias)

        return Layer(
            window=c.windows[i],
            input_norm=norm("input_layernorm", d),
            qkv=product(c.qkv_bias, d, q_proj=q, k_proj=kv, v_proj=kv),
            query_norm=norm("self_attn.q_norm", c.head_dim) if c.head_norm else None,
            key_norm=norm("self_attn.k_norm", c.head_dim) if c.head_norm else None,
            output=product(c.output_bias, q, o_proj=d),
            mlp_norm=norm("post_attention_layernorm", d),
            gate_up=product(c.mlp_bias, d, gate_proj=f, up_proj=f),
            down=product(c.mlp_bias, f, down_proj=d),
        )

    def head(self, embedding_VD: Tensor) -> Product:
        """The embedding again where the two are tied; a copy of it in the file need not be read then."""
        weight: Tensor | QuantizedMatrix = embedding_VD
        if self.c.tied:
            self.weights.drop("lm_head.weight")
        else:
            weight = self.weights.matrix("lm_head", (self.c.vocab_size, self.c.hidden_size))
        if self.scheme.head or (self.scheme.as_stored and self._in_bytes(weight)):
            return LinearW8A8(*_bytes(weight))
        return self._floating({"lm_head": self._kept(weight)}, None)

    def _product(self, parts: dict[str, int], columns: int, bias: bool) -> Product:
        """Matrices [rows, columns] that read the same input, stacked into one."""
        biases = [self.tensor(f"{name}.bias", (rows,)) for name, rows in parts.items()] if bias else []
        floats: dict[str, Tensor | QuantizedMatrix] = {}
        integers = []
        for name, rows in parts.items():
            weight = self._matrix(name, (rows, columns))
            if self._in_bytes(weight):
                integers.append(_bytes(weight))
            else:
                floats[name] = self._kept(weight)
        if floats and integers:
            raise ValueError(
                f"{', '.join(parts)}: some are quantized for 8-bit inputs and some are not; they share an input"
            )
        if floats:
            return self._floating(floats, torch.cat(biases).to(self.dtype) if bias else None)
        values, scale = (torch.cat(column) for column in zip(*integers, strict=True))
        return LinearW8A8(values, scale, torch.cat(biases).float() if bias else None)

    def _matrix(self, name: str, shape: tuple[int, int]) -> Tensor | QuantizedMatrix:
        weight = self.weights.matrix(name, shape)
        if _four_bits(weight):
            self.four_bits = True
        elif self.scheme.weight_bits == 4 and not (isinstance(weight, QuantizedMatrix) and weight.bits == 4):
            raise ValueError(
                f"{self.scheme.name} needs a checkpoint with 4-bit weights, and {name} is not in 4 bits; make one with "
                "`batchinfer quantize`, or take --quantization w8a8-int8"
            )
        return weight

    def _kept(self, weight: Tensor | QuantizedMatrix) -> Tensor | QuantizedMatrix:
        """As it is stored if it may stay in 4 bits, else expanded at once."""
        return weight if self.packed and _four_bits(weight) else _expanded(weight).to(self.dtype)

    def _floating(self, parts: dict[str, Tensor | QuantizedMatrix], bias: Tensor | None) -> Product:
        """The product of floating-point rows: all parts in 4 bits, or all expanded."""
        if (stacked := _stacked(list(parts.values()))) is not None:
            return LinearW4A16(*stacked, bias)
        if any(isinstance(weight, QuantizedMatrix) for weight in parts.values()):
            self.unpacked.append(", ".join(parts))
        expanded = [_expanded(weight).to(self.dtype) for weight in parts.values()]
        return Linear(expanded[0] if len(expanded) == 1 else torch.cat(expanded), bias)

    def _in_bytes(self, weight: Tensor | QuantizedMatrix) -> bool:
        """True if the product is to be one of 8-bit rows and 8-bit weights."""
        if self.scheme.as_stored:
            return isinstance(weight, QuantizedMatrix) and weight.activations == "int8"
        return self.scheme.quantized


def _bytes(weight: Tensor | QuantizedMatrix) -> tuple[Tensor, Tensor]:
    """(int8 [N, K], scale [N]): as they are stored where they are just that, else rounded to it."""
    stored = weight.by_channel() if isinstance(weight, QuantizedMatrix) else None
    return quantize_channels(_expanded(weight)) if stored is None else stored


def _four_bits(weight: Tensor | QuantizedMatrix) -> bool:
    return isinstance(weight, QuantizedMatrix) and weight.bits == 4 and weight.activations == "float"


def _stacked(weights: list[Tensor | QuantizedMatrix]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Values, scale and zero point for `LinearW4A16`; None where it does not take all of these as one."""
    matrices = [weight for weight in weights if isinstance(weight, QuantizedMatrix)]
    groups = [found for matrix in matrices if (found := matrix.by_group(GROUPS)) is not None]
    if len(groups) < len(weights) or len({scale.shape[1] for scale, _ in groups}) > 1:
        return None
    values = torch.cat([matrix.values for matrix in matrices])
    if len(values) % GRAIN:
        return None
    scale, zero_point = (torch.cat(column) for column in zip(*groups, strict=True))
    return values, scale, zero_point


def _expanded(weight: Tensor | QuantizedMatrix) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight
