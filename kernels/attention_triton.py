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
from batchinfer.kernels.kv_cache import MOST, KVCache
from batchinfer.kernels.shipped_triton import Shipped

LOG2_E = tl.constexpr(1.4426950408889634)
WEIGHTS_UP = tl.constexpr(7.0)
"""Weights over 8-bit values are at most 2 to this power, because their products with the values' scales are float16.
Scales from 2^-20 on lose no more than float16's own rounding, 2^-12 of the largest. Above a scale of 511, which stands
for values of 65,000 in int8 and 229,000 in float8, the result is infinite."""


@triton.jit
def _float16_rows(b_q):
    # Bring the largest number of each row near float16's end, by a power of two: bfloat16 and float16 stay exact down
    # to 2^-32 of the row's largest number. Below that they are off by at most 2^-40 of it.
    b_q = b_q.to(tl.float32)
    b_exponent = tl.max(tl.abs(b_q), 1).to(tl.int32, bitcast=True) >> 23
    b_power = tl.minimum(2 * 127 + 15 - b_exponent, 127 + 63)
    b_up = (b_power << 23).to(tl.float32, bitcast=True)
    return (b_q * b_up[:, None]).to(tl.float16), ((2 * 127 - b_power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _widened(b_x, dtype: tl.constexpr):
    # The bits of an int8, XOR 0x6480, are those of a float16 that is 1152 more. GPUs convert integers far slower.
    if b_x.dtype == tl.int8 and dtype == tl.float16:
        b_bits = b_x.to(tl.uint8, bitcast=True).to(tl.uint16) ^ 0x6480
        return b_bits.to(tl.float16, bitcast=True) - 1152.0
    else:
        return b_x.to(dtype)


@triton.jit
def _attend(
    b_base, b_total, b_sum, b_q, b_factor, o_last, first, stop, start, end,
    p_key, p_value, p_key_scale, p_value_scale, p_table,
    HEAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, QUANTIZED: tl.constexpr, UP: tl.constexpr,
    CAP: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Go through the tiles of keys from `first` up to `stop`. Without `MASKED` every row sees every key of them. Both
    # kinds must give equal bits where no key is hidden, so each product with a sum is written as an `fma`: the compiler
    # must not choose between one rounding and two.
    kv_heads, i_kv = tl.num_programs(1), tl.program_id(1)
    dtype: tl.constexpr = b_q.dtype
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD
    for key in range(first, stop, BLOCK_N):
        o_n = key + tl.arange(0, BLOCK_N)
        o_place = o_n % PAGE
        if MASKED:
            m_n = (o_n >= start) & (o_n < end)
            b_page = tl.load(p_table + o_n // PAGE, m_n, 0).to(tl.int64)
        else:
            m_n = None
            b_page = tl.load(p_table + o_n // PAGE).to(tl.int64)
        o_slot = (b_page * kv_heads + i_kv) * PAGE + o_place
        b_k = tl.load(p_key + o_slot[None, :] * HEAD + o_d[:, None], m_d[:, None], 0.0)
        b_s = tl.dot(b_q, _widened(b_k, dtype), input_precision="ieee")
        if QUANTIZED:
            b_s *= tl.load(p_key_scale + o_slot)[None, :]
        b_unit = b_factor
        if CAP > 0.0:  # from here on the products are scores already
            b_s = CAP - 2.0 * CAP / (tl.exp2(b_s * (b_factor * (2.0 * LOG2_E / CAP))[:, None]) + 1.0)
            b_unit = tl.full(b_factor.shape, 1.0, tl.float32)
        if MASKED:
            m_seen = (o_n[None, :] <= o_last[:, None]) & m_n[None, :]
            if WINDOW > 0:
                m_seen &= o_n[None, :] > o_last[:, None] - WINDOW
            b_s = tl.where(m_seen, b_s, float("-inf"))

        b_new = tl.maximum(b_base, tl.fma(tl.max(b_s, 1), b_unit, -UP))
        b_from = b_new
        if MASKED:
            # In a row that has seen no key yet, -inf minus -inf would be NaN; its weights must be 0.
            b_from = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(tl.fma(b_s, b_unit[:, None], -b_from[:, None]))
        b_kept = tl.exp2(b_base - b_from)
        b_base = b_new
        b_total = tl.fma(b_total, b_kept, tl.sum(b_p, 1))
        b_sum *= b_kept[:, None]
        if QUANTIZED:
            b_p *= tl.load(p_value_scale + o_slot, m_n, 0.0 if MASKED else None)[None, :]
            # Keys of a block lie side by side, so the compiler must know that they share its number.
            o_value = (tl.max_constancy(b_page, min(PAGE, BLOCK_N)) * kv_heads + i_kv) * (HEAD * PAGE) + o_place
            b_v = _widened(
                tl.trans(tl.load(p_value + o_value[None, :] + o_d[:, None] * PAGE, m_d[:, None], 0.0)), dtype
            )
            if MASKED and p_value.dtype.element_ty != tl.int8:
                # After the last key a block may hold NaN, which a weight of 0 does not hide; float8 begins at -448.
                b_v = tl.maximum(b_v, tl.full((BLOCK_N, BLOCK_D), -448.0, dtype))
        else:
            m_value = m_d[None, :]
            if MASKED:
                m_value &= m_n[:, None]
            b_v = tl.load(p_value + o_slot[:, None] * HEAD + o_d[None, :], m_value, 0.0).to(dtype)
        b_sum = tl.dot(b_p.to(dtype), b_v, b_sum, input_precision="ieee")
    return b_base, b_total, b_sum


@triton.jit
def _attention_kernel(
    p_query, p_key, p_value, p_key_scale, p_value_scale, p_table, p_items, p_first, p_out, p_partial, p_lse,
    p_sinks, scale,
    GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, QUANTIZED: tl.constexpr,
    CAP: tl.constexpr, SINKS: tl.constexpr, ITEM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
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

    # A row's products times its factor are its scores, as powers of two. Weights are 2 to the score minus the base,
    # which is the largest score minus UP.
    b_factor = tl.full((BLOCK_M,), 1.0, tl.float32) * scale
    FLOAT16: tl.constexpr = QUANTIZED and dtype != tl.float32
    UP: tl.constexpr = WEIGHTS_UP if FLOAT16 else 0.0
    if FLOAT16:
        b_q, b_unit = _float16_rows(b_q)
        b_factor *= b_unit
    b_base = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_M,), tl.float32)
    b_sum = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    if WINDOW > 0 and QUANTIZED:  # a third loop would spill registers, so all tiles are masked
        hidden = start // BLOCK_N * BLOCK_N
    else:
        # All rows see the keys from `clear` up to `hidden`: these tiles need no masks.
        clear = start
        if WINDOW > 0:
            start_tile = start // BLOCK_N * BLOCK_N
            clear = tl.cdiv(tl.maximum(start, position + count - WINDOW), BLOCK_N) * BLOCK_N
            b_base, b_total, b_sum = _attend(
                b_base, b_total, b_sum, b_q, b_factor, o_last, start_tile, tl.minimum(clear, end), start, end,
                p_key, p_value, p_key_scale, p_value_scale, p_table,
                HEAD, PAGE, WINDOW, QUANTIZED, UP, CAP, True, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        else:
            clear = tl.multiple_of(clear, min(PAGE, BLOCK_N))
        hidden = clear + tl.maximum(tl.minimum(end, position + 1) - clear, 0) // BLOCK_N * BLOCK_N
        b_base, b_total, b_sum = _attend(
            b_base, b_total, b_sum, b_q, b_factor, o_last, clear, hidden, start, end,
            p_key, p_value, p_key_scale, p_value_scale, p_table,
            HEAD, PAGE, WINDOW, QUANTIZED, UP, CAP, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    b_base, b_total, b_sum = _attend(
        b_base, b_total, b_sum, b_q, b_factor, o_last, hidden, end, start, end,
        p_key, p_value, p_key_scale, p_value_scale, p_table,
        HEAD, PAGE, WINDOW, QUANTIZED, UP, CAP, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    if SINKS and partial < 0:  # where partials are merged, the sinks are counted then
        b_total += tl.exp2(tl.load(p_sinks + i_kv * GROUP + tl.arange(0, BLOCK_M) % GROUP) * LOG2_E - b_base)
    b_total = tl.where(b_total == 0.0, 1.0, b_total)
    b_out = b_sum / b_total[:, None]
    if partial < 0:
        tl.store(p_out + o_row[:, None] + o_d[None, :], b_out.to(dtype), m_md)
    else:
        b_slot = (tl.load(p_first + row + o_token, m_m, 0) + partial).to(tl.int64)
        o_partial = b_slot * (kv_heads * GROUP) + o_head
        tl.store(p_lse + o_partial, b_base + tl.log2(b_total), m_m)
        tl.store(p_partial + o_partial[:, None] * HEAD + o_d[None, :], b_out, m_md)


def paged_attention(
    query_THd: Tensor,
    cache: KVCache,
    plan: AttentionPlan,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return attention's outputs [T, heads, head_dim] in the query's type; tokens after the plan's get zeros.

    `sinks` are float32 scores that count in softmax and stand for no value.

    The query is contiguous, in float32, bfloat16 or float16; the cache is in one of these, int8 or float8_e4m3fn.
    An 8-bit cache enters the products unscaled, as float16 unless the query is float32: the keys' scales multiply the
    scores, and the values' scales multiply the weights. Its values must lie by column.
    """
    heads, head_dim = query_THd.shape[1:]
    kv_heads, block_size = cache.key.shape[1:3]
    device = query_THd.device
    out = torch.empty(query_THd.shape, dtype=query_THd.dtype, device=device)
    out[plan.tokens :] = 0
    partial = torch.empty(plan.partials, heads, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(plan.partials, heads, dtype=torch.float32, device=device)
    quantized, sunk = cache.key_scale is not None, sinks_H is not None
    for tile, items in plan.launches:
        if not len(items):
            continue
        _attention_kernel[(len(items), kv_heads)](
            query_THd, cache.key, cache.value, cache.key_scale if quantized else lse,
            cache.value_scale if quantized else lse, plan.table, items, plan.first, out, partial, lse,
            lse if sinks_H is None else sinks_H, scale * math.log2(math.e),
            **_constants(tile, heads // kv_heads, head_dim, block_size, plan.window, quantized, softcap, sunk),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if len(plan.merged):
        merge_partials(partial, lse, plan.first, plan.merged, out, sinks_H)
    return out


def _constants(
    tile: Tile,
    group: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    quantized: bool,
    softcap: float | None = None,
    sinks: bool = False,
) -> dict[str, int | float | bool]:
    return {
        "GROUP": group,
        "HEAD": head_dim,
        "PAGE": block_size,
        "WINDOW": window or 0,
        "QUANTIZED": quantized,
        "CAP": (softcap or 0.0) * math.log2(math.e),
        "SINKS": sinks,
        "ITEM": ITEM,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }


def tiling(head_dim: int, group: int, query: torch.dtype, kv: torch.dtype, gpu: Gpu) -> Tiling:
    """Choose the tiles for heads of size `head_dim` where `group` query heads share a key head.

    They are the largest that spill no register, and fit the GPU's shared memory with two tiles of keys and values
    there, one of which is loaded while the other is used. That takes five stages, because a block's number is loaded
    before its keys. With 64 KiB, as AMD's GPUs have, the tile ahead waits in registers, and two stages are enough.
    """
    width, stages = triton.next_power_of_2(head_dim), 2 if gpu.shared_bytes <= 64 << 10 else 5
    roomy = gpu.shared_bytes >= 200 << 10
    if query == torch.float32:  # multiplied without matrix units, from registers
        keys = 32 if width <= (128 if roomy else 64) and kv not in MOST else 16
        few = many = same = (16, keys, 8, 200 if kv in MOST else 80)
    elif width > 256:  # the fewest keys that matrix units take: as many numbers as in twice as many keys of 256
        few, many, same = (16, 16, 8 if kv in MOST else 4, 255), (32, 16, 8, 255), (32, 16, 8, 255)
        if kv in MOST and stages == 2:  # AMD's registers hold no more rows beside what is widened
            few = many = same = (16, 16, 4, 255)
    else:
        keys = 8192 // width if roomy else 4096 // width
        # Masks of padded heads take registers, and so do large heads of 8 bits, and groups that are no power of two.
        fewest = 4096 // width if width > head_dim or (kv in MOST and width > 128) else keys
        few = (16, min(fewest, 64), 4, (168 if fewest * width > 4096 else 128) + (56 if width > 128 else 0))
        wide, narrow = 128 if width <= 128 and (roomy or group & (group - 1) == 0) else 64, min(4096 // width, 32)
        many, same = (wide, min(keys, 64), 8, 255), (64, narrow, 4 if width <= 128 else 8, 255)
        if kv in MOST:  # widening 8-bit numbers takes registers
            many, same = (wide if roomy else 64, min(keys, 32), 8, 255), (64, narrow, 8, 255)
            if roomy and width > 128:
                many = same = (32, 32, 8, 128)

    def tile(rows: int, keys: int, warps: int, registers: int) -> Tile:
        shared = 4 * keys * width * kv.itemsize + (8 << 10)  # two buffers of keys and of values, queries and weights
        resident = min((64 << 10) // (32 * warps * registers), gpu.shared_bytes // shared)
        return Tile(max(rows, triton.next_power_of_2(group)), keys, warps, stages, max(resident, 1))

    return Tiling(tile(*few), tile(*many), tile(*same))


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for every type of query and cache with heads of 128, and for other heads, groups and windows.

    The last ones are Gemma 4's, Gemma 2's with a soft cap, and gpt-oss's with sinks.
    """
    every = ("bf16", "fp16", "i8", "fp8e4nv")
    cases: list[tuple[int, int, int, str, str]] = [(128, 4, 0, "bf16", kv) for kv in every if kv != "fp16"]
    cases += [(128, 4, 0, "fp16", kv) for kv in ("fp16", "i8")]
    cases += [(128, 4, 0, "fp32", kv) for kv in ("fp32", "i8", "fp8e4nv")]
    cases += [(head_dim, 4, 0, "bf16", kv) for head_dim in (64, 80, 96, 256) for kv in ("bf16", "i8", "fp8e4nv")]
    cases += [(head_dim, 4, 0, "fp32", "fp32") for head_dim in (64, 256)]
    cases += [(128, group, 0, "bf16", kv) for group in (1, 7, 8) for kv in ("bf16", "i8")]
    cases += [(128, 4, 4096, "bf16", kv) for kv in ("bf16", "i8", "fp8e4nv")]
    cases += [(512, 8, 0, "bf16", kv) for kv in ("bf16", "i8", "fp8e4nv")]
    cases += [(256, 8, 512, "bf16", kv) for kv in ("bf16", "i8", "fp8e4nv")]
    capped = [(256, 2, window, "bf16", kv) for window in (0, 4096) for kv in ("bf16", "i8")]
    with_sinks = [(64, 8, window, "bf16", kv) for window in (0, 128) for kv in ("bf16", "i8")]
    every_case: list[tuple[tuple[int, int, int, str, str], float | None, bool]]
    every_case = [(case, None, False) for case in cases]
    every_case += [(case, 50.0, False) for case in capped] + [(case, None, True) for case in with_sinks]
    return [
        _shipped(gpu, f"{which} tokens", getattr(tiles, which), *case, softcap, sinks)
        for case, softcap, sinks in every_case
        for tiles in (tiling(case[0], case[1], _TYPES[case[3]], _TYPES[case[4]], gpu),)
        for which in ("few", "many", "same")
    ]


_TYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "i8": torch.int8,
    "fp8e4nv": torch.float8_e4m3fn,
}


def _shipped(
    gpu: Gpu,
    which: str,
    tile: Tile,
    head_dim: int,
    group: int,
    window: int,
    query: str,
    kv: str,
    softcap: float | None,
    sinks: bool,
) -> Shipped:
    bounded = gpu.capability == (9, 0) and (which, head_dim, group, window) == ("few tokens", 128, 4, 0)
    quantized = _TYPES[kv] in MOST
    product = None if query == "fp32" else "fp16" if quantized else query
    return Shipped(
        f"attention, {which}, {group} heads of {head_dim} to a key head, {f'window {window}, ' if window else ''}"
        f"{'' if softcap is None else f'soft cap {softcap:g}, '}{'sinks, ' if sinks else ''}"
        f"queries in {query}, cache in {kv}",
        _attention_kernel,
        {"p_query": f"*{query}", "p_key": f"*{kv}", "p_value": f"*{kv}", "p_key_scale": "*fp32",
         "p_value_scale": "*fp32", "p_table": "*i32", "p_items": "*i32", "p_first": "*i32", "p_out": f"*{query}",
         "p_partial": "*fp32", "p_lse": "*fp32", "p_sinks": "*fp32", "scale": "fp32"},
        _constants(tile, group, head_dim, 32, window, quantized, softcap, sinks),
        tile.warps,
        tile.stages,
        product=product,
        product_rows=tile.rows,
        prefetches=True,
        most_instructions=720 if bounded and kv == "fp8e4nv" else None,
    )  # fmt: skip
