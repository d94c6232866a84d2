"""The gated activation of the Llama family, `silu(gate) * up` (SwiGLU, Shazeer 2020)."""

from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.rows import Rows, quantize_rows


def silu_mul(gate_up_M2F: Tensor) -> Tensor:
    """Return `silu(gate) * up`, [M, F], of the matrix `[gate | up]` [M, 2F]."""
    gate, up = gate_up_M2F.chunk(2, -1)
    return F.silu(gate).mul_(up)


def silu_mul_quantize(gate_up: Rows) -> Rows:
    """Return `silu(gate) * up`, [M, F], rounded to 8 bits with one scale per row.

    `gate_up` is a float32 product [M, 2F] whose row scales have not been multiplied in. Only the gate needs its scale
    before the nonlinearity; the scale of `up` becomes a factor of the result's scale.
    """
    gate, up = gate_up.values.chunk(2, -1)
    if gate_up.scale is None:
        return quantize_rows(F.silu(gate).mul_(up))
    return quantize_rows(F.silu(gate * gate_up.scale, inplace=True).mul_(up), gate_up.scale)
