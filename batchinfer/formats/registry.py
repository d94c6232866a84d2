"""Choosing a checkpoint's format by its `quantization_config`. It is never guessed from tensor names."""

from collections.abc import Callable
from typing import Any, Protocol

from batchinfer.formats.auto_round import AutoRound
from batchinfer.formats.awq import AWQ
from batchinfer.formats.bitsandbytes import BitsAndBytes
from batchinfer.formats.compressed_tensors import CompressedTensors
from batchinfer.formats.fp8 import FP8
from batchinfer.formats.gptq import GPTQ
from batchinfer.formats.matrix import QuantizedMatrix, Tensors
from batchinfer.formats.mxfp4 import MXFP4


class Format(Protocol):
    """A way of storing quantized matrices in a checkpoint."""

    name: str  # for the report
    eight_bit_inputs: frozenset[str]  # types of 8-bit inputs (int8, fp8) that the weights were made for
    for_cpu_alone: bool  # whether no kernel of a GPU multiplies the weights, which a CPU expands at load

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized. Raises `ValueError` if it is damaged."""
        ...


_FORMATS: dict[str, Callable[[dict[str, Any]], Format]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "awq": AWQ,
    "auto-round": AutoRound,
    "fp8": FP8,
    "bitsandbytes": BitsAndBytes,
    "mxfp4": MXFP4,
}


def checkpoint_format(config: Any) -> Format:
    """Return the format for a `quantization_config`. Raises `ValueError` naming a field that is not supported."""
    if not isinstance(config, dict):
        raise ValueError(f"config.json: quantization_config is a {type(config).__name__}; expected an object")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _FORMATS:
        raise ValueError(
            f"config.json: quantization_config: quant_method is {method!r}; supported are {', '.join(_FORMATS)}: take "
            "another checkpoint of the model, or its floating-point one and --quantization w8a8-int8"
        )
    return _FORMATS[method](config)


def refuse_on_gpu(form: Format | None) -> None:
    """Raise `ValueError` if a checkpoint's format runs on a CPU alone."""
    if form is not None and form.for_cpu_alone:
        raise ValueError(
            f"quantization: the checkpoint is {form.name}, for which there is no kernel on a GPU yet: take an FP8, "
            "AWQ, GPTQ or pack-quantized checkpoint of the model, or --device cpu"
        )
