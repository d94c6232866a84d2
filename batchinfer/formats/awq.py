"""AWQ checkpoints in the "gemm" layout, as AutoAWQ writes them (`quant_method: awq`).

`qweight` is int32 [K, N / 8] and `qzeros` int32 [G, N / 8], both packed along N; a word holds its eight columns in the
order 0, 2, 4, 6, 1, 3, 5, 7. `scales` is [G, N]. W[n, k] = scales[g, n] * (q[k, n] - z[g, n]) with g = k // group_size.
"""

from typing import Any

import torch
from torch import Tensor

from batchinfer.formats.fields import WHERE, flag, one_of, refuse_module, refuse_unknown, whole
from batchinfer.formats.left_out import LeftOut, is_head
from batchinfer.formats.matrix import QuantizedMatrix, Tensors, checked_scale, groups_of
from batchinfer.formats.pack import unpack

# The index within a word of each of its eight columns: the inverse of the order 0, 2, 4, 6, 1, 3, 5, 7.
_INDEX_IN_WORD = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

KNOWN = {
    "bits",
    "group_size",
    "zero_point",
    "sym",
    "version",
    "format",
    "checkpoint_format",
    "pack_dtype",
    "data_type",
    "modules_to_not_convert",
}


class AWQ:
    """An AWQ checkpoint's format, from its `quantization_config`. Raises `ValueError` for settings not supported."""

    name = "AWQ, 4 bits"
    eight_bit_inputs: frozenset[str] = frozenset()
    for_cpu_alone = False

    def __init__(self, config: dict[str, Any]) -> None:
        refuse_unknown(config, KNOWN)
        if (bits := whole(config, "bits")) != 4:
            raise ValueError(
                f"{WHERE}: bits is {bits}; AWQ is read with 4 bits: take another checkpoint of the model, such as its "
                "GPTQ one"
            )
        for key in ("version", "format", "checkpoint_format"):
            one_of(config, key, ("gemm",), "take the gemm checkpoint of the model, which most publishers have")
        one_of(config, "pack_dtype", ("int32",), "take another checkpoint of the model")
        one_of(config, "data_type", ("int",), "take another checkpoint of the model")
        if config.get("backend") == "llm-awq":
            raise ValueError(
                f"{WHERE}: backend is 'llm-awq', another layout than gemm: take the gemm checkpoint of the model"
            )
        self.group_size = whole(config, "group_size")
        self.zero_point = flag(config, "zero_point", True)
        self.left_out = LeftOut(config, "modules_to_not_convert")

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        if self._is_left_out(module, tensors):
            return None
        return awq_matrix(module, shape, tensors, self.group_size, self.zero_point)

    def _is_left_out(self, module: str, tensors: Tensors) -> bool:
        if is_head(module) or module in self.left_out:
            return True
        # AutoAWQ leaves out each module with one of the names anywhere in its own, "gate_proj" for "gate" among them.
        return any(name in module for name in self.left_out.names) and not tensors.has(f"{module}.qweight")


def awq_matrix(
    module: str, shape: tuple[int, int], tensors: Tensors, group_size: int, zero_point: bool
) -> QuantizedMatrix:
    """Return a module's weight [N, K], with groups of `group_size` columns (-1: whole rows) and maybe zero points."""
    n, k = shape
    if n % 8:
        refuse_module(module, shape, "4-bit numbers in 32-bit words")
    size = k if group_size == -1 else group_size
    groups = groups_of(k, size, module)
    q = _columns(tensors.take(f"{module}.qweight", (k, n // 8), torch.int32))
    scale = checked_scale(tensors.take(f"{module}.scales", (groups, n)), f"{module}.scales").t().contiguous()
    z = None
    if zero_point:
        stored = tensors.take(f"{module}.qzeros", (groups, n // 8), torch.int32)
        z = _columns(stored).to(torch.int16) - 8
    else:
        tensors.drop(f"{module}.qzeros")
    values = (q.to(torch.int8) - 8).contiguous()
    return QuantizedMatrix(values, scale, (1, size), 4, "float", z)


def _columns(words: Tensor) -> Tensor:
    """Unpack words, int32 [rows, N / 8], to numbers, uint8 [N, rows]."""
    numbers = unpack(words, 4, 1)
    return numbers.view(len(numbers), -1, 8)[:, :, _INDEX_IN_WORD].flatten(1).t()
