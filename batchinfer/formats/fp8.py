"""FP8 checkpoints in the Hugging Face layout (`quant_method: fp8`), as DeepSeek, Qwen and Mistral publish them.

`weight` is float8_e4m3fn [N, K]. `weight_scale_inv` is one number, or [ceil(N / rows), ceil(K / columns)] with blocks,
and, despite its name, a multiplier. Inputs are rounded to float8_e4m3fn: with `activation_scheme` static by one scale
a module, `activation_scale`, else with a scale for each row, or for each row and the columns of a block. Other tools
call the scales `weight_scale` and `input_scale`.
"""

from typing import Any

import torch

from batchinfer.formats.cache_scales import LEFT_ASIDE, drop_scales_of_keys
from batchinfer.formats.fields import WHERE, one_of, refuse_unknown
from batchinfer.formats.left_out import LeftOut, is_head
from batchinfer.formats.matrix import QuantizedMatrix, Tensors, checked_input_scale, checked_scale, one_number
from batchinfer.kernels.float8_inputs import InputScales

KNOWN = {
    "weight_block_size",
    "activation_scheme",
    "modules_to_not_convert",
    "ignored_layers",
    "fmt",
    "scale_fmt",
    "expert_dtype",
    "kv_cache_scheme",
    "dequantize",
}


class FP8:
    """An FP8 checkpoint's format, from its `quantization_config`. Raises `ValueError` for settings not supported."""

    for_cpu_alone = False

    def __init__(self, config: dict[str, Any]) -> None:
        refuse_unknown(config, KNOWN)
        another = "take another checkpoint of the model"
        for key, only in (("fmt", "e4m3"), ("scale_fmt", "float"), ("expert_dtype", "fp8")):
            one_of(config, key, (only,), another)
        self.block = _block(config.get("weight_block_size"))
        self.static = one_of(config, "activation_scheme", ("dynamic", "static"), another) == "static"
        if self.static and self.block is not None:
            raise ValueError(
                f"{WHERE}: activation_scheme is 'static' with weight_block_size {list(self.block)}; static scales of "
                f"inputs are read where a tensor has one scale: {another}"
            )
        self.left_out = LeftOut(config, "modules_to_not_convert", "ignored_layers")
        self.scales_of_keys = bool(config.get("kv_cache_scheme"))
        # Products of 8-bit rows take a scale for each row of the weight, and so one for all, but no blocks.
        self.eight_bit_inputs = frozenset({"fp8"} if self.block is None else ())
        self.name = "FP8 with a scale a tensor" if self.block is None else "block FP8"
        if self.scales_of_keys:
            self.name += LEFT_ASIDE

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        if self.scales_of_keys:
            drop_scales_of_keys(module, tensors)
        name = _stored(tensors, f"{module}.weight_scale_inv", f"{module}.weight_scale")
        # A head that no name leaves out is quantized by transformers alone: the file decides.
        if module in self.left_out or (is_head(module) and not tensors.has(name)):
            return None
        values = tensors.take(f"{module}.weight", shape, torch.float8_e4m3fn)
        if self.block is None:
            scale = checked_scale(one_number(name, tensors).view(1, 1), name)
            static = None
            if self.static:
                static = checked_input_scale(
                    _stored(tensors, f"{module}.activation_scale", f"{module}.input_scale"), tensors
                )
            return QuantizedMatrix(values, scale, shape, 8, "fp8", inputs=InputScales(static=static))
        (n, k), (rows, columns) = shape, self.block
        scale = checked_scale(tensors.take(name, (-(-n // rows), -(-k // columns))), name)
        return QuantizedMatrix(values, scale, self.block, 8, "fp8", inputs=InputScales(columns))


def _block(raw: Any) -> tuple[int, int] | None:
    """Return the (rows, columns) of a block; None: a tensor has one scale."""
    if raw is None:
        return None
    if not (isinstance(raw, list) and len(raw) == 2 and all(type(b) is int and 0 < b <= 1 << 16 for b in raw)):
        raise ValueError(f"{WHERE}: weight_block_size is {raw!r}; expected two whole numbers, or null")
    return raw[0], raw[1]


def _stored(tensors: Tensors, name: str, other: str) -> str:
    """Return `other` if there is a tensor of this name, else `name`."""
    return other if tensors.has(other) else name
