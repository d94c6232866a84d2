"""Paged attention in Triton: chunks of prompts, decoded tokens, drafts and shared prefixes in one kernel.

A program computes one item of the plan (`attention_plan.py`) for one key head: a tile of queries by a range of keys.
The tile's rows are the item's tokens times the query heads that share the key head. The program goes through the keys
in tiles with a running softmax (Dao et al. 2022). It writes the output itself, or a partial result that
`attention_merge_triton.py` merges with others.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.attention_merge_triton import merge_partials
from batchinfer.kernels.attention_plan import ITEM, AttentionPlan, Tile, Tiling
from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.kv_cache import KVCache
from batchinfer.kernels.shipped_triton import Shipped


@triton.jit
def _attention_kernel(
    p_query, p_key, p_value, p_key_scale, p_value_scale, p_table, p_items, p_first, p_out, p_partial, p_lse, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, QUANTIZED: tl.constexpr,
    ITEM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    kv_heads, i_kv = tl.num_programs(1), tl.program_id(1)
    p_items += tl.program_id(0) * ITEM
    row, count = tl.load(p_items), tl.load(p_items + 1)
    p_table += tl.load(p_items + 2)
    start, end = tl.load(p_items + 3), tl.load(p_items + 4)
    position, partial = tl.load(p_items + 5), tl.load(p_items + 6)
    dtype: tl.constexpr = p_query.dtype.element_ty

    # Row m of the tile is query head m % GROUP of token m // GROUP; unused rows come after the last token's.
    o_m = tl.arange(0, BLOCK_M)
    o_token = o_m // GROUP
    m_m = o_token < count
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD
    o_head = i_kv * GROUP + o_m % GROUP
    o_row = ((row + o_token).to(tl.int64) * (kv_heads * GROUP) + o_head) * HEAD
    m_md = m_m[:, None] & m_d[None, :]
    b_q = tl.load(p_query + o_row[:, None] + o_d[None, :], m_md, 0.0)
    o_last = position + o_token  # the last key that a row sees

    b_most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_M,), tl.float32)
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # Tiles of keys lie on a grid from the sequence's start, wherever the item begins.
    for key in range(start // BLOCK_N * BLOCK_N, end, BLOCK_N):
        o_n = key + tl.arange(0, BLOCK_N)
        m_n = (o_n >= start) & (o_n < end)
        b_page = tl.load(p_table + o_n // PAGE, m_n, 0).to(tl.int64)
        o_slot = (b_page * kv_heads + i_kv) * PAGE + o_n % PAGE
        b_k = tl.load(p_key + o_slot[None, :] * HEAD + o_d[:, None], m_d[:, None] & m_n[None, :], 0.0)
        b_s = tl.dot(b_q, b_k.to(dtype), input_precision="ieee")
        if QUANTIZED:
            b_s *= (tl.load(p_key_scale + o_slot, m_n, 0.0) * scale)[None, :]
        else:
            b_s *= scale
        m_seen = (o_n[None, :] <= o_last[:, None]) & m_n[None, :]
        if WINDOW > 0:
            m_seen &= o_n[None, :] > o_last[:, None] - WINDOW
        b_s = tl.where(m_seen, b_s, float("-inf"))

        b_new = tl.maximum(b_most, tl.max(b_s, 1))
        # In a row that has seen no key yet, -inf minus -inf would be NaN; its weights must be 0.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_base[:, None])
        b_kept = tl.exp2(b_most - b_base)
        b_most = b_new
        b_total = b_total * b_kept + tl.sum(b_p, 1)
        b_sum *= b_kept[:, None]
        if QUANTIZED:
            b_p *= tl.load(p_value_scale + o_slot, m_n, 0.0)[None, :]
        b_v = tl.load(p_value + o_slot[:, None] * HEAD + o_d[None, :], m_n[:, None] & m_d[None, :], 0.0)
        b_sum = tl.dot(b_p.to(dtype), b_v.to(dtype), b_sum, input_precision="ieee")

    b_total = tl.where(b_total == 0.0, 1.0, b_total)
    b_out = b_sum / b_total[:, None]
    if partial < 0:
        tl.store(p_out + o_row[:, None] + o_d[None, :], b_out.to(dtype), m_md)
    else:
        b_slot = (tl.load(p_first + row + o_token, m_m, 0) + partial).to(tl.int64)
        o_partial = b_slot * (kv_heads * GROUP) + o_head
        tl.store(p_lse + o_partial, b_most + tl.log2(b_total), m_m)
        tl.store(p_partial + o_partial[:, None] * HEAD + o_d[None, :], b_out, m_md)


def paged_attention(query_THd: Tensor, cache: KVCache, plan: AttentionPlan, scale: float) -> Tensor:
    """Return attention's outputs [T, heads, head_dim] in the query's type; tokens after the plan's get zeros.

    The query is contiguous, in float32, bfloat16 or float16; the cache is in one of these, int8 or float8_e4m3fn.
    An 8-bit cache enters the products unscaled: the keys' scales multiply the scores, and the values' scales multiply
    the weights. In float16, weights lose digits where the values' scales are below 1e-4.
    """
    heads, head_dim = query_THd.shape[1:]
    kv_heads, block_size = cache.key.shape[1:3]
    device = query_THd.device
    out = torch.empty(query_THd.shape, dtype=query_THd.dtype, device=device)
    out[plan.tokens :] = 0
    partial = torch.empty(plan.partials, heads, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(plan.partials, heads, dtype=torch.float32, device=device)
    quantized = cache.key_scale is not None
    for tile, items in plan.launches:
        _attention_kernel[(len(items), kv_heads)](
            query_THd, cache.key, cache.value, cache.key_scale if quantized else lse,
            cache.value_scale if quantized else lse, plan.table, items, plan.first, out, partial, lse,
            scale * math.log2(math.e),
            **_constants(tile, heads // kv_heads, head_dim, block_size, plan.window, quantized),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if len(plan.merged):
        merge_partials(partial, lse, plan.first, plan.merged, out)
    return out


def _constants(
    tile: Tile, group: int, head_dim: int, block_size: int, window: int | None, quantized: bool
) -> dict[str, int | bool]:
    return {
        "GROUP": group,
        "HEAD": head_dim,
        "PAGE": block_size,
        "WINDOW": window or 0,
        "QUANTIZED": quantized,
        "ITEM": ITEM,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }


def tiling(head_dim: int, group: int, quantized: bool = False) -> Tiling:
    """Choose the tiles for heads of size `head_dim` where `group` query heads share a key head.

    `quantized` means a cache in 8 bits. The tiles are the largest that spill no register on any architecture, for any
    type of the cache. Three stages are the fewest with which keys are loaded ahead of their use, because their block's
    number must be loaded before them.
    """
    large, least = head_dim > 128, triton.next_power_of_2(group)
    keys = 16 if large else 32
    rows = 64 if large or (quantized and head_dim > 64) else 128  # converting 8-bit numbers takes registers
    return Tiling(
        few=Tile(max(16, least), 2 * keys, 4, 3),
        many=Tile(max(rows, least), keys, 8, 3),
        same=Tile(max(64, least), keys, 8 if large else 4, 3),
    )


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for every head size, type of the cache and tile."""
    return [
        _shipped(f"{which} tokens", tile, head_dim, kv)
        for head_dim in (64, 80, 96, 128, 256)
        for kv in ("bf16", "fp16", "i8", "fp8e4nv")
        for which, tile in _tiles(head_dim, kv in ("i8", "fp8e4nv"))
    ]


def _tiles(head_dim: int, quantized: bool) -> list[tuple[str, Tile]]:
    tiles = tiling(head_dim, 4, quantized)
    return [("few", tiles.few), ("many", tiles.many), ("same", tiles.same)]


def _shipped(which: str, tile: Tile, head_dim: int, kv: str) -> Shipped:
    query = "fp16" if kv == "fp16" else "bf16"
    return Shipped(
        f"attention, {which}, heads of {head_dim}, cache in {kv}",
        _attention_kernel,
        {"p_query": f"*{query}", "p_key": f"*{kv}", "p_value": f"*{kv}", "p_key_scale": "*fp32",
         "p_value_scale": "*fp32", "p_table": "*i32", "p_items": "*i32", "p_first": "*i32", "p_out": f"*{query}",
         "p_partial": "*fp32", "p_lse": "*fp32", "scale": "fp32"},
        _constants(tile, 4, head_dim, 32, None, kv in ("i8", "fp8e4nv")),
        tile.warps,
        tile.stages,
        product=query,
        product_rows=tile.rows,
        prefetches=True,
    )  # fmt: skip
