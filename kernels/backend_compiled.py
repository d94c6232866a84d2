"""`CompiledBackend`: the CPU's backend with kernels in C, which do in one pass what torch does in several."""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer.kernels import attention_cpu, kv_cache_cpu, rows_cpu, sampling_cpu
from batchinfer.kernels.backend import AttentionBatch
from batchinfer.kernels.backend_cpu import CpuBackend
from batchinfer.kernels.cpu_library import load, use_torch_threads
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.kv_cache import cache_rows as reference_rows
from batchinfer.kernels.linear_w4a8_cpu import PackedW4A8
from batchinfer.kernels.linear_w8a8_cpu import MOST_COLUMNS, PackedW8A8
from batchinfer.kernels.norm import LayerNorm, NormWeights
from batchinfer.kernels.product import Product
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.sampling import SamplingBatch


class CompiledBackend(CpuBackend):
    """The backend for the CPU with kernels in C, by the library of one instruction set.

    What they do not compute the reference does: float8, floating-point products, LayerNorm of heads, and activations
    without a gate that are not rounded to 8 bits, which are one pass in torch too. The report names each.
    """

    keys_by_column = True

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self._library = load(path)
        self.threads = use_torch_threads(self._library)
        self.kernels["attention"] = path

    def linear_w8a8(
        self, values_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, out: torch.dtype = torch.float32
    ) -> Product:
        if values_NK.shape[1] > MOST_COLUMNS:
            return super().linear_w8a8(values_NK, scale_N, bias_N, out)
        self.kernels["linear_w8a8"] = self.path
        bias = None if bias_N is None else bias_N.float()
        return PackedW8A8(self._library, values_NK, scale_N, bias)

    def linear_w4a8(self, values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor, bias_N: Tensor | None) -> Product:
        """Make the product of 8-bit rows with weights that stay in 4 bits, those of `linear_w4a16`."""
        self.kernels["linear_w4a8"] = self.path
        bias = None if bias_N is None else bias_N.float()
        return PackedW4A8(self._library, values_NK, scale_NG, zero_point_NG, bias)

    def add_norm(self, x_MD: Tensor, y: Rows | None, norm_D: NormWeights, eps: float, takes: torch.dtype) -> Rows:
        weights = _weights(x_MD, norm_D if isinstance(norm_D, LayerNorm) else (norm_D,))
        if weights is None or x_MD.dim() != 2 or not x_MD.is_contiguous():
            self.kernels["norm"] = "reference"
            return super().add_norm(x_MD, y, norm_D, eps, takes)
        if y is not None and y.values.dtype != x_MD.dtype:
            y = Rows(y.values.to(x_MD.dtype), y.scale)
        self.kernels["norm"] = self.path
        return rows_cpu.add_norm(self._library, x_MD, y, norm_D, eps, takes)

    def activate(self, x: Rows, activation: str, gated: bool, takes: torch.dtype) -> Rows:
        if x.values.dtype not in rows_cpu.TYPES or (takes != torch.uint8 and not gated):
            self.kernels["activation"] = "reference"
            return super().activate(x, activation, gated, takes)
        self.kernels["activation"] = self.path
        return rows_cpu.activate(self._library, x, activation, gated, takes)

    def rows(self, x_MK: Tensor, takes: torch.dtype) -> Rows:
        return rows_cpu.quantize_rows(self._library, x_MK.float()) if takes == torch.uint8 else Rows(x_MK)

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
        weights = _weights(qkv_TX, (None, None) if norms is None else norms)
        if weights is None or cache.key.dtype not in kv_cache_cpu.TYPES:
            self.kernels["rotate_and_store"] = "reference"
            rows = reference_rows(cache_rows, cache.kv_heads, cache.block_size)
            return super().rotate_and_store(
                qkv_TX, cache, heads, cos_Td, sin_Td, rows, norms, norm_values, eps, norms_last
            )
        self.kernels["rotate_and_store"] = self.path
        return kv_cache_cpu.rotate_and_store(
            self._library, qkv_TX, cache, heads, cos_Td, sin_Td, cache_rows, weights, norm_values, eps, norms_last
        )

    def rotate_queries(
        self, query_TX: Tensor, heads: int, cos_Td: Tensor, sin_Td: Tensor, norm_d: NormWeights | None, eps: float
    ) -> Tensor:
        weights = _weights(query_TX, (norm_d, None))
        if weights is None:
            return super().rotate_queries(query_TX, heads, cos_Td, sin_Td, norm_d, eps)
        return kv_cache_cpu.rotate_and_store(
            self._library, query_TX, None, heads, cos_Td, sin_Td, None, weights, False, eps
        )

    def sample(self, logits_rV: Tensor, batch: SamplingBatch | None) -> tuple[Tensor, Tensor]:
        self.kernels["sampling"] = self.path
        return sampling_cpu.sample(self._library, logits_rV, batch)

    def attention(
        self,
        query_THd: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
        softcap: float | None,
        sinks_H: Tensor | None,
    ) -> Tensor:
        assert isinstance(batch, attention_cpu.WindowedBatch)
        return attention_cpu.attention(self._library, query_THd, cache, batch, scale, softcap, sinks_H)


def _weights(x: Tensor, norms: Sequence[NormWeights | None]) -> list[Tensor | None] | None:
    """Return the weights of norms on rows x, as the kernels take them; None if they do not take these."""
    weights = [norm for norm in norms if norm is None or (isinstance(norm, Tensor) and norm.is_contiguous())]
    types = {x.dtype, *(weight.dtype for weight in weights if weight is not None)}
    return weights if len(weights) == len(norms) and len(types) == 1 and x.dtype in rows_cpu.TYPES else None
