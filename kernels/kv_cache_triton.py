"""All operations between a layer's first product and its attention, in one Triton launch.

Queries and keys are normalized by head, if the model does that, and rotated; some models also normalize values. Keys
and values are written to the cache; an 8-bit cache gets a scale per token and head. A layer that reads the keys and
values of another one has queries alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.rounding_triton import rounded
from batchinfer.kernels.shipped_triton import Shipped


@triton.jit
def _store_kernel(
    p_qkv, p_query, p_key, p_value, p_key_scale, p_value_scale, p_cos, p_sin, p_slots, p_query_norm, p_key_norm,
    eps, heads, kv_heads, block_size, half,
    NORM: tl.constexpr, NORM_VALUES: tl.constexpr, STORE: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Each program handles one head of one token: query heads first, then key heads, then value heads.
    i_token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < half
    p_head = p_qkv + (i_token * (heads + 2 * kv_heads) + i_head) * 2 * half
    b_a = tl.load(p_head + o_d, m_d, 0.0).to(tl.float32)
    b_b = tl.load(p_head + half + o_d, m_d, 0.0).to(tl.float32)
    if NORM or NORM_VALUES:
        inverse = tl.rsqrt(tl.sum(b_a * b_a + b_b * b_b) / (2 * half) + eps)
    if i_head < heads + kv_heads:
        if NORM:
            p_norm = p_query_norm if i_head < heads else p_key_norm
            # Round to the residual stream's type, as if the norm were an operation of its own.
            b_a = (b_a * inverse * tl.load(p_norm + o_d, m_d, 0.0).to(tl.float32)).to(p_query.dtype.element_ty)
            b_b = (b_b * inverse * tl.load(p_norm + half + o_d, m_d, 0.0).to(tl.float32)).to(p_query.dtype.element_ty)
            b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
        b_cos = tl.load(p_cos + i_token * half + o_d, m_d, 0.0)
        b_sin = tl.load(p_sin + i_token * half + o_d, m_d, 0.0)
        b_a, b_b = b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin
    elif NORM_VALUES:
        b_a, b_b = (b_a * inverse).to(p_query.dtype.element_ty), (b_b * inverse).to(p_query.dtype.element_ty)
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    if i_head < heads:
        p_out = p_query + (i_token * heads + i_head) * 2 * half
        tl.store(p_out + o_d, b_a.to(p_query.dtype.element_ty), m_d)
        tl.store(p_out + half + o_d, b_b.to(p_query.dtype.element_ty), m_d)
    elif STORE:
        is_key = i_head < heads + kv_heads
        i_kv = i_head - heads - tl.where(is_key, 0, kv_heads)
        slot = tl.load(p_slots + i_token)
        place = slot % block_size
        row = ((slot // block_size) * kv_heads + i_kv) * block_size + place
        p_pool = p_key if is_key else p_value
        dtype: tl.constexpr = p_key.dtype.element_ty
        if QUANTIZE:
            most: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
            b_a, b_b = b_a.to(p_query.dtype.element_ty).to(tl.float32), b_b.to(p_query.dtype.element_ty).to(tl.float32)
            scale = tl.max(tl.maximum(tl.abs(b_a), tl.abs(b_b))) / most + tl.sum((b_a + b_b) * 0.0)
            inverse = 1.0 / tl.maximum(scale, 1e-30)
            b_a, b_b = b_a * inverse, b_b * inverse
            if dtype == tl.int8:
                b_a, b_b = rounded(b_a), rounded(b_b)
            p_scale = p_key_scale if is_key else p_value_scale
            tl.store(p_scale + row, scale)
        first, step = row * 2 * half, 1
        if QUANTIZE:  # 8-bit values lie by column: [blocks, kv_heads, head_dim, block_size]
            first = tl.where(is_key, first, (row - place) * 2 * half + place)
            step = tl.where(is_key, 1, block_size)
        tl.store(p_pool + first + o_d * step, b_a.to(dtype), m_d)
        tl.store(p_pool + first + (half + o_d) * step, b_b.to(dtype), m_d)


def rotate_and_store(
    qkv_TX: Tensor,
    cache: KVCache,
    heads: int,
    cos_Td: Tensor,
    sin_Td: Tensor,
    slots_T: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    norm_values: bool,
    eps: float,
) -> Tensor:
    """Rotate queries and keys, write keys and values to the cache, and return the queries [T, heads, head_dim].

    qkv is contiguous, [T, (heads + 2 kv_heads) * head_dim]; cos and sin are float32 [T, head_dim / 2]; slots are int64
    [T]. `norms` are the weights [head_dim] of the norms on each head of queries and of keys, if the model has them.
    With `norm_values`, each head of the values gets a norm without weight. An 8-bit cache holds its values by column.
    """
    kv_heads, block_size, head_dim = cache.key.shape[1:]
    query = torch.empty(len(qkv_TX), heads, head_dim, dtype=qkv_TX.dtype, device=qkv_TX.device)
    query_norm, key_norm = (cos_Td, cos_Td) if norms is None else norms
    quantize = cache.key_scale is not None
    _store_kernel[(len(qkv_TX), heads + 2 * kv_heads)](
        qkv_TX, query, cache.key, cache.value,
        cache.key_scale if quantize else cos_Td, cache.value_scale if quantize else cos_Td,
        cos_Td, sin_Td, slots_T, query_norm, key_norm, eps, heads, kv_heads, block_size, head_dim // 2,
        NORM=norms is not None, NORM_VALUES=norm_values, STORE=True, QUANTIZE=quantize,
        BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip
    return query


def rotate_queries(
    query_TX: Tensor, heads: int, cos_Td: Tensor, sin_Td: Tensor, norm_d: Tensor | None, eps: float
) -> Tensor:
    """Rotate queries [T, heads * head_dim], which are contiguous, and return [T, heads, head_dim].

    cos and sin are float32 [T, head_dim / 2]. `norm_d` is the weight [head_dim] of the norm on each head, if the model
    has one.
    """
    half = cos_Td.shape[1]
    query = torch.empty(len(query_TX), heads, 2 * half, dtype=query_TX.dtype, device=query_TX.device)
    norm = cos_Td if norm_d is None else norm_d
    _store_kernel[(len(query_TX), heads)](
        query_TX, query, query, query, cos_Td, cos_Td, cos_Td, sin_Td, cos_Td, norm, norm, eps, heads, 0, 1, half,
        NORM=norm_d is not None, NORM_VALUES=False, STORE=False, QUANTIZE=False, BLOCK=triton.next_power_of_2(half),
        num_warps=1,
    )  # fmt: skip
    return query


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel with and without norms by head, for every type of the cache, and for Gemma 4's heads."""
    plain = [(head_dim, norm, False) for head_dim in (64, 128) for norm in (False, True)]
    gemma = [(256, True, True), (512, True, True)]
    storing = [
        _shipped(
            f"rotate_and_store, {'normed ' if norm else ''}heads of {head_dim}{', normed values' if values else ''}, "
            f"cache in {kv}",
            head_dim,
            kv,
            {"NORM": norm, "NORM_VALUES": values, "STORE": True, "QUANTIZE": kv in ("i8", "fp8e4nv")},
        )
        for head_dim, norm, values in plain + gemma
        for kv in ("bf16", "i8", "fp8e4nv")
    ]
    alone = {"NORM": True, "NORM_VALUES": False, "STORE": False, "QUANTIZE": False}
    return storing + [
        _shipped(f"rotate_queries, normed heads of {head_dim}", head_dim, "bf16", alone) for head_dim, _, _ in gemma
    ]


def _shipped(name: str, head_dim: int, kv: str, constants: dict[str, bool]) -> Shipped:
    return Shipped(
        name,
        _store_kernel,
        {"p_qkv": "*bf16", "p_query": "*bf16", "p_key": f"*{kv}", "p_value": f"*{kv}", "p_key_scale": "*fp32",
         "p_value_scale": "*fp32", "p_cos": "*fp32", "p_sin": "*fp32", "p_slots": "*i64", "p_query_norm": "*bf16",
         "p_key_norm": "*bf16", "eps": "fp32", "heads": "i32", "kv_heads": "i32", "block_size": "i32",
         "half": "i32"},
        {**constants, "BLOCK": head_dim // 2},
        1,
    )  # fmt: skip
