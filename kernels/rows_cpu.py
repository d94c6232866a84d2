"""Norms and activations that are rounded to 8 bits at once, by the kernels in C (`rows_cpu.c`)."""

import ctypes

import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, floats, integers, pointers, type_number
from batchinfer.kernels.rows import Rows

ACTIVATIONS = ("silu", "gelu_tanh", "relu2", "clamped_swiglu")
"""The activations that the kernel has, by its numbers."""

TYPES = (torch.float32, torch.bfloat16)
"""Types of the rows that the norm's kernel takes."""


class _AddNorm(Arguments):
    _fields_ = (
        *pointers("x y y_scale weight out scale"),
        *integers("type rows columns"),
        *floats("eps"),
        ("normed", ctypes.c_int),
    )


class _Activation(Arguments):
    _fields_ = (*pointers("x scale out out_scale"), *integers("rows columns kind gated"))


def add_norm(
    library: ctypes.CDLL, x_MD: Tensor, y: Rows | None, weight_D: Tensor | None, eps: float, takes: torch.dtype
) -> Rows:
    """Add y, if given, to x in place; return x's RMSNorm as rows for a product with this `takes`.

    x and y are of one type of `TYPES`, and x is contiguous. The rows are of x's type, or 8-bit ones if `takes` is
    uint8.
    """
    assert y is None or y.values.shape == x_MD.shape
    quantized = takes == torch.uint8
    out = torch.empty(x_MD.shape, dtype=torch.uint8 if quantized else x_MD.dtype)
    scale = torch.empty(len(x_MD), 1) if quantized else None
    values = None if y is None else y.values.contiguous()
    y_scale = None if y is None or y.scale is None else y.scale.contiguous()
    library.add_norm(
        ctypes.byref(
            _AddNorm(
                *map(address, (x_MD, values, y_scale, weight_D, out, scale)),
                *(type_number(x_MD.dtype), *x_MD.shape, eps, 1),
            )
        )
    )
    return Rows(out, scale)


def quantize_rows(library: ctypes.CDLL, x_MK: Tensor) -> Rows:
    """Round each row of x, float32 [M, K], to 8 bits with a scale of its own."""
    x = x_MK.contiguous()
    out, scale = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 1)
    library.add_norm(ctypes.byref(_AddNorm(*map(address, (x, None, None, None, out, scale)), 0, *x.shape, 0.0, 0)))
    return Rows(out, scale)


def activate_quantize(library: ctypes.CDLL, x: Rows, activation: str, gated: bool) -> Rows:
    """Return the rows of one of the `ACTIVATIONS` rounded to 8 bits; x is float32, with its scales or without."""
    values = x.values.contiguous()
    rows, columns = len(values), values.shape[1] // (2 if gated else 1)
    out, scale = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, 1)
    given = None if x.scale is None else x.scale.contiguous()
    operands = map(address, (values, given, out, scale))
    library.activate_quantize(ctypes.byref(_Activation(*operands, rows, columns, ACTIVATIONS.index(activation), gated)))
    return Rows(out, scale)
