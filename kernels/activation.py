"""The activations of feed-forward blocks, with a gate (GLU, Shazeer 2020) or without one."""

from collections.abc import Callable

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


def activate(x_MX: Tensor, activation: str, gated: bool) -> Tensor:
    """Return `activation(gate) * up`, [M, F], of the matrix `[gate | up]` [M, 2F], or `activation(x)` without a gate.

    `activation` is silu, gelu, gelu_tanh (GELU by its approximation with tanh) or relu2 (the square of the rectified
    input).
    """
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
    if not gated or x.scale is None:
        return quantize_rows(activate(x.dense(), activation, gated))
    gate, up = x.values.chunk(2, -1)
    return quantize_rows(_FUNCTIONS[activation](gate * x.scale).mul_(up), x.scale)
