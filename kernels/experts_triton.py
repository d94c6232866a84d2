"""Products of a mixture of experts in Triton: one launch multiplies each expert's rows with that expert's weight.

The host does not know how many tokens chose an expert, so that it need not wait: the rows are sorted on the device,
each expert's are padded to whole tiles, and a table says which expert's rows a tile holds.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.experts import DIFFERENT_INPUTS, FOUR_BITS, ExpertRows
from batchinfer.kernels.float8_inputs import Float8InputProduct, InputScales
from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.product import Product
from batchinfer.kernels.products_triton import DenseProduct, EightBitProduct
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.shipped_triton import Shipped
from batchinfer.kernels.tile_triton import Tile, tile_product

FEW, MANY = 16, 64  # rows of a tile
TILES = {
    (FEW, "float"): Tile(rows=16, columns=64, depth=64, warps=4, stages=4),
    (MANY, "float"): Tile(rows=64, columns=64, depth=64, warps=4, stages=3),
    (FEW, "float32"): Tile(rows=16, columns=32, depth=32, warps=4, stages=2),
    (MANY, "float32"): Tile(rows=32, columns=64, depth=32, warps=4, stages=2),
    (FEW, "8 bits"): Tile(rows=16, columns=64, depth=128, warps=4, stages=4),
    (MANY, "8 bits"): Tile(rows=64, columns=64, depth=128, warps=4, stages=3),
}
"""Tiles by the rows that an expert's are padded to, and the kind of numbers. Unmeasured."""


@dataclass(frozen=True)
class ExpertTiles(ExpertRows):
    """Rows padded to tiles of which each belongs to one expert."""

    experts: Tensor  # [M / rows] int32, the expert of each tile; -1 for tiles that are not needed
    rows: int  # of a tile: `FEW` or `MANY`


def expert_tiles(experts_Tk: Tensor, experts: int, many: bool) -> ExpertTiles:
    """Sort tokens by expert on the device. M is the most rows that so many tokens may need, whatever they choose.

    Tiles have `MANY` rows if an expert has many on average, or if `many` asks for that.
    """
    chosen = experts_Tk.numel()
    rows = MANY if many or chosen >= experts * MANY // 2 else FEW
    most = triton.cdiv(chosen + min(experts, chosen) * (rows - 1), rows) * rows
    entries, device = experts_Tk.flatten(), experts_Tk.device
    order = entries.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=device).scatter_add_(0, entries, torch.ones_like(entries))
    padded = (counts + rows - 1) // rows * rows
    ends = padded.cumsum(0)
    firsts = ends - padded
    sorted_entries = entries[order]
    rank = torch.arange(chosen, device=device) - (counts.cumsum(0) - counts)[sorted_entries]
    row = firsts[sorted_entries] + rank
    tokens = torch.zeros(most, dtype=torch.int64, device=device)
    tokens[row] = order // experts_Tk.shape[1]
    places = torch.empty_like(entries)
    places[order] = row
    first_rows = torch.arange(0, most, rows, device=device)
    found = torch.searchsorted(ends, first_rows, right=True)
    table = torch.where(first_rows < ends[-1], found, -1).to(torch.int32)
    return ExpertTiles(tokens, places.view_as(experts_Tk), table, rows)


@triton.jit
def _experts_kernel(
    p_x, p_w, p_x_scale, p_w_scale, p_bias, p_experts, p_y, n,
    K: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(1)
    i_expert = tl.load(p_experts + i_m * BLOCK_M // ROWS).to(tl.int64)
    if i_expert < 0:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    # Columns past the end read others again (modulo), so that loads need no mask; their results are not stored.
    b_y = tile_product(p_x, p_w + i_expert * n * K, o_m, o_n % n, K, BLOCK_M, BLOCK_N, BLOCK_K).to(tl.float32)
    if SCALED:
        b_y *= tl.load(p_x_scale + o_m)[:, None]
        b_y *= tl.load(p_w_scale + i_expert * n + o_n, m_n, 0.0)[None, :]
    if BIAS:
        b_y += tl.load(p_bias + i_expert * n + o_n, m_n, 0.0).to(tl.float32)[None, :]
    p_y += o_m.to(tl.int64)[:, None] * n + o_n[None, :]
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), m_n[None, :])


