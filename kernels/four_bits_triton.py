"""`FourBits`: 4-bit weights in the order in which a Triton program reads them, and how it takes them apart."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

SPAN = tl.constexpr(128)
"""Columns that a row has in one turn of a program's loop."""
WORDS = tl.constexpr(16)
"""Words that hold them; and the columns of one step of the matrix units."""
GROUPS = (32, 64)
"""Columns that may share a scale; besides these, multiples of `SPAN`, and all columns."""
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""By its place in a word, the lowest first: which 16 columns of the span a number is of.

Two neighbours lie half a word apart, so that one shift and one mask bring both into the halves of a word, which are
numbers of 16 bits.
"""
_MOST_ZERO = 16  # bfloat16 holds whole numbers up to 256, and 128 + 8 + this is subtracted


@dataclass(frozen=True)
class FourBits:
    """`(values - zero_point) * scale` [N, K].

    A span's words of all rows lie together, and 16 words of a row: word j holds the columns j, 16 + j, ... 112 + j of
    the span, each + 8, in the order of `_PLACES`. So a tile of the matrix is one contiguous piece.
    """

    words: Tensor  # [ceil(K / 128), N, 16] int32
    scale: Tensor  # [groups, N] of the rows' type
    zero_point: Tensor | None  # [groups, N] int8
    columns: int
    group: int  # columns that share a scale: 32, 64 or a multiple of 128

    @property
    def rows(self) -> int:
        """N."""
        return self.words.shape[1]

    @property
    def spans(self) -> int:
        """How many spans its columns are, the last one filled up."""
        return self.words.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the weight, its scales and its zero points take."""
        return self.words.nbytes + self.scale.nbytes + (0 if self.zero_point is None else self.zero_point.nbytes)


def repack(values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor | None, dtype: torch.dtype) -> FourBits:
    """int8 values from -8 to 7, floating-point scales and whole zero points, for K / G columns each.

    Scales are rounded to `dtype`, that of the rows to come. A `ValueError` names groups that are not taken.
    """
    n, k = values_NK.shape
    groups = scale_NG.shape[1]
    group, padding = k // groups, -k % SPAN.value
    if k != group * groups or (groups > 1 and group not in GROUPS and group % SPAN.value):
        raise ValueError(
            f"4-bit weights [{n}, {k}] with {groups} scales a row: a scale must be for "
            f"{', '.join(map(str, GROUPS))} columns, a multiple of {SPAN.value}, or all"
        )
    if zero_point_NG is not None and not bool((zero_point_NG.abs() <= _MOST_ZERO).all()):
        raise ValueError(f"4-bit weights [{n}, {k}] have zero points beyond -{_MOST_ZERO} to {_MOST_ZERO}")
    pieces = F.pad(values_NK, (0, padding)).add(8).view(n, -1, len(_PLACES), WORDS.value).transpose(0, 1)
    words = torch.zeros(pieces.shape[0], n, WORDS.value, dtype=torch.int32, device=values_NK.device)
    for place, piece in enumerate(_PLACES):
        words |= pieces[:, :, piece].to(torch.int32) << 4 * place
    if groups == 1:
        group = k + padding
    more = padding // group  # groups that only the filling has
    scale = F.pad(scale_NG, (0, more)).t().to(dtype).contiguous()
    zero_point = None if zero_point_NG is None else F.pad(zero_point_NG, (0, more)).t().to(torch.int8).contiguous()
    return FourBits(words, scale, zero_point, k, group)


@triton.jit
def unpacked(b_words, i_pair: tl.constexpr, b_zero, dtype: tl.constexpr):
    """The columns 32 * `i_pair` and 16 more, and the 16 after them, of a span: two times [N, 16] in `dtype`, exact.

    `b_words` is int32 [N, 16], `b_zero` float32 [N]. In 16 bits a number is put into the lowest bits of 128.0 (or
    1024.0 in float16), whose last bit counts 1, and what it has too much is taken away.
    """
    b_pair = (b_words >> 4 * i_pair) & 0x000F000F
    if dtype == tl.float32:
        b_too_much = (b_zero + 8.0)[:, None]
        b_first = (b_pair & 0xF).to(tl.float32)
        b_second = (b_pair >> 16).to(tl.float32)
    else:
        b_pair |= 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        b_too_much = (b_zero + (136.0 if dtype == tl.bfloat16 else 1032.0)).to(dtype)[:, None]
        b_first = b_pair.to(tl.int16).to(dtype, bitcast=True)
        b_second = (b_pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    return b_first - b_too_much, b_second - b_too_much
