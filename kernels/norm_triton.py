"""RMSNorm and LayerNorm in Triton: residual sum, norm and quantization by rows, in one pass over memory."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.norm import LayerNorm, NormWeights
from batchinfer.kernels.rounding_triton import quantized_row
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.shipped_triton import Shipped


@triton.jit
def _norm_kernel(
    p_x, p_y, p_weight, p_bias, p_out, p_scale, eps, columns,
    ADD: tl.constexpr, CENTERED: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * columns
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < columns
    b_x = tl.load(p_x + o_row + o_d, m_d, 0.0).to(tl.float32)
    if ADD:
        b_sum = (b_x + tl.load(p_y + o_row + o_d, m_d, 0.0).to(tl.float32)).to(p_x.dtype.element_ty)
        tl.store(p_x + o_row + o_d, b_sum, m_d)
        b_x = b_sum.to(tl.float32)
    if CENTERED:
        b_x = tl.where(m_d, b_x - tl.sum(b_x) / columns, 0.0)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x) / columns + eps)
    b_x *= tl.load(p_weight + o_d, m_d, 0.0).to(tl.float32)
    if CENTERED:
        b_x += tl.load(p_bias + o_d, m_d, 0.0).to(tl.float32)
    if QUANTIZE:
        b_q, scale = quantized_row(b_x, p_out.dtype.element_ty)
        tl.store(p_out + o_row + o_d, b_q, m_d)
        tl.store(p_scale + tl.program_id(0), scale)
    else:
        tl.store(p_out + o_row + o_d, b_x.to(p_out.dtype.element_ty), m_d)


def add_norm(x_MD: Tensor, y_MD: Tensor | None, norm_D: NormWeights, eps: float, out: torch.dtype) -> Rows:
    """Add y, if given, to x in place, and return the norm of x in the type `out`.

    `out` is x's own type, int8 or float8_e4m3fn; 8-bit rows have float32 scales [M, 1]. x and y are contiguous and of
    one type.
    """
    m, d = x_MD.shape
    values = torch.empty(m, d, dtype=out, device=x_MD.device)
    quantize = out != x_MD.dtype
    scale = torch.empty(m, 1, dtype=torch.float32, device=x_MD.device) if quantize else None
    block, centered = triton.next_power_of_2(d), isinstance(norm_D, LayerNorm)
    weight, bias = norm_D if isinstance(norm_D, LayerNorm) else (norm_D, norm_D)
    _norm_kernel[(m,)](
        x_MD, x_MD if y_MD is None else y_MD, weight, bias, values, x_MD if scale is None else scale, eps, d,
        ADD=y_MD is not None, CENTERED=centered, QUANTIZE=quantize, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return Rows(values, scale)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 8 if block <= 8192 else 16)


def shipped(gpu: Gpu) -> list[Shipped]:
    """List both norms for small and large hidden sizes and every type of input and output.

    Of LayerNorm, the largest size is not among them: it spills a few registers where columns are no multiple of 16.
    """
    shapes = [(stream, columns) for stream in ("bf16", "fp32") for columns in (1024, 4096, 8192)]
    return [
        Shipped(
            f"{'LayerNorm' if centered else 'norm'}, {columns} columns of {stream} to {out}",
            _norm_kernel,
            {"p_x": f"*{stream}", "p_y": f"*{stream}", "p_weight": f"*{stream}", "p_bias": f"*{stream}",
             "p_out": f"*{out}", "p_scale": "*fp32", "eps": "fp32", "columns": "i32"},
            {"ADD": True, "CENTERED": centered, "QUANTIZE": out != stream, "BLOCK": columns},
            _warps(columns),
        )
        for stream, columns in [*shapes, ("bf16", 16384)]
        for centered in ((False, True) if columns <= 8192 else (False,))
        for out in (stream, "i8", "fp8e4nv")
    ]  # fmt: skip
