"""Scales for groups of numbers, and rounding to them: what every method of quantization ends in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.formats.scheme import WeightScheme

SHRINK = torch.linspace(1.0, 0.5, 26)
"""Parts of the largest value that a clip search tries as the largest that is kept."""


def stored_scale(scale: Tensor, scheme: WeightScheme) -> Tensor:
    """The scales as they will be read, float32: rounded to the type that they are stored in, above zero there too."""
    dtype: torch.dtype = getattr(torch, scheme.scale_type)
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return scale.clamp(min=least).to(dtype).float()


@dataclass(frozen=True)
class Grid:
    """Whole numbers of `bits` bits around zero."""

    bits: int

    @property
    def low(self) -> int:
        """The smallest number."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest number."""
        return (1 << (self.bits - 1)) - 1

    def scales(self, groups: Tensor, importance: Tensor | None = None) -> Tensor:
        """A scale [..., 1] for each group [..., g], float32.

        Without `importance` the largest value just fits. With it, of a shape that broadcasts to the groups', the part
        of that scale with the least sum of importance * error^2: the largest values are cut where it helps the others.
        """
        most = groups.abs().amax(-1, keepdim=True)
        # 4 bits have one number more below zero: half a step is cut off above, and the steps are finer.
        fits = most.div_(self.high if self.bits == 8 else self.high + 0.5).clamp_(min=1e-10)
        if importance is None:
            return fits
        best, least = fits, self._error(groups, fits, importance)
        for part in SHRINK[1:].tolist():
            error = self._error(groups, fits * part, importance)
            best = torch.where(error < least, fits * part, best)
            least = torch.minimum(error, least)
        return best

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """The nearest whole numbers, float32."""
        return (values / scale).round_().clamp_(self.low, self.high)

    def _error(self, groups: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
        return self.round(groups, scale).mul_(scale).sub_(groups).square_().mul_(importance).sum(-1, keepdim=True)
