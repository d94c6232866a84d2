"""The gated activation of the Llama family, `silu(gate) * up` (SwiGLU, Shazeer 2020)."""

from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.rows import Rows, quantize_rows


def silu_mul(gate_up_M2F: Tensor) -> Tensor:
    """`silu(gate) * up` of `[gate | up]` [M, 2F]: [M, F]."""
    gate, up = gate_up_M2F.chunk(2, -1)
    return F.silu(gate).mul_(up)


def silu_mul_quantize(gate_up: Rows) -> Rows:
    """`silu(gate) * up` in 8 bits by rows, of a float32 product [M, 2F] whose row scales are still apart.

    Only the gate needs its scale before the nonlinearity; the scale of `up` goes on into the result's.
    """
    gate, up = gate_up.values.chunk(2, -1)
    if gate_up.scale is None:
        return quantize_rows(F.silu(gate).mul_(up))
    return quantize_rows(F.silu(gate * gate_up.scale, inplace=True).mul_(up), gate_up.scale)
