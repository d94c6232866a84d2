"""bitsandbytes checkpoints (`quant_method: bitsandbytes`): NF4 and FP4 (Dettmers et al. 2023), and int8.

4 bits: `weight` is uint8 [N * K / 2, 1], row after row, the first number in the high half. A number is a place in
`weight.quant_map`, 16 numbers; `blocksize` numbers in a row share a scale in `weight.absmax`. With double quantization,
`absmax` is uint8, places in `weight.nested_quant_map`; what is there is to be multiplied by the `weight.nested_absmax`
that `nested_blocksize` of them share, and `nested_offset` to be added. `weight.quant_state.bitsandbytes__nf4` (or fp4)
is JSON text, uint8, with the sizes. 8 bits: `weight` is int8 [N, K], `SCB` is [N]. W = weight * SCB / 127.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

from batchinfer.formats.fields import WHERE, flag, one_of, refuse_unknown
from batchinfer.formats.left_out import LeftOut, is_head
from batchinfer.formats.matrix import QuantizedMatrix, Tensors
from batchinfer.formats.pack import unpack

KNOWN = {"load_in_4bit", "load_in_8bit", "llm_int8_skip_modules", "bnb_4bit_quant_type", "bnb_4bit_quant_storage"}
OF_RUNNING = {
    "_load_in_4bit",
    "_load_in_8bit",
    "llm_int8_threshold",
    "llm_int8_enable_fp32_cpu_offload",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",  # the file says it for each module
}


class BitsAndBytes:
    """A bitsandbytes checkpoint's format. Raises `ValueError` for settings that are not supported."""

    eight_bit_inputs: frozenset[str] = frozenset()

    def __init__(self, config: dict[str, Any]) -> None:
        refuse_unknown(config, KNOWN | OF_RUNNING)
        four, eight = (flag(config, f"load_in_{bits}bit", False) for bits in (4, 8))
        if four == eight:
            raise ValueError(
                f"{WHERE}: load_in_4bit is {four} and load_in_8bit is {eight}; one of them must be true, to say how "
                "the weights are stored"
            )
        one_of(config, "bnb_4bit_quant_storage", ("uint8",), "save the model again without bnb_4bit_quant_storage")
        self.four_bits = self.for_cpu_alone = four
        self.left_out = LeftOut(config, "llm_int8_skip_modules")
        kind = one_of(config, "bnb_4bit_quant_type", ("fp4", "nf4"), "take another checkpoint of the model")
        self.name = f"bitsandbytes {kind}" if four else "bitsandbytes int8, its inputs left in floating point"

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        if module in self.left_out:
            return None
        # A head that no name leaves out need not be quantized: the file decides.
        if is_head(module) and not any(tensors.has(f"{module}.{name}") for name in ("SCB", "weight.absmax")):
            return None
        return _four_bits(module, shape, tensors) if self.four_bits else _eight_bits(module, shape, tensors)


def _eight_bits(module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix:
    n, k = shape
    tensors.drop(f"{module}.weight_format")
    values = tensors.take(f"{module}.weight", shape, torch.int8)
    scale = tensors.take(f"{module}.SCB", (n,)).float() / 127
    return QuantizedMatrix(values, scale[:, None], (1, k), 8)


def _four_bits(module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix:
    n, k = shape
    name = f"{module}.weight"
    state = _state(name, shape, tensors)
    block = _size(state, "blocksize", name)
    absmax = _scales(name, -(-n * k // block), state, tensors)
    octets = tensors.take(name, (-(-n * k // 2), 1), torch.uint8)
    values = unpack(octets, 4, 1).flip(1).flatten()[: n * k].view(shape)
    # Blocks may go over the ends of rows: then their parts have the same scale.
    size = math.gcd(block, k)
    scale = absmax.repeat_interleave(block // size)[: n * k // size].view(n, k // size)
    book = tensors.take(f"{name}.quant_map", (16,)).float()
    return QuantizedMatrix(values, scale, (1, size), 4, code_book=book)


def _scales(name: str, count: int, state: dict[str, Any], tensors: Tensors) -> Tensor:
    """Return the scales of `count` blocks, float32."""
    if not tensors.has(f"{name}.nested_absmax"):
        return tensors.take(f"{name}.absmax", (count,)).float()
    block, offset = _size(state, "nested_blocksize", name), state.get("nested_offset")
    if not isinstance(offset, float | int) or not math.isfinite(offset):
        raise ValueError(f"tensor {name}: nested_offset is {offset!r}; it must be a number: the checkpoint is damaged")
    places = tensors.take(f"{name}.absmax", (count,), torch.uint8).int()
    book = tensors.take(f"{name}.nested_quant_map", (256,)).float()
    largest = tensors.take(f"{name}.nested_absmax", (-(-count // block),)).float()
    return book[places] * largest.repeat_interleave(block)[:count] + offset


def _state(name: str, shape: tuple[int, int], tensors: Tensors) -> dict[str, Any]:
    """Return the sizes of a matrix of 4 bits. Raises `ValueError` if they are damaged or of another shape."""
    places = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
    where = next((place for place in places if tensors.has(place)), None)
    if where is None:
        raise ValueError(f"tensor {name} has no quant_state of bitsandbytes: it is not stored in 4 bits, or damaged")
    text = bytes(tensors.take(where, tensors.shape(where), torch.uint8).flatten().tolist())
    try:
        state = json.loads(text)
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"tensor {where} is not a JSON object: the checkpoint is damaged")
    if state.get("shape") != list(shape):
        raise ValueError(f"tensor {where} says {state.get('shape')}; config.json asks for {list(shape)}")
    return state


def _size(state: dict[str, Any], key: str, name: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 0 < value <= 1 << 16:
        raise ValueError(f"tensor {name}: {key} is {value!r}; it must be a positive number: the checkpoint is damaged")
    return value
