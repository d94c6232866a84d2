"""`CpuBackend`: torch's operations, in shapes that are fast on a CPU and keep a row's bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer.kernels.activation import activate, activate_quantize
from batchinfer.kernels.attention import TiledBatch, attention
from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.experts import ExpertRows, ProductByExpert
from batchinfer.kernels.experts_cpu import ProductBySpan, WeightedSum, expert_spans
from batchinfer.kernels.kv_cache import KVCache, cache_rows, rotate
from batchinfer.kernels.linear import Linear
from batchinfer.kernels.linear_w4a16 import LinearW4A16
from batchinfer.kernels.linear_w8a8 import LinearW8A8
from batchinfer.kernels.logits import allow_tokens
from batchinfer.kernels.norm import NormWeights, norm, norm_quantize, rms_norm
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows, add_rows, quantize_rows
from batchinfer.kernels.sampling import SamplingBatch, greedy, sample


class CpuBackend:
    """The backend for the CPU.

    Its integer product takes uint8 and returns float32, so 8-bit rows are uint8 and the residual stream of a quantized
    model is float32.
    """

    device = torch.device("cpu")
    eight_bits = frozenset({"int8"})
    values_by_column = False
    keys_by_column = False
    spares_padding = True

    def __init__(self) -> None:
        self.kernels: dict[str, str] = {}
        self._sum = WeightedSum()
        self.expert_layers = self.experts_touched = 0  # mixtures computed so far, and experts that had rows in them

    def stream(self, dtype: torch.dtype, quantized: bool) -> torch.dtype:
        return torch.float32 if quantized else dtype

    def linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> Product:
        product = Linear(weight_NK, bias_N)
        self.kernels["linear"] = product.path
        return product

    def linear_w8a8(
        self, values_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, out: torch.dtype = torch.float32
    ) -> Product:
        """Make the 8-bit product. `out` must be float32: row scales are not multiplied in yet, so that rounding the
        result to a smaller type here would mean rounding it twice."""
        product = LinearW8A8(values_NK, scale_N, None if bias_N is None else bias_N.float())
        self.kernels["linear_w8a8"] = product.path
        return product

    def linear_w4a16(
        self, values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor, bias_N: Tensor | None, dtype: torch.dtype
    ) -> Product:
        product = LinearW4A16(values_NK, scale_NG, zero_point_NG, bias_N)
        self.kernels["linear_w4a16"] = product.path
        return product

    def product_by_expert(self, products: list[Product]) -> ProductByExpert:
        return ProductBySpan(products)

    def expert_rows(self, experts_Tk: Tensor, experts: int, products: Sequence[Product]) -> ExpertRows:
        row_grain, least = (max(getattr(p, name) for p in products) for name in ("row_grain", "least_rows"))
        spans = expert_spans(experts_Tk, experts, row_grain, least)
        self.expert_layers += 1
        self.experts_touched += len(spans.spans)
        return spans

    def weighted_sum(self, parts: list[Tensor], weights_Tk: Tensor, places_Tk: Tensor) -> Tensor:
        return self._sum(parts, weights_Tk, places_Tk)

    def add_norm(self, x_MD: Tensor, y: Rows | None, norm_D: NormWeights, eps: float, takes: torch.dtype) -> Rows:
        if y is not None:
            add_rows(x_MD, y)
        if takes == torch.uint8:
            return norm_quantize(x_MD, norm_D, eps)
        return Rows(norm(x_MD, norm_D, eps))

    def activate(self, x: Rows, activation: str, gated: bool, takes: torch.dtype) -> Rows:
        if takes == torch.uint8:
            return activate_quantize(Rows(x.values.float(), x.scale), activation, gated)
        return Rows(activate(x.dense(), activation, gated))

    def rows(self, x_MK: Tensor, takes: torch.dtype) -> Rows:
        return quantize_rows(x_MK.float()) if takes == torch.uint8 else Rows(x_MK)

    def cache_rows(self, slots_T: Tensor, cache: KVCache) -> Tensor:
        return cache_rows(slots_T, cache.key.shape[1], cache.block_size)

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
        by_head = qkv_TX.view(len(qkv_TX), -1, cache.key.shape[-1])
        turned, value = by_head.tensor_split((by_head.shape[1] - cache.key.shape[1],), 1)
        if norms_last:
            turned = rotate(turned, cos_Td, sin_Td)
        if norms is not None:
            turned = torch.cat([norm(turned[:, :heads], norms[0], eps), norm(turned[:, heads:], norms[1], eps)], 1)
        if norm_values:
            value = rms_norm(value, None, eps)
        if not norms_last:
            turned = rotate(turned, cos_Td, sin_Td)
        cache.store(turned[:, heads:], value, cache_rows)
        return turned[:, :heads]

    def rotate_queries(
        self, query_TX: Tensor, heads: int, cos_Td: Tensor, sin_Td: Tensor, norm_d: NormWeights | None, eps: float
    ) -> Tensor:
        query = query_TX.view(len(query_TX), heads, -1)
        return rotate(query if norm_d is None else norm(query, norm_d, eps), cos_Td, sin_Td)

    def attention(
        self,
        query_THd: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        assert isinstance(batch, TiledBatch)
        return attention(query_THd, cache, batch, scale, softcap, sinks_H)

    def allow(self, logits_rV: Tensor, bits_rW: Tensor) -> None:
        self.kernels["grammars"] = "torch"
        allow_tokens(logits_rV, bits_rW)

    def sample(self, logits_rV: Tensor, batch: SamplingBatch | None) -> tuple[Tensor, Tensor]:
        return greedy(logits_rV) if batch is None else sample(logits_rV, batch)
