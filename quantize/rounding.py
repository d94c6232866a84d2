"""Scales for groups of numbers and rounding with them, which every quantization method does in the end."""

from dataclasses import dataclass

import torch
from torch import Tensor

from batchinfer.formats.scheme import WeightScheme

SHRINK = torch.linspace(1.0, 0.5, 26)
"""Fractions of a group's largest value at which the search for scales tries to clip."""


def stored_scale(scale: Tensor, scheme: WeightScheme) -> Tensor:
    """Round scales to the type in which they are stored, but not to zero; return them in float32."""
    dtype: torch.dtype = getattr(torch, scheme.scale_type)
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return scale.clamp(min=least).to(dtype).float()


@dataclass(frozen=True)
class Grid:
    """The integers of `bits` bits around zero."""

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
        """Return a float32 scale [..., 1] for each group [..., g].

        Without `importance`, the group's largest value just fits. With it, the scale is searched that has the least
        sum of importance * error^2: clipping the largest values may make the others more exact. The shape of
        `importance` must broadcast to that of the groups.
        """
        most = groups.abs().amax(-1, keepdim=True)
        # 4 bits have one more number below zero than above. Clipping half a step at the top makes all steps finer.
        fits = most.div_(self.high if self.bits == 8 else self.high + 0.5).clamp_(min=1e-10)
        if importance is None:
            return fits
        best, least = fits, self._error(groups, fits, importance)
        for fraction in SHRINK[1:].tolist():
            error = self._error(groups, fits * fraction, importance)
            best = torch.where(error < least, fits * fraction, best)
            least = torch.minimum(error, least)
        return best

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the nearest integers of the grid, in float32."""
        return (values / scale).round_().clamp_(self.low, self.high)

    def _error(self, groups: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
        return self.round(groups, scale).mul_(scale).sub_(groups).square_().mul_(importance).sum(-1, keepdim=True)
