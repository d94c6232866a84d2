"""The activations of feed-forward blocks, with a gate (GLU, Shazeer 2020) or without one."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.rows import Rows, quantize_rows


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square_()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu2": _relu2,
}  # fmt: skip


_LIMIT, _SLOPE = 7.0, 1.702


def _clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `gate * sigmoid(1.702 * gate) * (up + 1)` of the clamped gate and up (gpt-oss, OpenAI 2025)."""
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    return torch.sigmoid(gate * _SLOPE).mul_(gate).mul_(up.add_(1))


def activate(x_MX: Tensor, activation: str, gated: bool) -> Tensor:
    """Return `activation(gate) * up`, [M, F], of the matrix `[gate | up]` [M, 2F], or `activation(x)` without a gate.

    `activation` is silu, gelu, gelu_tanh (GELU by its approximation with tanh) or relu2 (the square of the rectified
    input); or clamped_swiglu, which has a gate.
    """
    if activation == "clamped_swiglu":
        return _clamped_swiglu(*x_MX.chunk(2, -1))
    function = _FUNCTIONS[activation]
    if not gated:
        return function(x_MX)
    gate, up = x_MX.chunk(2, -1)
    return function(gate).mul_(up)


def activate_quantize(x: Rows, activation: str, gated: bool) -> Rows:
    """Return the activation's rows rounded to 8 bits with one scale per row.

    x is a float32 product whose row scales have not been multiplied in. Only what goes into the activation needs its
    scale before; the scale of `up` becomes a factor of the result's scale.
    """
    if not gated or x.scale is None or activation not in _FUNCTIONS:
        return quantize_rows(activate(x.dense(), activation, gated))
    gate, up = x.values.chunk(2, -1)
    return quantize_rows(_FUNCTIONS[activation](gate * x.scale).mul_(up), x.scale)
