"""The floating-point matrix product in Triton with one fixed tile, so that a row's bits do not depend on other rows.

The vendor's libraries choose the kernel, and with it the order of sums, by the number of rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.shipped_triton import Shipped
from batchinfer.kernels.tile_triton import Tile, tile_of, tile_product, tiles

TILES = {
    torch.bfloat16: Tile(rows=64, columns=128, depth=64, warps=4, stages=3),
    torch.float16: Tile(rows=64, columns=128, depth=64, warps=4, stages=3),
    torch.float32: Tile(rows=32, columns=64, depth=32, warps=4, stages=2),
}
"""The tile of each type, whatever the number of rows. float32 is not rounded to TF32, so it uses no matrix units."""


@triton.jit(do_not_specialize=["m"])
def _linear_kernel(
    p_x, p_w, p_bias, p_y, m, n,
    K: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read other rows again (modulo), so that loads need no mask; their results are not stored.
    b_y = tile_product(p_x, p_w, o_m % m, o_n % n, K, BLOCK_M, BLOCK_N, BLOCK_K)
    if BIAS:
        b_y += tl.load(p_bias + o_n, o_n < n, 0.0).to(tl.float32)[None, :]
    p_y += o_m.to(tl.int64)[:, None] * n + o_n[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), (o_m < m)[:, None] & (o_n < n)[None, :])


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`, [M, N], for any number of rows. Sums are in float32.

    x and the weight are contiguous and of one type, which `TILES` lists.
    """
    (m, k), n = x_MK.shape, len(weight_NK)
    assert x_MK.is_contiguous() and weight_NK.is_contiguous() and x_MK.dtype == weight_NK.dtype
    out = torch.empty(m, n, dtype=x_MK.dtype, device=x_MK.device)
    tile = TILES[x_MK.dtype]
    _linear_kernel[(tiles(m, n, tile),)](
        x_MK, weight_NK, out if bias_N is None else bias_N, out, m, n,
        K=k, BIAS=bias_N is not None, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for every type, with columns that are a multiple of the tile's depth and others."""
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        tile = TILES[dtype]
        for columns in (4096, 1000):
            found.append(
                Shipped(
                    f"linear, {columns} columns of {name}",
                    _linear_kernel,
                    {"p_x": f"*{name}", "p_w": f"*{name}", "p_bias": f"*{name}", "p_y": f"*{name}",
                     "m": "i32", "n": "i32"},
                    {"K": columns, "BIAS": True, "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth},
                    tile.warps,
                    tile.stages,
                    product=None if dtype == torch.float32 else name,
                    product_rows=tile.rows,
                )
            )  # fmt: skip
    return found
