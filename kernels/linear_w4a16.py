"""`LinearW4A16`: the product of bfloat16 rows with weights that stay in 4 bits in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels import dispatch
from batchinfer.kernels.grain import MIN_ROWS
from batchinfer.kernels.rows import Rows

GROUPS = (256, 128, 64, 32)
"""Group sizes that are allowed (columns that share a scale), the largest first."""
GRAIN = 16
"""The number of the weight's rows must be a multiple of this."""


def vectorized() -> bool:
    """Return whether int4pack has vector code for this processor. Its scalar code is about a hundred times slower."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class LinearW4A16:
    """The product `x @ ((values - zero_point) * scale).T + bias` in bfloat16; a row's bits depend on no other row.

    The path "cpu" is torch's int4pack, which holds two numbers in a byte and multiplies in float32. It expands the
    weights again for every 4 rows. So it is fast for few rows, where it reads a quarter of the bytes of bfloat16
    weights, and slow for many, where it repeats work. Its vector code is for bfloat16 only, with scales and zero points
    in bfloat16 too: those of the checkpoint are rounded, as the weights would be if they were expanded.

    The path "reference" expands the weights at every call.
    """

    takes = torch.bfloat16
    row_grain = least_rows = 1

    def __init__(
        self, values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor, bias_N: Tensor | None = None
    ) -> None:
        """Pack int8 values from -8 to 7 with float32 scales and zero points, which K / G columns share.

        The bias is bfloat16. Raises `ValueError` for sizes that int4pack does not take.
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
        """Number of multiplications and additions for one input row."""
        return 2 * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and its zero points."""
        return int(self.weight.nbytes + self.scales.nbytes)

    def __call__(self, x: Rows) -> Rows:
        """Multiply rows [M, K]; the result [M, N] is dense, in bfloat16."""
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
