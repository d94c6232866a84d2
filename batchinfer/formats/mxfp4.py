"""MXFP4 as gpt-oss is published: the matrices of all experts in two tensors, in blocks of 32 numbers of 4 bits.

`MODULE_blocks` is uint8 [experts, N, K / 32, 16], the first number in the low half; `MODULE_scales` is uint8
[experts, N, K / 32], the exponent of a power of two plus 127. All else is in floating point.
"""

from math import prod
from typing import Any

import torch

from batchinfer.formats.fields import refuse_unknown
from batchinfer.formats.fp4 import E2M1, powers_of_two
from batchinfer.formats.matrix import QuantizedMatrix, Tensors
from batchinfer.formats.pack import unpack

BLOCK = 32


class MXFP4:
    """The format `mxfp4`. Raises `ValueError` for fields of `quantization_config` that are not supported."""

    name = "MXFP4"
    eight_bit_inputs: frozenset[str] = frozenset()
    for_cpu_alone = True

    def __init__(self, config: dict[str, Any]) -> None:
        # Only experts are ever stored so, whatever the list says.
        refuse_unknown(config, {"modules_to_not_convert", "dequantize"})

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the weight [N, K] of all experts together, or None for a module that is not quantized.

        Raises `ValueError` if its tensors are damaged.
        """
        name = f"{module}_blocks"
        if not tensors.has(name):
            return None
        stored = tensors.shape(name)
        rows, columns = shape
        if columns % BLOCK or len(stored) != 4 or stored[2:] != (columns // BLOCK, 16) or prod(stored[:2]) != rows:
            raise ValueError(
                f"tensor {name} has shape {list(stored)}; config.json asks for {rows} rows of {columns} numbers in "
                f"blocks of {BLOCK}"
            )
        values = unpack(tensors.take(name, stored, torch.uint8).view(rows, columns // 2), 4, 1)
        scale = powers_of_two(f"{module}_scales", stored[:3], tensors).view(rows, -1)
        return QuantizedMatrix(values, scale, (1, BLOCK), 4, code_book=E2M1)
