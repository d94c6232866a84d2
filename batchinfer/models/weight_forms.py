"""The form in which a weight is multiplied: with 8-bit rows, in 4 bits, or in floating point."""

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix, quantize_channels
from batchinfer.formats.scheme import QuantScheme
from batchinfer.kernels.linear_w4a16 import GRAIN, GROUPS


def eight_bits(weight: Tensor | QuantizedMatrix, scheme: QuantScheme, device: frozenset[str]) -> str | None:
    """Return "int8" or "fp8" if the weight's product takes 8-bit rows of this type, else None.

    `device` names the types of which the device has products.
    """
    if not scheme.as_stored:
        return scheme.activations if scheme.quantized else None
    if not isinstance(weight, QuantizedMatrix) or weight.activations not in device:
        return None
    # Rounding other weights to float8 by channel would lose more than the 8-bit product gains.
    if weight.activations == "fp8" and (weight.inputs.group or weight.by_channel(torch.float8_e4m3fn) is None):
        return None
    return weight.activations


def rounded(weight: Tensor | QuantizedMatrix, kind: str) -> tuple[Tensor, Tensor]:
    """Return (values [N, K] in int8 or float8_e4m3fn, per-channel scales [N]).

    Weights that are stored in this form are unchanged; others are rounded to it.
    """
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    stored = weight.by_channel(dtype) if isinstance(weight, QuantizedMatrix) else None
    return quantize_channels(expanded(weight), dtype) if stored is None else stored


def whole_numbers(weight: Tensor | QuantizedMatrix) -> bool:
    """Return whether the weight is of whole numbers of 4 bits."""
    return isinstance(weight, QuantizedMatrix) and weight.bits == 4 and weight.code_book is None


def four_bits(weight: Tensor | QuantizedMatrix) -> bool:
    """Return whether the weight is of whole numbers of 4 bits, for floating-point inputs."""
    return isinstance(weight, QuantizedMatrix) and whole_numbers(weight) and weight.activations == "float"


def stacked(weights: list[Tensor | QuantizedMatrix]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Stack weights to (values, scale, zero point) for a product that keeps them in 4 bits.

    Returns None if it cannot take them as one matrix.
    """
    matrices = [weight for weight in weights if isinstance(weight, QuantizedMatrix)]
    groups = [found for matrix in matrices if (found := matrix.by_group(GROUPS)) is not None]
    if len(groups) < len(weights) or len({scale.shape[1] for scale, _ in groups}) > 1:
        return None
    values = torch.cat([matrix.values for matrix in matrices])
    if len(values) % GRAIN:
        return None
    scale, zero_point = (torch.cat(column) for column in zip(*groups, strict=True))
    return values, scale, zero_point


def expanded(weight: Tensor | QuantizedMatrix) -> Tensor:
    """Return the weight in floating point."""
    return weight.dequantize() if isinstance(weight, QuantizedMatrix) else weight
