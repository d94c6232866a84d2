"""The product of 8-bit rows with 8-bit weights in Triton. Sums are int32 for int8, and float32 for float8_e4m3fn."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.shipped_triton import Shipped
from batchinfer.kernels.tile_triton import Tile, tile_of, tile_product, tiles

TILES = {
    16: Tile(rows=16, columns=32, depth=256, warps=4, stages=4),
    64: Tile(rows=64, columns=64, depth=128, warps=4, stages=4),
    256: Tile(rows=64, columns=128, depth=128, warps=4, stages=3),
    None: Tile(rows=128, columns=128, depth=128, warps=8, stages=3),
}
WIDE = Tile(rows=128, columns=256, depth=128, warps=8, stages=3)
"""The tile of int8 from `WIDE_ROWS` rows on, on Hopper: it reads each operand less often.

It takes every register there. It spills on sm_100 and does not fit 99 KiB of shared memory with three stages; float8,
whose sums are added in float32 in each turn, would spill in it. Unmeasured.
"""
WIDE_ROWS = 1025
"""Tiles by the largest number of rows that they serve; `None` serves any number.

They were chosen because they compile without spilling registers. Unmeasured.
"""


@triton.jit(do_not_specialize=["m"])
def _linear_w8a8_kernel(
    p_x, p_w, p_x_scale, p_w_scale, p_bias, p_y, m, n,
    K: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < m
    m_n = o_n < n
    # Rows past the end read other rows again (modulo), so that loads need no mask; their results are not stored.
    b_y = tile_product(p_x, p_w, o_m % m, o_n % n, K, BLOCK_M, BLOCK_N, BLOCK_K).to(tl.float32)
    b_y *= tl.load(p_x_scale + o_m, m_m, 0.0)[:, None]
    b_y *= tl.load(p_w_scale + o_n, m_n, 0.0)[None, :]
    if BIAS:
        b_y += tl.load(p_bias + o_n, m_n, 0.0).to(tl.float32)[None, :]
    p_y += o_m.to(tl.int64)[:, None] * n + o_n[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), m_m[:, None] & m_n[None, :])


def linear_w8a8(
    x: Rows,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    out: torch.dtype,
    gpu: Gpu,
    deterministic: bool = False,
) -> Tensor:
    """Return `(x.values @ weight.T) * x.scale * scale + bias`, [M, N], in the floating-point type `out`.

    x's values [M, K] and the weight are contiguous, both int8 or both float8_e4m3fn. Scales are float32; x's are
    [M, 1]. Sums of int8 are exact up to 131,071 columns, so every tile gives the same bits. Sums of float8 are not
    exact: with another number of rows, and so another tile, their bits may differ, unless `deterministic` is set.
    """
    (m, k), n = x.values.shape, len(weight_NK)
    assert x.values.is_contiguous() and weight_NK.is_contiguous() and x.values.dtype == weight_NK.dtype
    assert x.scale is not None
    y = torch.empty(m, n, dtype=out, device=weight_NK.device)
    tile = tile_for(m, k, weight_NK.dtype, gpu, deterministic)
    _linear_w8a8_kernel[(tiles(m, n, tile),)](
        x.values, weight_NK, x.scale, scale_N, y if bias_N is None else bias_N, y, m, n,
        K=k, BIAS=bias_N is not None, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def tile_for(rows: int, columns: int, dtype: torch.dtype, gpu: Gpu, deterministic: bool = False) -> Tile:
    """Choose the tile for this number of rows of type `dtype`.

    With `deterministic`, float8 always takes the same tile, because its sums depend on the tile. float8 takes no tile
    below 64 rows where matrix units are those of Hopper and Blackwell's data centre GPUs: they would not take it, and
    it would be converted to float16.
    """
    if deterministic and dtype != torch.int8:
        return TILES[64]
    if dtype == torch.int8 and rows >= WIDE_ROWS and _takes_wide(gpu):
        tile = WIDE
    else:
        rows = max(rows, 64) if dtype != torch.int8 and gpu.capability[0] in (9, 10) else rows
        tile = next(tile for most, tile in TILES.items() if most is None or rows <= most)
    # Columns that are no multiple of the depth need a mask, which takes registers that the largest tiles cannot spare.
    sticks_out = tile.rows == 128 and columns % tile.depth
    return tile._replace(depth=tile.depth // 2, stages=tile.stages + 1) if sticks_out else tile


def _takes_wide(gpu: Gpu) -> bool:
    fits = gpu.shared_bytes >= WIDE.stages * (WIDE.rows + WIDE.columns) * WIDE.depth
    return gpu.capability[0] == 9 and fits


def row_steps() -> tuple[int, ...]:
    """Return the number of rows from which on each tile is taken."""
    return (1, *(most + 1 for most in TILES if most is not None), WIDE_ROWS)


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for every tile and both types, with columns that are a multiple of the depth and others."""
    found = {}
    for name, dtype, kind in (("int8", torch.int8, "i8"), ("fp8", torch.float8_e4m3fn, "fp8e4nv")):
        for rows in row_steps():
            for columns in (4096, 1000):
                tile = tile_for(rows, columns, dtype, gpu)
                found[kind, columns, tile] = Shipped(
                    f"linear_w8a8, {tile.rows} rows by {tile.columns}, {columns} columns of {name}",
                    _linear_w8a8_kernel,
                    {"p_x": f"*{kind}", "p_w": f"*{kind}", "p_x_scale": "*fp32", "p_w_scale": "*fp32",
                     "p_bias": "*bf16", "p_y": "*bf16", "m": "i32", "n": "i32"},
                    {"K": columns, "BIAS": True, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns,
                     "BLOCK_K": tile.depth},
                    tile.warps,
                    tile.stages,
                    product=name,
                    product_rows=tile.rows,
                )  # fmt: skip
    return list(found.values())
