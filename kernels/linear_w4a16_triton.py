"""The product of floating-point rows with 4-bit weights in Triton. Weights are read in 4 bits, multiplied in x's type.

The weight is the left operand: `weight @ x.T`. Hopper's matrix units can read the left operand from registers, where
the numbers are unpacked, but the right one only from shared memory. They also compute at least 64 rows of the left
operand. Of the weight's rows there are always enough, so few rows of x need little padding.

A number is unpacked as a small integer, which every type holds exactly. The scale of its group multiplies the group's
sum, in float32. Unpacking is written as shifts and masks, not as assembly, so that the same code runs in the
interpreter and on every vendor's device. A span is unpacked whole and multiplied at once, so that matrix units are
waited for once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.four_bits_triton import DEEPEST, FourBits, halves_of, near, unpacked
from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.shipped_triton import Shipped
from batchinfer.kernels.tile_triton import Tile

TILES = {
    16: Tile(rows=16, columns=64, depth=DEEPEST, warps=4, stages=4),
    None: Tile(rows=64, columns=64, depth=DEEPEST, warps=4, stages=3),
}
"""Tiles by the largest number of rows of x that they serve. `None` serves any number, and is the one tile for results
that must not depend on the number of rows.

Unmeasured. Larger tiles spill registers on Hopper, and Triton 3.7 compiles them to a bare `trap` for sm_100.
"""
FLOAT32_TILE = Tile(rows=16, columns=32, depth=DEEPEST, warps=4, stages=3)
"""The tile for any number of float32 rows. With 64 columns sm_100's matrix units would take them, and round."""
REGISTERS = {TILES[16]: 96, TILES[None]: 168, FLOAT32_TILE: 80}
"""Registers of a thread, by the tile: about the most on any of NVIDIA's (`benchmarks/compile_check/run.py`)."""
EXPAND_ROWS = 1300
"""From this number of rows on, arithmetic is the bottleneck: expand the weights once and let torch multiply.
Unmeasured."""
LEAST_COLUMNS = 512
"""The fewest columns in a split. Fewer would not fill the loop's pipeline."""
MOST_SPLITS = 16
SLAB = 1024
"""Number of rows multiplied in one launch. It bounds the memory for the splits' partial sums."""


@triton.jit(do_not_specialize=["m", "spans", "split_spans"])
def _linear_w4a16_kernel(
    p_x, p_words, p_pairs, p_bias, p_y, m, n, spans, split_spans,
    K: tl.constexpr, GROUP: tl.constexpr, NEAR: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = DEPTH // 8
    dtype: tl.constexpr = p_x.dtype.element_ty
    i_n = tl.program_id(1)
    i_split = tl.program_id(2)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read other rows again (modulo), so that loads need no mask; their results are not stored.
    p_x += (o_m % m).to(tl.int64)[None, :] * K
    o_row = o_n % n
    o_words = o_row.to(tl.int64)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    b_y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    end = tl.minimum((i_split + 1) * split_spans, spans)
    # Stages are named here because otherwise only what goes into the product is loaded ahead, and scales are not.
    for i_span in tl.range(i_split * split_spans, end, num_stages=STAGES):
        i_long = tl.cast(i_span, tl.int64)
        b_words = tl.load(p_words + i_long * n * WORDS + o_words)
        i_column = i_span * DEPTH
        b_pair = tl.load(p_pairs + i_column // GROUP * n + o_row)
        o_k = i_column + tl.arange(0, DEPTH)
        m_k = (o_k < K)[:, None]
        b_x = tl.load(p_x + o_k[:, None]) if K % DEPTH == 0 else tl.load(p_x + o_k[:, None], m_k, 0.0)
        b_subtracted, b_scale = halves_of(b_pair, dtype)
        b_weight = unpacked(b_words, b_subtracted, dtype, NEAR)
        b_y += tl.dot(b_weight, b_x, input_precision="ieee") * b_scale.to(tl.float32)[:, None]
    if BIAS:
        b_y += tl.load(p_bias + o_row).to(tl.float32)[:, None]
    p_y += (i_split.to(tl.int64) * m + o_m)[None, :] * n + o_n[:, None]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), (o_n < n)[:, None] & (o_m < m)[None, :])


