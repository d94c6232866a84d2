"""Rotations that spread outliers over all channels (QuaRot, Ashkboos et al. 2024): Hadamard matrices, random signs."""

import math

import torch
from torch import Tensor


def rotation(size: int, seed: int) -> Tensor:
    """Return an orthogonal matrix, float32 [size, size], with absolute values of at most 2 / sqrt(size).

    Let size be a power of two times an odd number. The matrix is the Kronecker product of Sylvester's Hadamard matrix,
    for the power of two, and the Hartley matrix, for the odd number. Its rows get random signs.
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
