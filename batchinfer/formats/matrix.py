"""`QuantizedMatrix`: a quantized weight, in the one form into which every checkpoint format is read."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from batchinfer.kernels.float8_inputs import PER_TOKEN, InputScales

ROWS = 1024  # of a matrix, looked up at a time
FP8_MOST = torch.finfo(torch.float8_e4m3fn).max
UNROUNDED = ("nvfp4", "mxfp4", "mxfp8")
"""Types of inputs that some checkpoints ask for, and to which no inputs are rounded: they stay in floating point."""


class Tensors(Protocol):
    """A checkpoint's tensors, as the formats read them."""

    def has(self, name: str) -> bool:
        """Return whether there is a tensor of this name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises `ValueError` if it is missing."""
        ...

    def take(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """Return a tensor. Raises `ValueError` if it is missing, or has another shape or none of these types.

        Without `dtypes`, any floating-point type of 16 bits or more is accepted.
        """
        ...

    def drop(self, name: str) -> None:
        """Count a tensor as used without reading it."""
        ...


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [N, K] that stands for `(values - zero_point) * scale`, with one scale per block of rows and columns.

    With a code book, values are places in it, and stand for the numbers there. Column k uses the scales of column
    k // block[1], or of column group_of[k] if `group_of` is given.
    """

    values: Tensor  # [N, K] int8 or float8_e4m3fn; uint8 with a code book
    scale: Tensor  # [ceil(N / rows), ceil(K / columns)] float32
    block: tuple[int, int]  # rows and columns that share a scale
    bits: int
    activations: str = "float"  # the type of input that the checkpoint was made for: float | int8 | fp8 | `UNROUNDED`
    zero_point: Tensor | None = None  # int16, in the shape of scale
    group_of: Tensor | None = None  # [K] int64, the column of `scale` that each column of the matrix uses
    inputs: InputScales = PER_TOKEN  # the scales of inputs, if they are not floating point
    code_book: Tensor | None = None  # float32 [16]

    def to(self, device: torch.device) -> "QuantizedMatrix":
        """Return the matrix on a device."""
        tensors = {name: getattr(self, name) for name in ("values", "scale", "zero_point", "group_of", "code_book")}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})

    def __getitem__(self, rows: slice | Tensor) -> "QuantizedMatrix":
        """Return the matrix of some rows, which are given as for a tensor."""
        n, high = len(self.values), self.block[0]

        def of(small: Tensor | None) -> Tensor | None:
            if small is None or len(small) == 1:
                return small
            return (small if high == 1 else small.repeat_interleave(high, 0)[:n])[rows]

        scale = of(self.scale)
        assert scale is not None
        values = self.values[rows]
        high = len(values) if len(scale) == 1 else 1
        return replace(self, values=values, scale=scale, zero_point=of(self.zero_point), block=(high, self.block[1]))

    def __mul__(self, factor: float) -> "QuantizedMatrix":
        """Return the matrix multiplied by a number."""
        return replace(self, scale=self.scale * factor)

    def by_channel(self, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor] | None:
        """Return (values [N, K], float32 scales [N]) if the values are of this type with per-channel scales.

        Returns None if the matrix has another type, groups of columns or zero points.
        """
        if self.values.dtype != dtype or self.zero_point is not None or self.scale.shape[1] != 1:
            return None
        return self.values, self._spread(self.scale)[:, 0].expand(len(self.values)).contiguous()

    def by_group(self, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """Return (scale, zero point), [N, K / size] each, with the first of `sizes` that divides the group size.

        Returns None if there is no such size, if the columns of a group are not neighbours, or with a code book.
        """
        size = next((size for size in sizes if self.block[1] % size == 0), None)
        if size is None or self.group_of is not None or self.code_book is not None or self.values.shape[1] % size:
            return None
        first = slice(None, None, size)
        zero_point = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.float()
        scale, zero_point = (self._spread(small).expand(self.values.shape) for small in (self.scale, zero_point))
        return scale[:, first].contiguous(), zero_point[:, first].contiguous()

    def dequantize(self) -> Tensor:
        """Return the dequantized weights, float32 [N, K]."""
        weight = self.values.float() if self.code_book is None else _looked_up(self.values, self.code_book)
        if self.block[0] == 1 and self.group_of is None and weight.shape[1] % self.block[1] == 0:
            groups = weight.view(len(weight), -1, self.block[1])  # a view: scales need not be repeated in memory
            if self.zero_point is not None:
                groups.sub_(self.zero_point[:, :, None])
            groups.mul_(self.scale[:, :, None])
            return weight
        if self.zero_point is not None:
            weight.sub_(self._spread(self.zero_point))
        return weight.mul_(self._spread(self.scale))

    def _spread(self, small: Tensor) -> Tensor:
        """Repeat each entry (of scales or zero points) over its block, as far as broadcasting does not do that."""
        n, k = self.values.shape
        if small.shape[0] > 1 and self.block[0] > 1:
            small = small.repeat_interleave(self.block[0], 0)[:n]
        if self.group_of is not None:
            return small[:, self.group_of]
        return small if small.shape[1] == 1 else small.repeat_interleave(self.block[1], 1)[:, :k]


def _looked_up(places: Tensor, book: Tensor) -> Tensor:
    """Return the numbers [N, K] of a code book at places [N, K], piece by piece: indices take more memory."""
    found = torch.empty(places.shape, dtype=book.dtype, device=places.device)
    for i in range(0, len(places), ROWS):
        found[i : i + ROWS] = book[places[i : i + ROWS].int()]
    return found


def checked_scale(scale: Tensor, name: str) -> Tensor:
    """Return the scales of weights in float32. Raises `ValueError` if one of them is zero or not finite.

    Scales may be negative: some quantizers choose the sign too, so that the one more number that a symmetric range has
    below zero serves the larger of a group's extremes.
    """
    scale = scale.float()
    if not bool(((scale != 0) & scale.isfinite()).all()):
        raise ValueError(f"tensor {name} has a scale that is zero or not finite: the checkpoint is damaged")
    return scale


def one_number(name: str, tensors: Tensors) -> Tensor:
    """Return a tensor of a single floating-point number, stored as a scalar or as a vector of length 1."""
    return tensors.take(name, () if tensors.shape(name) == () else (1,))


def checked_input_scale(name: str, tensors: Tensors) -> float:
    """Return the one scale of a module's inputs. Raises `ValueError` if it is not positive and finite."""
    value = float(one_number(name, tensors))
    if not 0 < value < float("inf"):
        raise ValueError(f"tensor {name} is {value}; the scale of inputs must be positive: the checkpoint is damaged")
    return value


def checked_groups(group_of: Tensor, groups: int, name: str) -> Tensor:
    """Return the columns' group numbers as int64. Raises `ValueError` if one is not in 0 to groups - 1."""
    if not bool(((group_of >= 0) & (group_of < groups)).all()):
        raise ValueError(f"tensor {name} names groups outside 0 to {groups - 1}: the checkpoint is damaged")
    return group_of.long()


def groups_of(columns: int, group_size: int, module: str) -> int:
    """Return the number of groups in a row. Raises `ValueError` if `group_size` does not divide `columns`."""
    if group_size < 1 or columns % group_size:
        raise ValueError(f"{module}: group_size {group_size} does not divide its {columns} columns")
    return columns // group_size


def quantize_channels(weight_NK: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Round a weight to 8 bits, symmetric with per-channel scales: (values [N, K], float32 scales [N]).

    `dtype` is int8 or float8_e4m3fn. The weight is about values * scale.
    """
    weight = weight_NK.to(torch.float32, copy=True)
    whole = dtype == torch.int8
    scale = weight.abs().amax(-1).div_(127.0 if whole else FP8_MOST).clamp_(min=1e-30)
    weight.div_(scale[:, None])
    return (weight.round_() if whole else weight.clamp_(-FP8_MOST, FP8_MOST)).to(dtype), scale
