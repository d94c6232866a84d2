"""`LinearW4A16`: a product of bfloat16 rows and weights that stay in 4 bits, read as they are for each few rows."""

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels import dispatch
from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.rows import Rows

GROUPS = (256, 128, 64, 32)
"""Columns that may share a scale, the largest first."""
GRAIN = 16
"""The number of weight rows must be a multiple of this."""


def vectorized() -> bool:
    """True if int4pack has vector code for this processor; its plain loops take some hundred times as long."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class LinearW4A16:
    """`x @ ((values - zero_point) * scale).T + bias` in bfloat16, for any number of rows: their bits are the same.

    Paths: "cpu" is torch's int4pack, two numbers a byte. It multiplies in float32, and expands the weights again for
    every 4 rows: for few rows it reads a quarter of what bfloat16 weights take, for many it computes in vain. It has
    vector code for bfloat16 alone, and takes scales and zero points in it: rounded, where the checkpoint has finer
    ones, as the weights themselves would be if they were expanded. "reference" expands at every call.
    """

    takes = torch.bfloat16
    row_grain = 1

    def __init__(
        self, values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor, bias_N: Tensor | None = None
    ) -> None:
        """int8 values from -8 to 7; float32 scales and zero points, for K / G columns each; a bfloat16 bias.

        A `ValueError` names sizes that int4pack does not take.
        """
        n, k = values_NK.shape
        self.shape = (n, k)
        self.group = k // scale_NG.shape[1]
        if n % GRAIN or self.group not in GROUPS or k != self.group * scale_NG.shape[1]:
            raise ValueError(
                f"4-bit weights [{n}, {k}] with groups of {self.group}: rows must be a multiple of {GRAIN}, and groups "
                f"one of {', '.join(map(str, GROUPS))} that divides the columns"
            )
        self.bias = bias_N
        available = ("reference", "cpu") if vectorized() else ("reference",)
        self.path = dispatch.choose(available)
        if self.path == "cpu":
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values_NK.to(torch.int32).add_(8), 1)
            # [G, N, 2]: a weight is (number - 8) * first + second
            pairs = torch.stack([scale_NG, -zero_point_NG * scale_NG], -1)
            self.scales = pairs.transpose(0, 1).to(torch.bfloat16).contiguous()
        else:
            self.weight = values_NK
            self.scales = torch.stack([scale_NG, zero_point_NG], -1)

    @property
    def operations_per_row(self) -> int:
        """Multiplications and additions."""
        return 2 * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the weight, its scales and its zero points take."""
        return int(self.weight.nbytes + self.scales.nbytes)

    def __call__(self, x: Rows) -> Rows:
        """[M, K] to bfloat16 [M, N], dense."""
        x_MK = x.dense().to(torch.bfloat16)
        product = self._packed(x_MK) if self.path == "cpu" else self._reference(x_MK)
        return Rows(product if self.bias is None else product.add_(self.bias))

    def _packed(self, x_MK: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_MK.contiguous(), self.weight, self.group, self.scales
        )
        return out

    def _reference(self, x_MK: Tensor) -> Tensor:
        scale, zero_point = self.scales.unsqueeze(2).unbind(-1)
        groups = self.weight.float().unflatten(1, (-1, self.group))
        weight = groups.sub_(zero_point).mul_(scale).flatten(1)
        rows = len(x_MK)
        padded = F.pad(x_MK.float(), (0, 0, 0, -rows % MIN_ROWS))
        return F.linear(padded, weight)[:rows].to(torch.bfloat16)
