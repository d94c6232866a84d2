"""The gated activation in Triton, optionally followed by quantization with one scale per row."""

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
def _silu_mul_kernel(p_gate_up, p_out, p_scale, columns, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.arange(0, BLOCK)
    m_f = o_f < columns
    b_gate = tl.load(p_gate_up + i_row * 2 * columns + o_f, m_f, 0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + i_row * 2 * columns + columns + o_f, m_f, 0.0).to(tl.float32)
    b_x = b_gate * tl.sigmoid(b_gate) * b_up
    if QUANTIZE:
        b_q, scale = quantized_row(b_x, p_out.dtype.element_ty)
        tl.store(p_out + i_row * columns + o_f, b_q, m_f)
        tl.store(p_scale + i_row, scale)
    else:
        tl.store(p_out + i_row * columns + o_f, b_x.to(p_out.dtype.element_ty), m_f)


def silu_mul(gate_up_M2F: Tensor, out: torch.dtype) -> Rows:
    """Return `silu(gate) * up`, [M, F], of the contiguous matrix `[gate | up]` [M, 2F].

    `out` is the result's type: the input's own, int8 or float8_e4m3fn. 8-bit rows have a float32 scale each, [M, 1].
    """
    m, columns = gate_up_M2F.shape[0], gate_up_M2F.shape[1] // 2
    values = torch.empty(m, columns, dtype=out, device=gate_up_M2F.device)
    quantize = out != gate_up_M2F.dtype
    scale = torch.empty(m, 1, dtype=torch.float32, device=gate_up_M2F.device) if quantize else None
    block = triton.next_power_of_2(columns)
    _silu_mul_kernel[(m,)](
        gate_up_M2F, values, values if scale is None else scale, columns,
        QUANTIZE=quantize, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return Rows(values, scale)


def _warps(block: int) -> int:
    return min(max(block // 1024, 1), 16)


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for small and large inner sizes and every type of input and output."""
    return [
        Shipped(
            f"silu_mul, {columns} columns of {stream} to {out}",
            _silu_mul_kernel,
            {"p_gate_up": f"*{stream}", "p_out": f"*{out}", "p_scale": "*fp32", "columns": "i32"},
            {"QUANTIZE": out != stream, "BLOCK": columns},
            _warps(columns),
        )
        for stream in ("bf16", "fp32")
        for columns in (4096, 16384)
        for out in (stream, "i8", "fp8e4nv")
    ]
