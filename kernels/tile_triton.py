"""A matrix product in tiles: how it is cut, in which order the tiles come, and the loop that computes one."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import NamedTuple

import triton
import triton.language as tl

_BESIDE = tl.constexpr(8)


class Tile(NamedTuple):
    """What one program of a product computes, and with what."""

    rows: int
    columns: int
    depth: int  # columns of both operands in a turn of the loop
    warps: int
    stages: int


def tiles(m: int, n: int, tile: Tile) -> int:
    """How many tiles a result [M, N] has."""
    return int(triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns))


@triton.jit
def tile_of(i_program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row tile, column tile) of a program.

    Programs that run at the same time lie in a square, not in a line: they share both operands in the L2 cache.
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
    """`x[o_m] @ w[o_n].T` of x and w [.., K], contiguous: int32 [BLOCK_M, BLOCK_N] of int8, float32 of the rest.

    K is a constant, so that the compiler sees where rows begin, and leaves the mask away where nothing sticks out.
    """
    o_k = tl.arange(0, BLOCK_K)
    p_x += o_m.to(tl.int64)[:, None] * K + o_k[None, :]
    p_w += o_n.to(tl.int64)[None, :] * K + o_k[:, None]
    # Hopper sums up products of float8 in some 14 bits: at most one turn of the loop, the rest is added in float32.
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
