"""Block FP8 checkpoints in the Hugging Face layout (`quant_method: fp8`, as DeepSeek-V3 and Qwen3 publish them).

`weight` is float8_e4m3fn [N, K]. `weight_scale_inv` is [ceil(N / rows), ceil(K / columns)] and, despite its name, a
multiplier. Inputs are rounded to float8_e4m3fn with one scale for each row and the columns of a block.
"""

from typing import Any

import torch

from batchinfer.formats.left_out import LeftOut
from batchinfer.formats.matrix import QuantizedMatrix, Tensors, checked_scale
from batchinfer.kernels.float8_inputs import InputScales


class BlockFP8:
    """A block FP8 checkpoint's format, from its `quantization_config`. Raises `ValueError` if it is not supported."""

    name = "block FP8"
    eight_bit_inputs: frozenset[str] = frozenset()

    def __init__(self, config: dict[str, Any]) -> None:
        block = config.get("weight_block_size")
        if not (
            isinstance(block, list) and len(block) == 2 and all(type(b) is int and 0 < b <= 1 << 16 for b in block)
        ):
            whole = " (FP8 with one scale for a whole tensor or row)" if block is None else ""
            raise ValueError(
                f"config.json: quantization_config: weight_block_size is {block!r}{whole}; expected two whole numbers"
            )
        if (scheme := config.get("activation_scheme", "dynamic")) != "dynamic":
            raise ValueError(
                f"config.json: quantization_config: activation_scheme is {scheme!r}; supported is 'dynamic'"
            )
        self.block = (block[0], block[1])
        self.left_out = LeftOut(config, "modules_to_not_convert", "ignored_layers")

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        if module in self.left_out:
            return None
        (n, k), (rows, columns) = shape, self.block
        values = tensors.take(f"{module}.weight", shape, torch.float8_e4m3fn)
        name = f"{module}.weight_scale" if tensors.has(f"{module}.weight_scale") else f"{module}.weight_scale_inv"
        scale = checked_scale(tensors.take(name, (-(-n // rows), -(-k // columns))), name)
        return QuantizedMatrix(values, scale, self.block, 8, "fp8", inputs=InputScales(columns))
