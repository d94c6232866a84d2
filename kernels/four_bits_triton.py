"""`FourBits`: 4-bit weights in the order in which a Triton program reads them, and how a program unpacks them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

SPAN = tl.constexpr(128)
"""Number of columns that a program's loop reads of a row in one iteration; called a span."""
WORDS = tl.constexpr(16)
"""Number of 32-bit words that hold a row's span. It is also the number of columns of one matrix-unit instruction."""
GROUPS = (32, 64)
"""Group sizes that are allowed (columns that share a scale), besides multiples of `SPAN` and all columns."""
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The eight 4-bit numbers of a word come from the span's eight blocks of 16 columns, in this order, lowest bits first.

Numbers of two neighbouring blocks lie 16 bits apart, so that one shift and one mask bring both into the two 16-bit
halves of a word.
"""
_MOST_ZERO = 16  # bfloat16 holds whole numbers up to 256 exactly, and unpacking subtracts 128 + 8 + zero point


@dataclass(frozen=True)
class FourBits:
    """A matrix [N, K] of 4-bit numbers that stands for `(values - zero_point) * scale`.

    A span of a row is 16 words. Word j holds the span's columns j, 16 + j, ... 112 + j in the order of `_ORDER`, with
    8 added to each value. The words of one span for all rows lie together, so that a tile of the matrix is contiguous
    in memory.
    """

    words: Tensor  # [ceil(K / 128), N, 16] int32
    scale: Tensor  # [groups, N] in the type of the rows to be multiplied
    zero_point: Tensor | None  # [groups, N] int8
    columns: int
    group: int  # columns that share a scale: 32, 64 or a multiple of 128

    @property
    def rows(self) -> int:
        """Number of rows, N."""
        return self.words.shape[1]

    @property
    def spans(self) -> int:
        """Number of spans of a row; the last one may be padded."""
        return self.words.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and its zero points."""
        return self.words.nbytes + self.scale.nbytes + (0 if self.zero_point is None else self.zero_point.nbytes)


def repack(values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor | None, dtype: torch.dtype) -> FourBits:
    """Pack int8 values from -8 to 7 [N, K] with floating-point scales and integer zero points [N, G].

    K / G columns share a scale. Scales are rounded to `dtype`, the type of the rows to be multiplied. Raises
    `ValueError` for a group size that is not supported and for zero points out of range.
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
    # [spans, N, blocks of 16 columns, 16]
    blocks = F.pad(values_NK, (0, padding)).add(8).view(n, -1, len(_ORDER), WORDS.value).transpose(0, 1)
    words = torch.zeros(blocks.shape[0], n, WORDS.value, dtype=torch.int32, device=values_NK.device)
    for i, block in enumerate(_ORDER):
        words |= blocks[:, :, block].to(torch.int32) << 4 * i
    if groups == 1:
        group = k + padding
    more = padding // group  # groups that consist of padding only
    scale = F.pad(scale_NG, (0, more)).t().to(dtype).contiguous()
    zero_point = None if zero_point_NG is None else F.pad(zero_point_NG, (0, more)).t().to(torch.int8).contiguous()
    return FourBits(words, scale, zero_point, k, group)


@triton.jit
def unpacked(b_words, i_pair: tl.constexpr, b_zero, dtype: tl.constexpr):
    """Unpack two neighbouring blocks of 16 columns of a span, from column 32 * `i_pair` on: two matrices [N, 16].

    The results are in `dtype` and exact. `b_words` is int32 [N, 16]; `b_zero`, the zero points, is float32 [N]. In
    16-bit types a number is written into the lowest bits of 128.0 (1024.0 in float16), whose last bit has the value 1;
    then 128 (1024), 8 and the zero point are subtracted.
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
