"""The activation in Triton, with a gate or without, optionally followed by quantization with one scale per row."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchinfer.kernels.gpu import Gpu
from batchinfer.kernels.rounding_triton import extremes, quantized, quantized_row, scale_of
from batchinfer.kernels.rows import Rows
from batchinfer.kernels.shipped_triton import Shipped

MOST_COLUMNS = 16384
"""Longer rows are computed piece by piece: as a whole they would spill registers."""
PIECE = 4096


@triton.jit
def _activated(p_in, columns, o_f, m_f, KIND: tl.constexpr, GATED: tl.constexpr):
    b_x = tl.load(p_in + o_f, m_f, 0.0).to(tl.float32)
    if KIND == "clamped_swiglu":
        b_x = tl.minimum(b_x, 7.0)
        b_x *= tl.sigmoid(1.702 * b_x)
    elif KIND == "silu":
        b_x *= tl.sigmoid(b_x)
    elif KIND == "gelu_tanh":  # (1 + tanh(z)) / 2 is the sigmoid of 2z
        b_x *= tl.sigmoid(1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x))
    elif KIND == "gelu":
        b_x *= 0.5 + 0.5 * tl.erf(0.7071067811865476 * b_x)
    else:
        b_x = tl.maximum(b_x, 0.0) * b_x
    if GATED:
        b_up = tl.load(p_in + columns + o_f, m_f, 0.0).to(tl.float32)
        b_x *= tl.minimum(tl.maximum(b_up, -7.0), 7.0) + 1.0 if KIND == "clamped_swiglu" else b_up
    return b_x


@triton.jit
def _activation_kernel(
    p_in, p_out, p_scale, columns,
    KIND: tl.constexpr, GATED: tl.constexpr, QUANTIZE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_out.dtype.element_ty
    p_in += i_row * columns * (2 if GATED else 1)
    p_out += i_row * columns
    scale = 1.0
    if QUANTIZE and not WHOLE:  # pieces are computed again when they are stored
        most, nothing = 0.0, 0.0
        for start in range(0, columns, BLOCK):
            o_f = start + tl.arange(0, BLOCK)
            piece = extremes(_activated(p_in, columns, o_f, o_f < columns, KIND, GATED))
            most, nothing = tl.maximum(most, piece[0]), nothing + piece[1]
        scale = scale_of(most, nothing, dtype)
    for start in range(0, BLOCK if WHOLE else columns, BLOCK):
        o_f = start + tl.arange(0, BLOCK)
        m_f = o_f < columns
        b_x = _activated(p_in, columns, o_f, m_f, KIND, GATED)
        if QUANTIZE and WHOLE:
            b_q, scale = quantized_row(b_x, dtype)
        elif QUANTIZE:
            b_q = quantized(b_x, scale, dtype)
        else:
            b_q = b_x.to(dtype)
        tl.store(p_out + o_f, b_q, m_f)
    if QUANTIZE:
        tl.store(p_scale + i_row, scale)


def activate(x_MX: Tensor, activation: str, gated: bool, out: torch.dtype) -> Rows:
    """Return `activation(gate) * up`, [M, F], of the contiguous x = `[gate | up]` [M, 2F], or `activation(x)`.

    `activation` is silu, gelu, gelu_tanh, relu2 (the square of the rectified input) or clamped_swiglu. `out` is the
    result's type: the input's own, int8 or float8_e4m3fn. 8-bit rows have a float32 scale each, [M, 1].
    """
    m, columns = x_MX.shape[0], x_MX.shape[1] // (2 if gated else 1)
    values = torch.empty(m, columns, dtype=out, device=x_MX.device)
    quantize = out != x_MX.dtype
    scale = torch.empty(m, 1, dtype=torch.float32, device=x_MX.device) if quantize else None
    block = _block(columns)
    _activation_kernel[(m,)](
        x_MX, values, values if scale is None else scale, columns,
        KIND=activation, GATED=gated, QUANTIZE=quantize, WHOLE=block >= columns, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return Rows(values, scale)


def _block(columns: int) -> int:
    return triton.next_power_of_2(columns) if columns <= MOST_COLUMNS else PIECE


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


_ACTIVATIONS = (
    ("silu", True), ("gelu_tanh", True), ("gelu", False), ("relu2", False), ("clamped_swiglu", True),
)  # fmt: skip


def shipped(gpu: Gpu) -> list[Shipped]:
    """List the kernel for small and large inner sizes, every type of input and output, and every activation."""
    return [
        Shipped(
            f"{activation}{'_mul' if gated else ''}, {columns} columns of {stream} to {out}",
            _activation_kernel,
            {"p_in": f"*{stream}", "p_out": f"*{out}", "p_scale": "*fp32", "columns": "i32"},
            {"KIND": activation, "GATED": gated, "QUANTIZE": out != stream, "WHOLE": columns <= MOST_COLUMNS,
             "BLOCK": _block(columns)},
            _warps(_block(columns)),
        )
        for activation, gated in _ACTIVATIONS
        for stream in ("bf16", "fp32")
        for columns in (4096, 16384, 32768)
        for out in (stream, "i8", "fp8e4nv")
    ]  # fmt: skip
