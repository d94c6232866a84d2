"""Rotations that spread outliers over all channels (QuaRot, Ashkboos et al. 2024): Hadamard with random signs."""

import math

import torch
from torch import Tensor


def rotation(size: int, seed: int) -> Tensor:
    """An orthogonal matrix, float32 [size, size], all of whose entries are small: 2 / sqrt(size) at most.

    Sylvester's Hadamard matrix of the largest power of two in `size`, times the Hartley matrix of the odd rest (which
    is 1 for a power of two), with random signs.
    """
    odd = size
    while odd % 2 == 0:
        odd //= 2
    turns = torch.outer(torch.arange(odd), torch.arange(odd)).remainder(odd).double() * (2 * math.pi / odd)
    matrix = (turns.cos() + turns.sin()) / math.sqrt(odd)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (matrix * signs[:, None]).float()
