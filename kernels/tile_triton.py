"""A matrix product in tiles: their number, the order in which programs take them, and the loop that computes one."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import NamedTuple

import triton
import triton.language as tl

_BESIDE = tl.constexpr(8)


class Tile(NamedTuple):
    """The size of the result that one program computes, and Triton's launch options for it."""

    rows: int
    columns: int
    depth: int  # columns of both operands that an iteration of the loop multiplies
    warps: int
    stages: int


def tiles(m: int, n: int, tile: Tile) -> int:
    """Return the number of tiles of a result [M, N]."""
    return int(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns))


@triton.jit
def tile_of(i_program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (row of tiles, column of tiles) of a program.

    Programs that run at the same time compute tiles in a square, not in a line, so that they share both operands in
    the L2 cache.
    """
    tiles_m = tl.cdiv(m, BLOCK_M)
    in_band = _BESIDE * tl.cdiv(n, BLOCK_N)
    i_first = i_program // in_band * _BESIDE
    rows = tl.minimum(tiles_m - i_first, _BESIDE)
    return i_first + i_program % in_band % rows, i_program % in_band // rows


@triton.jit
def tile_product(
    p_x, p_w, o_m, o_n, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return `x[o_m] @ w[o_n].T`, [BLOCK_M, BLOCK_N], in int32 for int8 operands and in float32 for others.

    x and w are contiguous with K columns. K is a compile-time constant, so that the compiler knows how rows are
    aligned, and drops the mask where K is a multiple of BLOCK_K.
    """
    o_k = tl.arange(0, BLOCK_K)
    p_x += o_m.to(tl.int64)[:, None] * K + o_k[None, :]
    p_w += o_n.to(tl.int64)[None, :] * K + o_k[:, None]
    # Hopper adds products of float8 in about 14 bits: allow that within an iteration, and add iterations in float32.
    COARSE: tl.constexpr = BLOCK_K if p_x.dtype.element_ty.is_fp8() else 0
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if p_x.dtype.element_ty == tl.int8 else tl.float32)
    for i_k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            b_x = tl.load(p_x)
            b_w = tl.load(p_w)
        else:
            m_k = o_k < K - i_k
            b_x = tl.load(p_x, m_k[None, :], 0.0)
            b_w = tl.load(p_w, m_k[:, None], 0.0)
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee", max_num_imprecise_acc=COARSE, out_dtype=b_y.dtype)
        p_x += BLOCK_K
        p_w += BLOCK_K
    return b_y
