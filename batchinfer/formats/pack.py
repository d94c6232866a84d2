"""Packing small integers into 32-bit words, the first number in the lowest bits."""

import torch
from torch import Tensor

WORD = 32


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Unpack words (int32, or uint8) to uint8 numbers; `bits` must divide 8.

    The size of `dim` grows by the numbers in a word.
    """
    # The machine is little-endian, so the order of a word's bytes is the order of its numbers.
    octets = words.movedim(dim, -1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    numbers = octets[..., None].bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1)
    return numbers.flatten(-2).movedim(-1, dim)


def pack(numbers: Tensor, bits: int, dim: int) -> Tensor:
    """Pack numbers from 0 to 2^bits - 1 into int32 words: the inverse of `unpack`. Zeros fill the last word."""
    rows = numbers.movedim(dim, -1).to(torch.uint8)
    a_word = WORD // bits
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % a_word))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    in_octets = rows.view(*rows.shape[:-1], -1, 8 // bits)
    octets: Tensor = in_octets.bitwise_left_shift(shifts).sum(-1, dtype=torch.uint8)
    return octets.clone(memory_format=torch.contiguous_format).view(torch.int32).movedim(-1, dim)
