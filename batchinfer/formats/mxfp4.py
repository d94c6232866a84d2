"""MXFP4 as gpt-oss is published: the matrices of experts in blocks of 32 numbers of 4 bits.

`MODULE_blocks` is uint8 [N, K / 32, 16], the first number in the low half; `MODULE_scales` is uint8 [N, K / 32], the
exponent of a power of two plus 127. They are parts of tensors of all experts (`models/fused_experts.py`). All else is
in floating point.
"""

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
        """Return an expert's weight [N, K], or None for a module that is not quantized.

        Raises `ValueError` if its tensors are damaged.
        """
        name = f"{module}_blocks"
        if not tensors.has(name):
            return None
        rows, columns = shape
        if columns % BLOCK:
            raise ValueError(f"{module} has {columns} columns, which blocks of {BLOCK} do not fill")
        blocks = tensors.take(name, (rows, columns // BLOCK, 16), torch.uint8)
        values = unpack(blocks.view(rows, columns // 2), 4, 1)
        scale = powers_of_two(f"{module}_scales", (rows, columns // BLOCK), tensors)
        return QuantizedMatrix(values, scale, (1, BLOCK), 4, code_book=E2M1)
