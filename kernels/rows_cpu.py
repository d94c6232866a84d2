"""Norms and activations by the kernels in C (`rows_cpu.c`), rounded to 8 bits at once where a product takes these."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, floats, integers, pointers, type_number
from batchinfer.kernels.norm import LayerNorm
from batchinfer.kernels.rows import Rows

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "clamped_swiglu")
"""The activations, by the kernel's numbers."""

TYPES = (torch.float32, torch.bfloat16)
"""Types of the rows that the kernels take."""


class _AddNorm(Arguments):
    _fields_ = (
        *pointers("x y y_scale weight bias out scale"),
        *integers("type rows columns"),
        *floats("eps"),
        ("normed", ctypes.c_int),
    )


class _Activation(Arguments):
    _fields_ = (*pointers("x scale out out_scale"), *integers("type rows columns kind gated"))


def add_norm(
    library: ctypes.CDLL,
    x_MD: Tensor,
    y: Rows | None,
    norm_D: Tensor | LayerNorm | None,
    eps: float,
    takes: torch.dtype,
) -> Rows:
    """Add y, if given, to x in place; return x's norm as rows for a product with this `takes`.

    The norm is an RMSNorm with this weight or without one, or a LayerNorm. x, y and the weights are of one type of
    `TYPES`; x and the weights are contiguous. The rows are of x's type, or 8-bit ones if `takes` is uint8.
    """
    assert y is None or y.values.shape == x_MD.shape
    weight, bias = norm_D if isinstance(norm_D, LayerNorm) else (norm_D, None)
    out, scale = _empty(x_MD.shape, x_MD.dtype, takes)
    values = None if y is None else y.values.contiguous()
    y_scale = None if y is None or y.scale is None else y.scale.contiguous()
    library.add_norm(
        ctypes.byref(
            _AddNorm(
                *map(address, (x_MD, values, y_scale, weight, bias, out, scale)),
                *(type_number(x_MD.dtype), *x_MD.shape, eps, 1),
            )
        )
    )
    return Rows(out, scale)


def quantize_rows(library: ctypes.CDLL, x_MK: Tensor) -> Rows:
    """Round each row of x, float32 [M, K], to 8 bits with a scale of its own."""
    x = x_MK.contiguous()
    out, scale = _empty(x.shape, x.dtype, torch.uint8)
    operands = map(address, (x, None, None, None, None, out, scale))
    library.add_norm(ctypes.byref(_AddNorm(*operands, 0, *x.shape, 0.0, 0)))
    return Rows(out, scale)


def activate(library: ctypes.CDLL, x: Rows, activation: str, gated: bool, takes: torch.dtype) -> Rows:
    """Return the rows of one of the `ACTIVATIONS` for a product with this `takes`.

    x is of one of the `TYPES`, with its scales or without. The rows are of x's type, rounded once, or 8-bit ones if
    `takes` is uint8.
    """
    values = x.values.contiguous()
    rows, columns = values.shape[0], values.shape[1] // (2 if gated else 1)
    out, scale = _empty((rows, columns), values.dtype, takes)
    given = None if x.scale is None else x.scale.contiguous()
    operands = map(address, (values, given, out, scale))
    numbers = (type_number(values.dtype), rows, columns, ACTIVATIONS.index(activation), gated)
    library.activate(ctypes.byref(_Activation(*operands, *numbers)))
    return Rows(out, scale)


def _empty(shape: Sequence[int], dtype: torch.dtype, takes: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return where rows for a product with this `takes` go, and their scales if these are 8-bit ones."""
    if takes != torch.uint8:
        return torch.empty(shape, dtype=dtype), None
    return torch.empty(shape, dtype=torch.uint8), torch.empty(shape[0], 1)
