"""`Backend`: the operations of a decoder on one kind of device. The model's text is the same on all of them."""

from typing import Protocol

import torch
from torch import Tensor

from batchinfer.kernels.attention import TiledBatch
from batchinfer.kernels.attention_plan import AttentionPlan
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.sampling import SamplingBatch

AttentionBatch = TiledBatch | AttentionPlan
"""What attention reads of a step, in the layers that have one window. Each backend has its own kind."""


class Product(Protocol):
    """A matrix product with weights [N, K] that it holds."""

    @property
    def takes(self) -> torch.dtype:
        """The type of rows that it multiplies; of 8 bits: with a scale each."""
        ...

    @property
    def row_grain(self) -> int:
        """The number of rows must be a multiple of this."""
        ...

    @property
    def operations_per_row(self) -> int:
        """Multiplications and additions."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes, with all that belongs to it."""
        ...

    def __call__(self, x: Rows) -> Rows:
        """[M, K] to [M, N]."""
        ...


class Backend(Protocol):
    """Products of the three kinds of weights, and what a layer does between them."""

    device: torch.device
    eight_bits: frozenset[str]  # int8, fp8: kinds of 8-bit rows that it multiplies
    kernels: dict[str, str]  # operation -> the path taken, of what this backend has made so far; for the report

    def stream(self, dtype: torch.dtype, quantized: bool) -> torch.dtype:
        """The type of the residual stream, of a model in `dtype` whose matrices may be quantized."""
        ...

    def linear(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> Product:
        """The product of floating-point rows and weights, in the weights' type."""
        ...

    def linear_w8a8(
        self, values_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, out: torch.dtype = torch.float32
    ) -> Product:
        """The product of 8-bit rows and weights, int8 or float8_e4m3fn, with a float32 scale a channel."""
        ...

    def linear_w4a16(
        self, values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor, bias_N: Tensor | None, dtype: torch.dtype
    ) -> Product:
        """The product of floating-point rows and weights that stay in 4 bits: int8 values from -8 to 7."""
        ...

    def add_norm(self, x_MD: Tensor, y: Rows | None, weight_D: Tensor, eps: float, takes: torch.dtype) -> Rows:
        """`x += y` in place, where there is a y, and RMSNorm of that as a product takes it."""
        ...

    def silu_mul(self, gate_up: Rows, takes: torch.dtype) -> Rows:
        """`silu(gate) * up` of `[gate | up]` [M, 2F]: [M, F] as a product takes it."""
        ...

    def rows(self, x_MK: Tensor, takes: torch.dtype) -> Rows:
        """A matrix as a product takes it."""
        ...

    def cache_places(self, slots_T: Tensor, cache: KVCache) -> Tensor:
        """Where tokens' keys and values go in all caches of this shape, for `rotate_and_store`."""
        ...

    def rotate_and_store(
        self,
        qkv_TX: Tensor,
        cache: KVCache,
        heads: int,
        cos_Td: Tensor,
        sin_Td: Tensor,
        places: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
    ) -> Tensor:
        """Queries [T, heads, head_dim] for attention; keys and values are in the cache afterwards.

        qkv [T, (heads + 2 kv_heads) * head_dim], cos and sin [T, head_dim / 2] float32; `norms` are the weights
        [head_dim] of the norms by head of queries and keys, where the family has them.
        """
        ...

    def attention(self, query_THd: Tensor, cache: KVCache, batch: AttentionBatch, scale: float) -> Tensor:
        """Attention outputs [T, heads, head_dim] in the query's type; the step's keys and values are in the cache."""
        ...

    def sample(self, logits_rV: Tensor, batch: SamplingBatch | None) -> tuple[Tensor, Tensor]:
        """(token ids int64 [r], finite bool [r]); the likeliest tokens where there are no parameters."""
        ...
