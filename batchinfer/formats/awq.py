"""AWQ checkpoints in the "gemm" layout, as AutoAWQ writes them (`quant_method: awq`).

`qweight` is int32 [K, N / 8] and `qzeros` int32 [G, N / 8], both packed along N; a word holds its eight columns in the
order 0, 2, 4, 6, 1, 3, 5, 7. `scales` is [G, N]. W[n, k] = scales[g, n] * (q[k, n] - z[g, n]) with g = k // group_size.
"""

from typing import Any

import torch
from torch import Tensor

from batchinfer.formats.fields import flag, refuse_module, whole
from batchinfer.formats.matrix import QuantizedMatrix, Tensors, checked_scale, groups_of
from batchinfer.formats.pack import unpack

# The index within a word of each of its eight columns: the inverse of the order 0, 2, 4, 6, 1, 3, 5, 7.
_INDEX_IN_WORD = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])


class AWQ:
    """An AWQ checkpoint's format, from its `quantization_config`. Raises `ValueError` for settings not supported."""

    name = "AWQ, 4 bits"
    eight_bit_inputs: frozenset[str] = frozenset()

    def __init__(self, config: dict[str, Any]) -> None:
        if (bits := whole(config, "bits")) != 4:
            raise ValueError(f"config.json: quantization_config: bits is {bits}; AWQ is read with 4 bits")
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(
                f"config.json: quantization_config: version is {version!r}; AWQ is read in its gemm layout: take the "
                "gemm checkpoint of the model, which most publishers have"
            )
        self.group_size = whole(config, "group_size")
        self.zero_point = flag(config, "zero_point", True)
        left_out = config.get("modules_to_not_convert") or []
        if not isinstance(left_out, list) or not all(isinstance(name, str) for name in left_out):
            raise ValueError(
                f"config.json: quantization_config: modules_to_not_convert is {left_out!r}; expected a list of names"
            )
        self.left_out: list[str] = left_out

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        if module == "lm_head" or any(name in module for name in self.left_out):
            return None
        n, k = shape
        if n % 8:
            refuse_module(module, shape, "4-bit numbers in 32-bit words")
        size = k if self.group_size == -1 else self.group_size
        groups = groups_of(k, size, module)
        q = _columns(tensors.take(f"{module}.qweight", (k, n // 8), torch.int32))
        scale = checked_scale(tensors.take(f"{module}.scales", (groups, n)), f"{module}.scales").t().contiguous()
        zero_point = None
        if self.zero_point:
            z = _columns(tensors.take(f"{module}.qzeros", (groups, n // 8), torch.int32))
            zero_point = z.to(torch.int16) - 8
        else:
            tensors.drop(f"{module}.qzeros")
        values = (q.to(torch.int8) - 8).contiguous()
        return QuantizedMatrix(values, scale, (1, size), 4, "float", zero_point)


def _columns(words: Tensor) -> Tensor:
    """Unpack words, int32 [rows, N / 8], to numbers, uint8 [N, rows]."""
    numbers = unpack(words, 4, 1)
    return numbers.view(len(numbers), -1, 8)[:, :, _INDEX_IN_WORD].flatten(1).t()