class StackedProduct:
    """The weights of all experts in one tensor [E, N, K]: in floating point, or in 8 bits with scales [E, N]."""

    def __init__(
        self, weight_ENK: Tensor, scale_EN: Tensor | None, bias_EN: Tensor | None, out: torch.dtype,
        inputs: InputScales | None,
    ) -> None:  # fmt: skip
        self.weight, self.scale, self.bias, self.out, self.inputs = weight_ENK, scale_EN, bias_EN, out, inputs

    def __call__(self, x: Rows, at: ExpertRows) -> Rows:
        """Multiply rows [M, K] by their experts' weights; the result [M, N] is in `out`, and 0 where none is needed."""
        assert isinstance(at, ExpertTiles)
        values = x.values if self.inputs is None else self.inputs.rounded_to_float8(x.values)
        (m, k), n = values.shape, self.weight.shape[1]
        assert values.is_contiguous() and values.dtype == self.weight.dtype
        tile = TILES[at.rows, _kind(values.dtype)]
        y = torch.zeros(m, n, dtype=self.out, device=values.device)
        _experts_kernel[(triton.cdiv(n, tile.columns), m // tile.rows)](
            values, self.weight, y if x.scale is None else x.scale, y if self.scale is None else self.scale,
            y if self.bias is None else self.bias, at.experts, y, n,
            K=k, ROWS=at.rows, SCALED=self.scale is not None, BIAS=self.bias is not None, BLOCK_M=tile.rows,
            BLOCK_N=tile.columns, BLOCK_K=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return Rows(y)


def takes_many(dtype: torch.dtype, gpu: Gpu) -> bool:
    """Return whether this type is only multiplied in tiles of `MANY` rows.

    The matrix units of Hopper and of Blackwell's data centre GPUs take no fewer of float8: it would be converted to
    float16.
    """
    return dtype == torch.float8_e4m3fn and gpu.capability[0] in (9, 10)


def by_expert(products: list[Product]) -> StackedProduct:
    """Stack the weights of all experts' products. The products take theirs from the stack from then on.

    Raises `ValueError` for weights that stay in 4 bits, and for inputs that experts round differently.
    """
    ways = {way for p in products if isinstance(p, Float8InputProduct) for way in p.scales}
    inner = [p.product if isinstance(p, Float8InputProduct) else p for p in products]
    if len(ways) > 1 or (ways and not all(isinstance(p, Float8InputProduct) for p in products)):
        raise ValueError(DIFFERENT_INPUTS)
    inputs = next(iter(ways), None)
    dense = [p for p in inner if isinstance(p, DenseProduct)]
    if len(dense) == len(inner):
        weight = _stacked(dense)
        return StackedProduct(weight, None, _stacked_bias(dense), weight.dtype, inputs)
    eight = [p for p in inner if isinstance(p, EightBitProduct)]
    if len(eight) == len(inner):
        scale = torch.stack([p.scale for p in eight])
        return StackedProduct(_stacked(eight), scale, _stacked_bias(eight), eight[0].out, inputs)
    raise ValueError(FOUR_BITS)


def _stacked(products: Sequence[DenseProduct | EightBitProduct]) -> Tensor:
    weight = torch.stack([p.weight for p in products])
    for product, part in zip(products, weight, strict=True):
        product.weight = part
    return weight


def _stacked_bias(products: Sequence[DenseProduct | EightBitProduct]) -> Tensor | None:
    biases = [p.bias for p in products if p.bias is not None]
    return torch.stack(biases) if biases else None


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "float32"
    return "float" if dtype in (torch.bfloat16, torch.float16) else "8 bits"


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for every tile and type, with columns that are a multiple of the tile's depth and others."""
    kinds = [("float", "bf16", "bf16"), ("float32", "fp32", "fp32"), ("8 bits", "i8", "bf16")]
    if gpu.has_float8:
        kinds.append(("8 bits", "fp8e4nv", "bf16"))
    found = []
    for kind, x, y in kinds:
        for rows in (MANY,) if x == "fp8e4nv" and takes_many(torch.float8_e4m3fn, gpu) else (FEW, MANY):
            for columns in (2048, 1000):
                tile, eight = TILES[rows, kind], kind == "8 bits"
                found.append(
                    Shipped(
                        f"experts, tiles of {rows} rows, {columns} columns of {x}",
                        _experts_kernel,
                        {"p_x": f"*{x}", "p_w": f"*{x}", "p_x_scale": "*fp32", "p_w_scale": "*fp32",
                         "p_bias": f"*{y}", "p_experts": "*i32", "p_y": f"*{y}", "n": "i32"},
                        {"K": columns, "ROWS": rows, "SCALED": eight, "BIAS": True, "BLOCK_M": tile.rows,
                         "BLOCK_N": tile.columns, "BLOCK_K": tile.depth},
                        tile.warps,
                        tile.stages,
                        product={"bf16": "bf16", "i8": "int8", "fp8e4nv": "fp8"}.get(x),
                        product_rows=tile.rows,
                    )
                )  # fmt: skip
    return found
