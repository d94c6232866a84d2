"""The product of floating-point rows with 4-bit weights in Triton. Weights are read in 4 bits, multiplied in x's type.

The weight is the left operand: `weight @ x.T`. Hopper's matrix units can read the left operand from registers, where
the numbers are unpacked, but the right one only from shared memory. They also compute at least 64 rows of the left
operand. Of the weight's rows there are always enough, so few rows of x need little padding.

A number is unpacked as a small integer, which every type holds exactly. The scale of its group multiplies the group's
sum, in float32. Unpacking is written as shifts and masks, not as assembly, so that the same code runs in the
interpreter and on every vendor's device. On Hopper it compiles to 2.6 instructions per number. Assembly that keeps two
numbers in a word throughout would need 1.5, and is worth writing if measurements show unpacking to be the bottleneck.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.four_bits_triton import SPAN, WORDS, FourBits, unpacked
from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.shipped_triton import Shipped
from batchinfer.kernels.tile_triton import Tile

TILES = {
    16: Tile(rows=16, columns=64, depth=SPAN.value, warps=4, stages=4),
    None: Tile(rows=64, columns=64, depth=SPAN.value, warps=4, stages=3),
}
"""Tiles by the largest number of rows of x that they serve. `None` serves any number, and is the one tile for results
that must not depend on the number of rows.

Unmeasured. Larger tiles spill registers on Hopper, and Triton 3.7 compiles them to a bare `trap` for sm_100.
"""
EXPAND_ROWS = 1300
"""From this number of rows on, arithmetic is the bottleneck: expand the weights once and let torch multiply.
Unmeasured."""
AT_ONCE = 2
"""Programs wanted per multiprocessor; columns are split until there are this many. Unmeasured."""
SPANS = 4
"""The fewest spans of columns in a split. Fewer would not fill the loop's pipeline."""
SLAB = 1024
"""Number of rows multiplied in one launch. It bounds the memory for the splits' partial sums."""


@triton.jit
def _linear_w4a16_kernel(
    p_x, p_words, p_scale, p_zero, p_bias, p_y, m, n, spans, split_spans,
    K: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = 1 if GROUP >= SPAN else SPAN // GROUP  # groups in a span
    PAIRS: tl.constexpr = 4 // GROUPS  # pairs of 16-column blocks in a group, within the span
    WHOLE: tl.constexpr = K // SPAN * SPAN == K
    i_n = tl.program_id(1)
    i_split = tl.program_id(2)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read other rows again (modulo), so that loads need no mask; their results are not stored.
    p_x += (o_m % m).to(tl.int64)[None, :] * K
    o_row = o_n % n
    o_word = tl.arange(0, WORDS)
    b_y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_span in range(i_split * split_spans, tl.minimum((i_split + 1) * split_spans, spans)):
        i_long = tl.cast(i_span, tl.int64)
        b_words = tl.load(p_words + (i_long * n + o_row)[:, None] * WORDS + o_word[None, :])
        for i_group in tl.static_range(GROUPS):
            o_group = (i_long * SPAN // GROUP + i_group) * n + o_row
            b_zero = tl.load(p_zero + o_group).to(tl.float32) if ZEROS else tl.zeros((BLOCK_N,), tl.float32)
            b_group = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i_pair in tl.static_range(PAIRS):
                b_first, b_second = unpacked(b_words, i_group * PAIRS + i_pair, b_zero, p_x.dtype.element_ty)
                o_k = i_span * SPAN + (i_group * PAIRS + i_pair) * 2 * WORDS + o_word
                if WHOLE:
                    b_x = tl.load(p_x + o_k[:, None])
                    b_x_second = tl.load(p_x + WORDS + o_k[:, None])
                else:
                    b_x = tl.load(p_x + o_k[:, None], (o_k < K)[:, None], 0.0)
                    b_x_second = tl.load(p_x + WORDS + o_k[:, None], (o_k < K - WORDS)[:, None], 0.0)
                b_group = tl.dot(b_first, b_x, b_group, input_precision="ieee")
                b_group = tl.dot(b_second, b_x_second, b_group, input_precision="ieee")
            b_y += b_group * tl.load(p_scale + o_group).to(tl.float32)[:, None]
    if BIAS:
        b_y += tl.load(p_bias + o_row).to(tl.float32)[:, None]
    p_y += (i_split.to(tl.int64) * m + o_m)[None, :] * n + o_n[:, None]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), (o_n < n)[:, None] & (o_m < m)[None, :])


