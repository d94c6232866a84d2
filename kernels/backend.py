"""`Backend`: the operations of a decoder on one kind of device. The model's own code is the same for all devices."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from batchinfer.kernels.attention import TiledBatch
from batchinfer.kernels.attention_cpu import WindowedBatch
from batchinfer.kernels.attention_plan import AttentionPlan
from batchinfer.kernels.experts import ExpertRows, ProductByExpert
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.norm import NormWeights
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.sampling import SamplingBatch

AttentionBatch = TiledBatch | WindowedBatch | AttentionPlan
"""Attention's inputs in a step, for the layers of one shape. Each backend has its own type."""


class Backend(Protocol):
    """Matrix products with the three kinds of weights, and the operations of a layer between them."""

    device: torch.device
    eight_bits: frozenset[str]  # the kinds of 8-bit rows that it multiplies, of int8 and fp8
    values_by_column: bool  # how 8-bit values lie in the KV cache
    keys_by_column: bool  # how keys lie in it
    spares_padding: bool  # whether experts leave out rows of padding; not where a step is recorded for other numbers
    kernels: dict[str, str]  # operation -> the path taken, of what this backend has made so far; for the report

    def stream(self, dtype: torch.dtype, quantized: bool) -> torch.dtype:
        """Return the residual stream's type for a model in `dtype`; `quantized`: its matrices are quantized."""
        ...

    def linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> Product:
        """Make the product with floating-point weights, computed in the weights' type."""
        ...

    def linear_w8a8(
        self, values_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, out: torch.dtype = torch.float32
    ) -> Product:
        """Make the product of 8-bit rows with 8-bit weights (int8 or float8_e4m3fn), which have per-channel scales.

        Scales are float32. The result is in `out`.
        """
        ...

    def linear_w4a16(
        self, values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor, bias_N: Tensor | None, dtype: torch.dtype
    ) -> Product:
        """Make the product of floating-point rows with weights that stay in 4 bits.

        `values_NK` is int8, from -8 to 7. A group of K / G columns shares a scale and a zero point.
        """
        ...

    def product_by_expert(self, products: list[Product]) -> ProductByExpert:
        """Make one product of those of all experts, which have one shape and take rows of one type.

        Raises `ValueError` for weights or inputs that this device has no such product for.
        """
        ...

    def expert_rows(self, experts_Tk: Tensor, experts: int, products: Sequence[Product]) -> ExpertRows:
        """Sort tokens into rows for `product_by_expert`, by the k of all `experts` chosen for each, int64 [T, k].

        Their numbers are such that no row's bits depend on others in the `products` of one of the experts.
        """
        ...

    def weighted_sum(self, parts: list[Tensor], weights_Tk: Tensor, places_Tk: Tensor) -> Tensor:
        """Return the weighted sum of each token's rows, float32 [T, D], in the order in which experts were chosen.

        The rows [M, D] are those of all `parts`; `places` are their numbers.
        """
        ...

    def add_norm(self, x_MD: Tensor, y: Rows | None, norm_D: NormWeights, eps: float, takes: torch.dtype) -> Rows:
        """Add y, if given, to x in place; return the norm of x as rows for a product with this `takes`."""
        ...

    def activate(self, x: Rows, activation: str, gated: bool, takes: torch.dtype) -> Rows:
        """Return `activation(gate) * up`, [M, F], of x = `[gate | up]` [M, 2F], or `activation(x)` without a gate.

        `activation` is silu, gelu, gelu_tanh, relu2 or clamped_swiglu. The result is rows for a product with this
        `takes`.
        """
        ...

    def rows(self, x_MK: Tensor, takes: torch.dtype) -> Rows:
        """Convert a matrix to rows for a product with this `takes`."""
        ...

    def cache_rows(self, slots_T: Tensor, cache: KVCache) -> Tensor:
        """Return where `rotate_and_store` writes the tokens of these slots, in every cache with as many key heads."""
        ...

    def rotate_and_store(
        self,
        qkv_TX: Tensor,
        cache: KVCache,
        heads: int,
        cos_Td: Tensor,
        sin_Td: Tensor,
        cache_rows: Tensor,
        norms: tuple[NormWeights, NormWeights] | None,
        norm_values: bool,
        eps: float,
        norms_last: bool = False,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to the cache, and return the queries [T, heads, head_dim].

        qkv is [T, (heads + 2 kv_heads) * head_dim]; cos and sin are float32 [T, head_dim / 2]. `cache_rows` comes from
        the method of that name. `norms` are those of each head of queries and of keys, if the model has them, with
        weights [head_dim], or [heads, head_dim] and [kv_heads, head_dim]; `norms_last`: heads are rotated before. With
        `norm_values`, each head of the values gets an RMSNorm without weight.
        """
        ...

    def rotate_queries(
        self, query_TX: Tensor, heads: int, cos_Td: Tensor, sin_Td: Tensor, norm_d: NormWeights | None, eps: float
    ) -> Tensor:
        """Rotate queries [T, heads * head_dim] alone, of a layer that stores no keys: return [T, heads, head_dim].

        `norm_d` is the norm on each head before that, if the model has one.
        """
        ...

    def attention(
        self,
        query_THd: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        """Return attention's outputs [T, heads, head_dim] in the query's type.

        Products of queries and keys are multiplied by `scale`; with a `softcap` c, scores s become c * tanh(s / c).
        `sinks`, float32, are scores that count in softmax and stand for no value. The step's keys and values must be in
        the cache already.
        """
        ...

    def allow(self, logits_rV: Tensor, bits_rW: Tensor) -> None:
        """Ban, in place, the tokens whose bit is not set; the bits, int32 [r, V / 32], lie on the host.

        The lowest bit of a row's first word is that of token 0.
        """
        ...

    def sample(self, logits_rV: Tensor, batch: SamplingBatch | None) -> tuple[Tensor, Tensor]:
        """Return (token ids int64 [r], finite bool [r]): sampled tokens, or the most likely ones if `batch` is None.

        `finite` is False for rows whose logits are not finite.
        """
        ...
