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
from batchinfer.kernels.norm import LayerNorm, NormWeights
from batchinfer.kernels.rounding_triton import rounded
from batchinfer.kernels.shipped_triton import Shipped


@triton.jit
def _normed(b_a, b_b, p_weight, p_bias, eps, o_d, m_d, half, dtype: tl.constexpr, CENTERED: tl.constexpr):
    """Return the norm of a head, given as its halves, rounded to `dtype` as if it were an operation of its own."""
    if CENTERED:
        mean = tl.sum(b_a + b_b) / (2 * half)
        b_a, b_b = tl.where(m_d, b_a - mean, 0.0), tl.where(m_d, b_b - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(b_a * b_a + b_b * b_b) / (2 * half) + eps)
    b_a = b_a * inverse * tl.load(p_weight + o_d, m_d, 0.0).to(tl.float32)
    b_b = b_b * inverse * tl.load(p_weight + half + o_d, m_d, 0.0).to(tl.float32)
    if CENTERED:
        b_a += tl.load(p_bias + o_d, m_d, 0.0).to(tl.float32)
        b_b += tl.load(p_bias + half + o_d, m_d, 0.0).to(tl.float32)
    return b_a.to(dtype).to(tl.float32), b_b.to(dtype).to(tl.float32)


@triton.jit
def _store_kernel(
    p_qkv, p_query, p_key, p_value, p_key_scale, p_value_scale, p_cos, p_sin, p_slots,
    p_query_norm, p_key_norm, p_query_bias, p_key_bias, norm_step,
    eps, heads, kv_heads, block_size, half,
    NORM: tl.constexpr, CENTERED: tl.constexpr, NORM_LAST: tl.constexpr, NORM_VALUES: tl.constexpr,
    STORE: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Each program handles one head of one token: query heads first, then key heads, then value heads.
    i_token, i_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < half
    p_head = p_qkv + (i_token * (heads + 2 * kv_heads) + i_head) * 2 * half
    b_a = tl.load(p_head + o_d, m_d, 0.0).to(tl.float32)
    b_b = tl.load(p_head + half + o_d, m_d, 0.0).to(tl.float32)
    if i_head < heads + kv_heads:
        # Weights of all heads alike lie at step 0.
        o_norm = tl.where(i_head < heads, i_head, i_head - heads) * norm_step
        p_norm = (p_query_norm if i_head < heads else p_key_norm) + o_norm
        p_bias = (p_query_bias if i_head < heads else p_key_bias) + o_norm
        stream: tl.constexpr = p_query.dtype.element_ty
        if NORM and not NORM_LAST:
            b_a, b_b = _normed(b_a, b_b, p_norm, p_bias, eps, o_d, m_d, half, stream, CENTERED)
        b_cos = tl.load(p_cos + i_token * half + o_d, m_d, 0.0)
        b_sin = tl.load(p_sin + i_token * half + o_d, m_d, 0.0)
        b_a, b_b = b_a * b_cos - b_b * b_sin, b_b * b_cos + b_a * b_sin
        if NORM and NORM_LAST:
            b_a, b_b = b_a.to(stream).to(tl.float32), b_b.to(stream).to(tl.float32)
            b_a, b_b = _normed(b_a, b_b, p_norm, p_bias, eps, o_d, m_d, half, stream, CENTERED)
    elif NORM_VALUES:
        inverse = tl.rsqrt(tl.sum(b_a * b_a + b_b * b_b) / (2 * half) + eps)
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
    norms: tuple[NormWeights, NormWeights] | None,
    norm_values: bool,
    eps: float,
    norms_last: bool = False,
) -> Tensor:
    """Rotate queries and keys, write keys and values to the cache, and return the queries [T, heads, head_dim].

    qkv is contiguous, [T, (heads + 2 kv_heads) * head_dim]; cos and sin are float32 [T, head_dim / 2]; slots are int64
    [T]. `norms` are those of each head of queries and of keys, if the model has them: of one kind, with weights
    [head_dim], or [heads, head_dim] and [kv_heads, head_dim]. With `norms_last` heads are rotated before that. With
    `norm_values`, each head of the values gets an RMSNorm without weight. An 8-bit cache holds its values by column.
    """
    kv_heads, block_size, head_dim = cache.key.shape[1:]
    query = torch.empty(len(qkv_TX), heads, head_dim, dtype=qkv_TX.dtype, device=qkv_TX.device)
    of_query, of_key = (cos_Td, cos_Td) if norms is None else norms
    query_norm, query_bias = of_query if isinstance(of_query, LayerNorm) else (of_query, of_query)
    key_norm, key_bias = of_key if isinstance(of_key, LayerNorm) else (of_key, of_key)
    quantize = cache.key_scale is not None
    _store_kernel[(len(qkv_TX), heads + 2 * kv_heads)](
        qkv_TX, query, cache.key, cache.value,
        cache.key_scale if quantize else cos_Td, cache.value_scale if quantize else cos_Td,
        cos_Td, sin_Td, slots_T, query_norm, key_norm, query_bias, key_bias, 0 if query_norm.dim() == 1 else head_dim,
        eps, heads, kv_heads, block_size, head_dim // 2,
        NORM=norms is not None, CENTERED=isinstance(of_query, LayerNorm), NORM_LAST=norms_last,
        NORM_VALUES=norm_values, STORE=True, QUANTIZE=quantize, BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1,
    )  # fmt: skip
    return query