@triton.jit(do_not_specialize=["m", "splits"])
def _sum_kernel(p_partials, p_bias, p_y, m, n, splits, MOST: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = m.to(tl.int64) * n
    m_y = o_y < count
    b_y = tl.load(p_partials + o_y, m_y, 0.0)
    for i_split in tl.static_range(1, MOST):  # unrolled, so that one does not wait for the other
        b_y += tl.load(p_partials + i_split * count + o_y, m_y & (i_split < splits), 0.0)
    if BIAS:
        b_y += tl.load(p_bias + o_y % n, m_y, 0.0).to(tl.float32)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), m_y)


@triton.jit
def _expand_kernel(
    p_words, p_pairs, p_weight, n, K: tl.constexpr, GROUP: tl.constexpr, NEAR: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = DEPTH // 8
    dtype: tl.constexpr = p_weight.dtype.element_ty
    i_span = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    o_word = tl.arange(0, WORDS)
    b_words = tl.load(p_words + (i_span * n + o_n)[:, None] * WORDS + o_word[None, :], m_n[:, None], 0)
    b_subtracted, b_scale = halves_of(tl.load(p_pairs + i_span * DEPTH // GROUP * n + o_n, m_n, 0), dtype)
    b_weight = unpacked(b_words, b_subtracted, dtype, NEAR).to(tl.float32) * b_scale.to(tl.float32)[:, None]
    o_k = i_span * DEPTH + tl.arange(0, DEPTH)
    p_weight += o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_weight, b_weight.to(dtype), m_n[:, None] & (o_k < K)[None, :])


def linear_w4a16(
    x_MK: Tensor, weight: FourBits, bias_N: Tensor | None, gpu: Gpu, deterministic: bool = False
) -> Tensor:
    """Return `x @ weight.T + bias`, [M, N], in x's type: float16, bfloat16 or float32. Sums are in float32.

    x is contiguous and of the type that the weight was packed for. With `deterministic`, a row's bits do not depend on
    the number of rows: weights are then never expanded, and one tile serves every number of rows.
    """
    m, n = len(x_MK), weight.rows
    assert x_MK.is_contiguous() and x_MK.shape[1] == weight.columns and x_MK.dtype == weight.dtype
    if m >= EXPAND_ROWS and not deterministic:
        return F.linear(x_MK, expand(weight), bias_N)
    out = torch.empty(m, n, dtype=x_MK.dtype, device=x_MK.device)
    for first in range(0, m, SLAB):
        x, y = x_MK[first : first + SLAB], out[first : first + SLAB]
        tile = tile_for(len(x), x.dtype, deterministic)
        _multiply(x, weight, bias_N, y, tile, splits(len(x), weight, tile, gpu, deterministic))
    return out


def tile_for(rows: int, dtype: torch.dtype, deterministic: bool) -> Tile:
    """Choose the tile for this number of rows of this type."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    if deterministic:
        return TILES[None]
    return next(tile for most, tile in TILES.items() if most is None or rows <= most)


def row_steps() -> tuple[int, ...]:
    """Return numbers of rows that together meet every program: the first of each tile, and those of the fewest splits.

    The last is that from which on weights are expanded.
    """
    return (1, *(most + 1 for most in TILES if most is not None), SLAB, EXPAND_ROWS)


def splits(rows: int, weight: FourBits, tile: Tile, gpu: Gpu, deterministic: bool) -> int:
    """Choose the number of splits of the columns: as many as there are multiprocessors' places for programs.

    With `deterministic` it is the number for one tile of rows, so that results do not depend on the number of rows.
    """
    programs = triton.cdiv(weight.rows, tile.columns) * (1 if deterministic else triton.cdiv(rows, tile.rows))
    places = gpu.processors * at_once(tile, weight.dtype.itemsize, gpu)
    wanted = max(1, min(places // programs, weight.columns // LEAST_COLUMNS, MOST_SPLITS))
    return int(triton.cdiv(weight.spans, triton.cdiv(weight.spans, wanted)))  # rounded so that no split is empty


def at_once(tile: Tile, itemsize: int, gpu: Gpu) -> int:
    """Return how many programs of this tile fit a multiprocessor: its 65,536 registers and its shared memory.

    `itemsize` is the bytes of a number of x.
    """
    by_registers = 65536 // (REGISTERS[tile] * 32 * tile.warps)
    span = tile.depth * (itemsize * tile.rows + tile.columns // 2) + 8 * tile.columns  # x, words, pairs
    reserved = 1024  # of each program, beside what it asks for
    by_memory = (gpu.shared_bytes + reserved) // ((tile.stages - 1) * span + reserved)
    return max(1, min(by_registers, by_memory))


def _multiply(x_MK: Tensor, weight: FourBits, bias_N: Tensor | None, y_MN: Tensor, tile: Tile, splits: int) -> None:
    (m, k), n = x_MK.shape, weight.rows
    partials = y_MN if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=y_MN.device)
    grid = (triton.cdiv(m, tile.rows), triton.cdiv(n, tile.columns), splits)
    bias = y_MN if bias_N is None else bias_N
    _linear_w4a16_kernel[grid](
        x_MK, weight.words, weight.pairs, bias, partials, m, n, weight.spans, triton.cdiv(weight.spans, splits),
        K=k, GROUP=weight.group, NEAR=weight.near, BIAS=bias_N is not None and splits == 1,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, DEPTH=weight.depth, STAGES=_stages(tile, weight.depth),
        num_warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        _sum_kernel[(triton.cdiv(m * n, 512),)](
            partials, bias, y_MN, m, n, splits, MOST=MOST_SPLITS, BIAS=bias_N is not None, BLOCK=512, num_warps=4
        )


def _stages(tile: Tile, depth: int) -> int:
    """Return the number of pipeline stages: more of short spans, so that about as many bytes are on their way."""
    return tile.stages + {128: 0, 64: 2, 32: 4}[depth]


def expand(weight: FourBits) -> Tensor:
    """Return the dequantized weights [N, K], rounded to the type of the rows that they are for."""
    n = weight.rows
    out = torch.empty(n, weight.columns, dtype=weight.dtype, device=weight.words.device)
    _expand_kernel[(triton.cdiv(n, 64), weight.spans)](
        weight.words, weight.pairs, out, n,
        K=weight.columns, GROUP=weight.group, NEAR=weight.near, BLOCK_N=64, DEPTH=weight.depth, num_warps=4,
    )  # fmt: skip
    return out


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the product for every tile, type and kind of group, the sum of the splits, and the weights expanded."""
    found = []
    kinds = [("bf16", *size) for size in ((32, 4096), (64, 4096), (128, 4096), (1024, 1000))] + [("fp16", 128, 4096)]
    tiles = [(most, tile, *kind) for most, tile in TILES.items() for kind in kinds]
    tiles.append((None, FLOAT32_TILE, "fp32", 128, 4096))
    bounds = {(16, 128): 340, (None, 128): 375} if gpu.capability == (9, 0) else {}
    for most, tile, kind, group, columns in tiles:
        depth = min(group, DEEPEST)
        found.append(
            Shipped(
                f"linear_w4a16, up to {most or 'any number of'} rows, {columns} columns of {kind} in groups of {group}",
                _linear_w4a16_kernel,
                {"p_x": f"*{kind}", "p_words": "*i32", "p_pairs": _pairs(kind), "p_bias": f"*{kind}",
                 "p_y": "*fp32", "m": "i32", "n": "i32", "spans": "i32", "split_spans": "i32"},
                {"K": columns, "GROUP": group, "NEAR": near(gpu), "BIAS": False, "BLOCK_M": tile.rows,
                 "BLOCK_N": tile.columns, "DEPTH": depth, "STAGES": _stages(tile, depth)},
                tile.warps,
                _stages(tile, depth),
                product=None if kind == "fp32" else kind,
                product_rows=tile.columns,  # weights are the left operand
                most_instructions=bounds.get((most, group)) if kind == "bf16" else None,
            )
        )  # fmt: skip
    found.append(
        Shipped(
            "linear_w4a16, sums of splits",
            _sum_kernel,
            {"p_partials": "*fp32", "p_bias": "*bf16", "p_y": "*bf16", "m": "i32", "n": "i32", "splits": "i32"},
            {"MOST": MOST_SPLITS, "BIAS": True, "BLOCK": 512},
            warps=4,
        )
    )
    found += [
        Shipped(
            f"linear_w4a16, weights expanded to {kind}",
            _expand_kernel,
            {"p_words": "*i32", "p_pairs": _pairs(kind), "p_weight": f"*{kind}", "n": "i32"},
            {"K": 4096, "GROUP": 128, "NEAR": near(gpu), "BLOCK_N": 64, "DEPTH": DEEPEST},
            warps=4,
        )
        for kind in ("bf16", "fp16", "fp32")
    ]
    return found


def _pairs(kind: str) -> str:
    return "*i64" if kind == "fp32" else "*i32"
