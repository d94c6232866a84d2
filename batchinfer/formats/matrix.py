"""`QuantizedMatrix`: a weight in few bits, in the one form that every checkpoint format is read into."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

FP8_MOST = torch.finfo(torch.float8_e4m3fn).max


class Tensors(Protocol):
    """Where a format finds a checkpoint's tensors."""

    def has(self, name: str) -> bool:
        """True if there is a tensor of this name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; a `ValueError` names it if it is missing."""
        ...

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """The tensor; a `ValueError` names it if it is missing, has another shape or none of these types.

        No type given stands for any floating point of 16 bits or more.
        """
        ...

    def drop(self, name: str) -> None:
        """Count a tensor as used that need not be read."""
        ...


@dataclass(frozen=True)
class QuantizedMatrix:
    """`(values - zero_point) * scale` [N, K]: a scale for each rectangle of `block` rows and columns.

    Where `group_of` is given, column k belongs to the k-th entry's column of scales, not to the k // block[1]-th.
    """

    values: Tensor  # [N, K] int8 or float8_e4m3fn
    scale: Tensor  # [ceil(N / rows), ceil(K / columns)] float32
    block: tuple[int, int]  # rows and columns that share a scale
    bits: int
    activations: str = "float"  # float | int8 | fp8: what the checkpoint wants its inputs to be
    zero_point: Tensor | None = None  # int16, in the shape of scale
    group_of: Tensor | None = None  # [K] int64

    def to(self, device: torch.device) -> "QuantizedMatrix":
        """The same on a device."""
        parts = {name: getattr(self, name) for name in ("values", "scale", "zero_point", "group_of")}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if part is not None})

    def by_channel(self, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor] | None:
        """(values [N, K] of that type, scale float32 [N]) where that is all it is; None with groups or zero points."""
        if self.values.dtype != dtype or self.zero_point is not None or self.scale.shape[1] != 1:
            return None
        return self.values, self._spread(self.scale)[:, 0].expand(len(self.values)).contiguous()

    def by_group(self, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """(scale, zero point) [N, K / size], for the first of `sizes` that divides its groups of columns.

        None where there is none, or columns of a group do not lie together.
        """
        size = next((size for size in sizes if self.block[1] % size == 0), None)
        if size is None or self.group_of is not None or self.values.shape[1] % size:
            return None
        first = slice(None, None, size)
        zero_point = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.float()
        scale, zero_point = (self._spread(small).expand(self.values.shape) for small in (self.scale, zero_point))
        return scale[:, first].contiguous(), zero_point[:, first].contiguous()

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        weight = self.values.float()
        if self.zero_point is not None:
            weight.sub_(self._spread(self.zero_point))
        return weight.mul_(self._spread(self.scale))

    def _spread(self, small: Tensor) -> Tensor:
        """Each entry repeated over its rectangle; an expanded view where one row or column is the whole."""
        n, k = self.values.shape
        if small.shape[0] > 1 and self.block[0] > 1:
            small = small.repeat_interleave(self.block[0], 0)[:n]
        if self.group_of is not None:
            return small[:, self.group_of]
        return small if small.shape[1] == 1 else small.repeat_interleave(self.block[1], 1)[:, :k]


def checked_scale(scale: Tensor, name: str) -> Tensor:
    """The scales in float32. A `ValueError` names the tensor if one of them is zero, negative or not finite."""
    scale = scale.float()
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(f"tensor {name} has a scale that is not a positive number: the checkpoint is damaged")
    return scale


def checked_groups(group_of: Tensor, groups: int, name: str) -> Tensor:
    """The column's groups as int64. A `ValueError` names the tensor if one lies outside 0 to groups - 1."""
    if not bool(((group_of >= 0) & (group_of < groups)).all()):
        raise ValueError(f"tensor {name} names groups outside 0 to {groups - 1}: the checkpoint is damaged")
    return group_of.long()


def groups_of(columns: int, group_size: int, module: str) -> int:
    """How many groups a row has. A `ValueError` names the module if the size does not divide the columns."""
    if group_size < 1 or columns % group_size:
        raise ValueError(f"{module}: group_size {group_size} does not divide its {columns} columns")
    return columns // group_size


def quantize_channels(weight_NK: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """8 bits per output channel, symmetric: (values [N, K], scale float32 [N]) with weight about values * scale.

    `dtype` is int8 or float8_e4m3fn.
    """
    weight = weight_NK.to(torch.float32, copy=True)
    whole = dtype == torch.int8
    scale = weight.abs().amax(-1).div_(127.0 if whole else FP8_MOST).clamp_(min=1e-30)
    weight.div_(scale[:, None])
    return (weight.round_() if whole else weight.clamp_(-FP8_MOST, FP8_MOST)).to(dtype), scale
