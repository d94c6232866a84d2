"""Quantization with a scale per row in Triton, for rows that no earlier kernel could quantize as it wrote them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.rounding_triton import quantized_row
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.shipped_triton import Shipped


@triton.jit
def _quantize_kernel(p_x, p_out, p_scale, columns, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    m_k = o_k < columns
    b_x = tl.load(p_x + i_row * columns + o_k, m_k, 0.0).to(tl.float32)
    b_q, scale = quantized_row(b_x, p_out.dtype.element_ty)
    tl.store(p_out + i_row * columns + o_k, b_q, m_k)
    tl.store(p_scale + i_row, scale)


def quantize_rows(x_MK: Tensor, out: torch.dtype) -> Rows:
    """Quantize contiguous floating-point rows to `out`, int8 or float8_e4m3fn, with float32 scales [M, 1]."""
    m, columns = x_MK.shape
    values = torch.empty(m, columns, dtype=out, device=x_MK.device)
    scale = torch.empty(m, 1, dtype=torch.float32, device=x_MK.device)
    block = triton.next_power_of_2(columns)
    _quantize_kernel[(m,)](x_MK, values, scale, columns, BLOCK=block, num_warps=_warps(block))
    return Rows(values, scale)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8 if block <= 8192 else 16)


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for few and many columns, both types of input and both of output."""
    return [
        Shipped(
            f"quantize_rows, {columns} columns of {stream} to {out}",
            _quantize_kernel,
            {"p_x": f"*{stream}", "p_out": f"*{out}", "p_scale": "*fp32", "columns": "i32"},
            {"BLOCK": columns},
            _warps(columns),
        )
        for stream in ("bf16", "fp32")
        for columns in (1024, 4096, 8192, 16384)
        for out in ("i8", "fp8e4nv")
    ]
