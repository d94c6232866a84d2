"""NVFP4 and MXFP4: numbers of 4 bits with a sign, two bits of exponent and one of mantissa (E2M1), in small groups.

`weight_packed` is uint8 [N, K / 2], the first number in the low half. NVFP4: `weight_scale` is float8_e4m3fn
[N, K / 16], and a weight is its number times `weight_scale / weight_global_scale`, which is one number. MXFP4 (Open
Compute Project, Microscaling Formats 1.0): `weight_scale` is uint8 [N, K / 32], the exponent of a power of two plus 127
(E8M0).
"""

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix, Tensors, checked_scale, groups_of, one_number
from batchinfer.formats.pack import unpack

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nvfp4(module: str, shape: tuple[int, int], tensors: Tensors, inputs: str) -> QuantizedMatrix:
    """Return the module's weight [N, K]. `inputs` is the type to which its inputs are to be rounded."""
    counts = (shape[0], groups_of(shape[1], 16, module))
    # A group whose numbers are all near zero has the scale 0.
    scale = tensors.take(f"{module}.weight_scale", counts, torch.float8_e4m3fn).float()
    name = f"{module}.weight_global_scale"
    if tensors.has(f"{module}.input_global_scale"):
        tensors.drop(f"{module}.input_global_scale")
    return _matrix(module, shape, tensors, scale / checked_scale(one_number(name, tensors), name), inputs)


def mxfp4(module: str, shape: tuple[int, int], tensors: Tensors, inputs: str) -> QuantizedMatrix:
    """Return the module's weight [N, K]. `inputs` is the type to which its inputs are to be rounded."""
    scale = powers_of_two(f"{module}.weight_scale", (shape[0], groups_of(shape[1], 32, module)), tensors)
    return _matrix(module, shape, tensors, scale, inputs)


def powers_of_two(name: str, shape: tuple[int, ...], tensors: Tensors) -> Tensor:
    """Return scales that are stored as exponents (E8M0), float32. Raises `ValueError` for the exponent that is NaN."""
    exponents = tensors.take(name, shape, torch.uint8, torch.float8_e8m0fnu).view(torch.uint8)
    if bool((exponents == 255).any()):
        raise ValueError(f"tensor {name} has a scale that is not a number: the checkpoint is damaged")
    return torch.exp2(exponents.float() - 127)


def _matrix(module: str, shape: tuple[int, int], tensors: Tensors, scale: Tensor, inputs: str) -> QuantizedMatrix:
    n, k = shape
    values = unpack(tensors.take(f"{module}.weight_packed", (n, k // 2), torch.uint8), 4, 1)
    return QuantizedMatrix(values, scale, (1, k // scale.shape[1]), 4, inputs, code_book=E2M1)
