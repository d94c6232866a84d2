"""`FourBits`: 4-bit weights in the order in which a Triton program reads them, and how a program unpacks them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from batchinfer.kernels.gpu import Gpu

GROUPS = (32, 64)
"""Group sizes that are allowed (columns that share a scale), besides multiples of `DEEPEST` and all columns."""
DEEPEST = 128
"""The most columns that a program multiplies in one turn of its loop."""
_BLOCK = 32  # columns of which a thread of four holds a word in the matrix units' layout
_NUMBERS = 8  # in a word
_MOST_ZERO = 16  # bfloat16 holds whole numbers up to 256 exactly, and unpacking subtracts 128 + 8 + zero point
_LEAST = {torch.bfloat16: 128, torch.float16: 1024, torch.float32: 0}
"""The number whose lowest bits an unpacked number is written into; the last bit has the value 1 there."""


@dataclass(frozen=True)
class FourBits:
    """A matrix [N, K] of 4-bit numbers that stands for `(values - zero_point) * scale`.

    A span is the `depth` columns of a row that are multiplied in one turn. The words of one span for all rows lie
    together, so that a tile of the matrix is contiguous in memory. Within a span, words lie in the order in which
    threads hold the left operand of a matrix unit's instruction, so that unpacking moves nothing between threads: of
    each block of 32 columns, thread t of four holds columns t * `near` to t * `near` + `near` - 1 and those that follow
    at distances of 4 * `near`. These eight make a word, with 8 added to each value. A word's even numbers are in its
    low half and its odd ones in the high half, so that one shift and one mask bring two neighbours into the halves.

    A pair is what a group's numbers need: in the lower half of an integer the number that unpacking subtracts, in the
    upper half the scale, both in the type of the rows to be multiplied. One load brings both.
    """

    words: Tensor  # [ceil(K / depth), N, depth / 8] int32
    pairs: Tensor  # [groups, N] int32; int64 for rows in float32
    dtype: torch.dtype  # of the rows to be multiplied
    columns: int
    group: int  # columns that share a scale: 32, 64 or a multiple of 128
    near: int

    @property
    def rows(self) -> int:
        """Number of rows, N."""
        return self.words.shape[1]

    @property
    def spans(self) -> int:
        """Number of spans of a row; the last one may be padded."""
        return self.words.shape[0]

    @property
    def depth(self) -> int:
        """Number of columns of a span: those of a group, or a part of them."""
        return self.words.shape[2] * _NUMBERS

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and its zero points."""
        return self.words.nbytes + self.pairs.nbytes


def near(gpu: Gpu) -> int:
    """Return how many neighbouring columns a thread holds: as many as Triton's layout has on this GPU."""
    return 2 if gpu.capability[0] == 9 else 4


def repack(values_NK: Tensor, scale_NG: Tensor, zero_point_NG: Tensor | None, dtype: torch.dtype, gpu: Gpu) -> FourBits:
    """Pack int8 values from -8 to 7 [N, K] with floating-point scales and integer zero points [N, G] for `gpu`.

    K / G columns share a scale. Scales are rounded to `dtype`, the type of the rows to be multiplied. Raises
    `ValueError` for a group size that is not supported and for zero points out of range.
    """
    n, k = values_NK.shape
    groups = scale_NG.shape[1]
    group = k // groups
    if k != group * groups or (groups > 1 and group not in GROUPS and group % DEEPEST):
        raise ValueError(
            f"4-bit weights [{n}, {k}] with {groups} scales a row: a scale must be for "
            f"{', '.join(map(str, GROUPS))} columns, a multiple of {DEEPEST}, or all"
        )
    if zero_point_NG is not None and not bool((zero_point_NG.abs() <= _MOST_ZERO).all()):
        raise ValueError(f"4-bit weights [{n}, {k}] have zero points beyond -{_MOST_ZERO} to {_MOST_ZERO}")
    depth = group if group in GROUPS and groups > 1 else DEEPEST
    padding = -k % depth
    if groups == 1:
        group = k + padding
    side = near(gpu)
    # [N, spans, blocks of 32 columns, parts of a word, threads, neighbours] to words [spans, N, threads, blocks, 8]
    parts = F.pad(values_NK, (0, padding)).add(8).view(n, -1, depth // _BLOCK, _NUMBERS // side, 4, side)
    numbers = parts.permute(1, 0, 4, 2, 3, 5).reshape(-1, n, depth // _NUMBERS, _NUMBERS)
    words = torch.zeros(numbers.shape[:3], dtype=torch.int32, device=values_NK.device)
    for i in range(_NUMBERS):
        words |= numbers[..., i].to(torch.int32) << 4 * (i // 2) + 16 * (i % 2)
    subtracted = (
        torch.full_like(scale_NG, _LEAST[dtype] + 8) if zero_point_NG is None else zero_point_NG + (_LEAST[dtype] + 8)
    )
    halves = torch.stack((subtracted.to(dtype), scale_NG.to(dtype)), -1).transpose(0, 1).contiguous()
    pairs = halves.view(torch.int64 if dtype == torch.float32 else torch.int32).squeeze(-1)
    return FourBits(words, pairs, dtype, k, group, side)


@triton.jit
def halves_of(b_pair, dtype: tl.constexpr):
    """Return (what unpacking subtracts, the scale), both in `dtype`, of an integer of twice its width."""
    BITS: tl.constexpr = dtype.primitive_bitwidth
    whole: tl.constexpr = tl.int32 if BITS == 32 else tl.int16
    return b_pair.to(whole).to(dtype, bitcast=True), (b_pair >> BITS).to(whole).to(dtype, bitcast=True)


@triton.jit
def unpacked(b_words, b_subtracted, dtype: tl.constexpr, NEAR: tl.constexpr):
    """Unpack the words [N, W] of a span: numbers minus `b_subtracted` [N], [N, 8 * W], exact in `dtype`.

    In 16-bit types a number is written into the lowest bits of 128.0 (1024.0 in float16), whose last bit has the value
    1; that is part of what is subtracted.
    """
    N: tl.constexpr = b_words.shape[0]
    W: tl.constexpr = b_words.shape[1]
    b_02 = tl.join(b_words & 0x000F000F, (b_words >> 8) & 0x000F000F)
    b_13 = tl.join((b_words >> 4) & 0x000F000F, (b_words >> 12) & 0x000F000F)
    b_two = tl.join(b_02, b_13)
    b_subtracted = b_subtracted[:, None, None, None]
    # High halves come first: the other way around, the compiler swaps the halves of each register before and after.
    if dtype == tl.float32:
        b_high = (b_two >> 16).to(dtype) - b_subtracted
        b_low = (b_two & 0xF).to(dtype) - b_subtracted
    else:
        b_two |= 0x43004300 if dtype == tl.bfloat16 else 0x64006400
        b_high = (b_two >> 16).to(tl.int16).to(dtype, bitcast=True) - b_subtracted
        b_low = b_two.to(tl.int16).to(dtype, bitcast=True) - b_subtracted
    b_numbers = tl.join(b_low, b_high).reshape(N, 4, W // 4, 8 // NEAR, NEAR)
    return b_numbers.permute(0, 2, 3, 1, 4).reshape(N, 8 * W)
