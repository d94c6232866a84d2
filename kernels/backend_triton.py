"""`TritonBackend`: Triton kernels and library products on a GPU, or on the CPU in Triton's interpreter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer.kernels import activation_triton, experts_triton, norm_triton, rows_triton
from batchinfer.kernels.attention_plan import AttentionPlan
from batchinfer.kernels.attention_triton import paged_attention
from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.experts import ExpertRows, ProductByExpert, weighted_sum
from batchinfer.kernels.gpu_triton import gpu_of
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.kv_cache_triton import rotate_and_store, rotate_queries
from batchinfer.kernels.logits_triton import allow_tokens
from batchinfer.kernels.norm import NormWeights
from batchinfer.kernels.product import Product
from batchinfer.kernels.products_triton import DenseProduct, EightBitProduct, FourBitProduct
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.sampling import SamplingBatch, greedy
from batchinfer.kernels.sampling_triton import sample

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)


class TritonBackend:
    """The backend for a GPU. The residual stream is in the model's type, and products return no separate scales."""

    values_by_column = True
    keys_by_column = False
    spares_padding = False

    def __init__(self, device: torch.device, deterministic: bool) -> None:
        self.device, self.deterministic = device, deterministic
        self.kernels = dict.fromkeys(("norm", "activation", "kv_cache", "attention", "sampling"), "triton")
        self.gpu = gpu_of(device)
        self.many_expert_rows = deterministic  # whether tiles of experts' rows have one size, the larger one
        self.eight_bits = self.gpu.eight_bits

    def stream(self, dtype: torch.dtype, quantized: bool) -> torch.dtype:
        return dtype

    def linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> Product:
        product = DenseProduct(weight_NK, bias_N, self.deterministic)
        self.kernels["linear"] = product.path
        return product

    def linear_w8a8(
        self, values_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, out: torch.dtype = torch.float32
    ) -> Product:
        product = EightBitProduct(values_NK, scale_N, bias_N, out, self.gpu, self.deterministic)
        kind = "int8" if values_NK.dtype == torch.int8 else "fp8"
        self.kernels[f"linear_w8a8 ({kind})"] = product.path
        return product

    def linear_w4a16(
        self, values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor, bias_N: Tensor | None, dtype: torch.dtype
    ) -> Product:
        zero_point = zero_point_NG if bool(zero_point_NG.any()) else None
        product = FourBitProduct(values_NK, scale_NG, zero_point, bias_N, dtype, self.gpu, self.deterministic)
        self.kernels["linear_w4a16"] = product.path
        return product

    def product_by_expert(self, products: list[Product]) -> ProductByExpert:
        self.kernels["experts"] = "triton"
        product = experts_triton.by_expert(products)
        self.many_expert_rows |= experts_triton.takes_many(product.weight.dtype, self.gpu)
        return product

    def expert_rows(self, experts_Tk: Tensor, experts: int, products: Sequence[Product]) -> ExpertRows:
        return experts_triton.expert_tiles(experts_Tk, experts, self.many_expert_rows)

    def weighted_sum(self, parts: list[Tensor], weights_Tk: Tensor, places_Tk: Tensor) -> Tensor:
        (y_MD,) = parts
        return weighted_sum(y_MD, weights_Tk, places_Tk)

    def add_norm(self, x_MD: Tensor, y: Rows | None, norm_D: NormWeights, eps: float, takes: torch.dtype) -> Rows:
        return norm_triton.add_norm(x_MD, None if y is None else y.values, norm_D, eps, _out(takes, x_MD))

    def activate(self, x: Rows, activation: str, gated: bool, takes: torch.dtype) -> Rows:
        return activation_triton.activate(x.values, activation, gated, _out(takes, x.values))

    def rows(self, x_MK: Tensor, takes: torch.dtype) -> Rows:
        return rows_triton.quantize_rows(x_MK, takes) if takes in EIGHT_BITS else Rows(x_MK)

    def cache_rows(self, slots_T: Tensor, cache: KVCache) -> Tensor:
        return slots_T

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
        return rotate_and_store(qkv_TX, cache, heads, cos_Td, sin_Td, cache_rows, norms, norm_values, eps, norms_last)

    def rotate_queries(
        self, query_TX: Tensor, heads: int, cos_Td: Tensor, sin_Td: Tensor, norm_d: NormWeights | None, eps: float
    ) -> Tensor:
        return rotate_queries(query_TX, heads, cos_Td, sin_Td, norm_d, eps)

    def attention(
        self,
        query_THd: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        assert isinstance(batch, AttentionPlan)
        return paged_attention(query_THd, cache, batch, scale, softcap, sinks_H)

    def allow(self, logits_rV: Tensor, bits_rW: Tensor) -> None:
        self.kernels["grammars"] = "triton"
        pinned = bits_rW.pin_memory() if logits_rV.is_cuda else bits_rW
        allow_tokens(logits_rV, pinned.to(logits_rV.device, non_blocking=True))

    def sample(self, logits_rV: Tensor, batch: SamplingBatch | None) -> tuple[Tensor, Tensor]:
        return greedy(logits_rV) if batch is None else sample(logits_rV, batch, self.gpu)


def _out(takes: torch.dtype, x: Tensor) -> torch.dtype:
    """Return the type to write for a product with this `takes`: floating-point rows keep x's type."""
    return takes if takes in EIGHT_BITS else x.dtype