@triton.jit
def _sum_kernel(p_partials, p_bias, p_y, count, n, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    o_y = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_y = o_y < count
    b_y = tl.load(p_partials + o_y, m_y, 0.0)
    for _ in tl.static_range(1, SPLITS):
        p_partials += count
        b_y += tl.load(p_partials + o_y, m_y, 0.0)
    if BIAS:
        b_y += tl.load(p_bias + o_y % n, m_y, 0.0).to(tl.float32)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), m_y)


@triton.jit
def _expand_kernel(
    p_words, p_scale, p_zero, p_weight, n, K: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_span = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    o_word = tl.arange(0, WORDS)
    b_words = tl.load(p_words + (i_span * n + o_n)[:, None] * WORDS + o_word[None, :], m_n[:, None], 0)
    p_weight += o_n.to(tl.int64)[:, None] * K
    dtype: tl.constexpr = p_weight.dtype.element_ty
    for i_pair in tl.static_range(4):
        o_k = i_span * SPAN + i_pair * 2 * WORDS + o_word
        o_group = (i_span * SPAN + i_pair * 2 * WORDS) // GROUP * n + o_n
        b_scale = tl.load(p_scale + o_group, m_n, 0.0).to(tl.float32)[:, None]
        b_zero = tl.load(p_zero + o_group, m_n, 0).to(tl.float32) if ZEROS else tl.zeros((BLOCK_N,), tl.float32)
        b_first, b_second = unpacked(b_words, i_pair, b_zero, tl.float32)
        tl.store(p_weight + o_k[None, :], (b_first * b_scale).to(dtype), m_n[:, None] & (o_k < K)[None, :])
        m_second = m_n[:, None] & (o_k < K - WORDS)[None, :]
        tl.store(p_weight + WORDS + o_k[None, :], (b_second * b_scale).to(dtype), m_second)


def linear_w4a16(
    x_MK: Tensor, weight: FourBits, bias_N: Tensor | None, gpu: Gpu, deterministic: bool = False
) -> Tensor:
    """Return `x @ weight.T + bias`, [M, N], in x's type: float16, bfloat16 or float32. Sums are in float32.

    x is contiguous. With `deterministic`, a row's bits do not depend on the number of rows: weights are then never
    expanded, and one tile serves every number of rows.
    """
    m, n = len(x_MK), weight.rows
    assert x_MK.is_contiguous() and x_MK.shape[1] == weight.columns
    if m >= EXPAND_ROWS and not deterministic:
        return F.linear(x_MK, expand(weight, x_MK.dtype), bias_N)
    out = torch.empty(m, n, dtype=x_MK.dtype, device=x_MK.device)
    for first in range(0, m, SLAB):
        x, y = x_MK[first : first + SLAB], out[first : first + SLAB]
        tile = tile_for(len(x), deterministic)
        _multiply(x, weight, bias_N, y, tile, splits(len(x), weight, tile, gpu.processors, deterministic))
    return out


def tile_for(rows: int, deterministic: bool) -> Tile:
    """Choose the tile for this number of rows."""
    if deterministic:
        return TILES[None]
    return next(tile for most, tile in TILES.items() if most is None or rows <= most)


def splits(rows: int, weight: FourBits, tile: Tile, processors: int, deterministic: bool) -> int:
    """Choose the number of splits of the columns, so that all multiprocessors have work.

    With `deterministic` it is the number for one tile of rows, so that results do not depend on the number of rows.
    """
    programs = triton.cdiv(weight.rows, tile.columns) * (1 if deterministic else triton.cdiv(rows, tile.rows))
    wanted = max(1, min(AT_ONCE * processors // programs, weight.spans // SPANS))
    return int(triton.cdiv(weight.spans, triton.cdiv(weight.spans, wanted)))  # rounded so that no split is empty


def _multiply(x_MK: Tensor, weight: FourBits, bias_N: Tensor | None, y_MN: Tensor, tile: Tile, splits: int) -> None:
    (m, k), n = x_MK.shape, weight.rows
    partials = y_MN if splits == 1 else torch.empty(splits, m, n, dtype=torch.float32, device=y_MN.device)
    grid = (triton.cdiv(m, tile.rows), triton.cdiv(n, tile.columns), splits)
    bias = y_MN if bias_N is None else bias_N
    _linear_w4a16_kernel[grid](
        x_MK, weight.words, weight.scale, weight.scale if weight.zero_point is None else weight.zero_point, bias,
        partials, m, n, weight.spans, triton.cdiv(weight.spans, splits),
        K=k, GROUP=weight.group, ZEROS=weight.zero_point is not None, BIAS=bias_N is not None and splits == 1,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=_stages(tile, k),
    )  # fmt: skip
    if splits > 1:
        _sum_kernel[(triton.cdiv(m * n, 1024),)](
            partials, bias, y_MN, m * n, n, SPLITS=splits, BIAS=bias_N is not None, BLOCK=1024, num_warps=4
        )


def _stages(tile: Tile, columns: int) -> int:
    """Return the number of pipeline stages: fewer where the last span needs a mask, which takes registers."""
    return tile.stages if columns % SPAN.value == 0 else 2


def expand(weight: FourBits, dtype: torch.dtype) -> Tensor:
    """Return the dequantized weights [N, K], rounded to `dtype`."""
    scale, n = weight.scale, weight.rows
    out = torch.empty(n, weight.columns, dtype=dtype, device=scale.device)
    _expand_kernel[(triton.cdiv(n, 64), weight.spans)](
        weight.words, scale, scale if weight.zero_point is None else weight.zero_point, out, n,
        K=weight.columns, GROUP=weight.group, ZEROS=weight.zero_point is not None, BLOCK_N=64, num_warps=4,
    )  # fmt: skip
    return out


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the product for every tile and kind of group, the sum of the splits, and the expansion of the weights."""
    weights = {"p_words": "*i32", "p_scale": "*bf16", "p_zero": "*i8"}
    found = []
    for most, tile in TILES.items():
        for group, zeros, columns in ((32, True, 4096), (64, False, 4096), (128, True, 4096), (1024, False, 1000)):
            found.append(
                Shipped(
                    f"linear_w4a16, up to {most or 'any number of'} rows, {columns} columns in groups of {group}",
                    _linear_w4a16_kernel,
                    {"p_x": "*bf16", **weights, "p_bias": "*bf16", "p_y": "*fp32", "m": "i32", "n": "i32",
                     "spans": "i32", "split_spans": "i32"},
                    {"K": columns, "GROUP": group, "ZEROS": zeros, "BIAS": False, "BLOCK_M": tile.rows,
                     "BLOCK_N": tile.columns},
                    tile.warps,
                    _stages(tile, columns),
                    product="bf16",
                    product_rows=tile.columns,  # weights are the left operand
                )
            )  # fmt: skip
    found.append(
        Shipped(
            "linear_w4a16, sums of splits",
            _sum_kernel,
            {"p_partials": "*fp32", "p_bias": "*bf16", "p_y": "*bf16", "count": "i32", "n": "i32"},
            {"SPLITS": 4, "BIAS": True, "BLOCK": 1024},
            warps=4,
        )
    )
    found.append(
        Shipped(
            "linear_w4a16, weights expanded",
            _expand_kernel,
            {**weights, "p_weight": "*bf16", "n": "i32"},
            {"K": 4096, "GROUP": 128, "ZEROS": True, "BLOCK_N": 64},
            warps=4,
        )
    )
    return found