def rotate_queries(
    query_TX: Tensor, heads: int, cos_Td: Tensor, sin_Td: Tensor, norm_d: NormWeights | None, eps: float
) -> Tensor:
    """Rotate queries [T, heads * head_dim], which are contiguous, and return [T, heads, head_dim].

    cos and sin are float32 [T, head_dim / 2]. `norm_d` is the norm on each head before that, if the model has one.
    """
    half = cos_Td.shape[1]
    query = torch.empty(len(query_TX), heads, 2 * half, dtype=query_TX.dtype, device=query_TX.device)
    weight, bias = norm_d if isinstance(norm_d, LayerNorm) else (cos_Td if norm_d is None else norm_d, cos_Td)
    _store_kernel[(len(query_TX), heads)](
        query_TX, query, query, query, cos_Td, cos_Td, cos_Td, sin_Td, cos_Td,
        weight, weight, bias, bias, 0 if weight.dim() == 1 or norm_d is None else 2 * half, eps, heads, 0, 1, half,
        NORM=norm_d is not None, CENTERED=isinstance(norm_d, LayerNorm), NORM_LAST=False, NORM_VALUES=False,
        STORE=False, QUANTIZE=False, BLOCK=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return query


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel without norms by head and with each kind of them, for every type of the cache, and Gemma 4's."""
    kinds = ("", "normed ", "layer-normed ", "last normed ")
    plain = [(head_dim, kind, False) for head_dim in (64, 128) for kind in kinds]
    gemma = [(256, "normed ", True), (512, "normed ", True)]
    storing = [
        _shipped(
            f"rotate_and_store, {kind}heads of {head_dim}{', normed values' if values else ''}, cache in {kv}",
            head_dim,
            kv,
            kind,
            {"NORM_VALUES": values, "STORE": True, "QUANTIZE": kv in ("i8", "fp8e4nv")},
        )
        for head_dim, kind, values in plain + gemma
        for kv in ("bf16", "i8", "fp8e4nv")
    ]
    alone = {"NORM_VALUES": False, "STORE": False, "QUANTIZE": False}
    return storing + [
        _shipped(f"rotate_queries, {kind}heads of {head_dim}", head_dim, "bf16", kind, alone)
        for head_dim, kind, _ in gemma
    ]


def _shipped(name: str, head_dim: int, kv: str, kind: str, constants: dict[str, bool]) -> Shipped:
    return Shipped(
        name,
        _store_kernel,
        {"p_qkv": "*bf16", "p_query": "*bf16", "p_key": f"*{kv}", "p_value": f"*{kv}", "p_key_scale": "*fp32",
         "p_value_scale": "*fp32", "p_cos": "*fp32", "p_sin": "*fp32", "p_slots": "*i64", "p_query_norm": "*bf16",
         "p_key_norm": "*bf16", "p_query_bias": "*bf16", "p_key_bias": "*bf16", "norm_step": "i32", "eps": "fp32",
         "heads": "i32", "kv_heads": "i32", "block_size": "i32", "half": "i32"},
        {"NORM": kind != "", "CENTERED": kind == "layer-normed ", "NORM_LAST": kind == "last normed ", **constants,
         "BLOCK": head_dim // 2},
        1,
    )  # fmt: skip
