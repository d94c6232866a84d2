"""Writing checkpoints in the compressed-tensors format, which transformers, vLLM and SGLang read as well."""

from typing import Any

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix
from batchinfer.formats.pack import pack
from batchinfer.formats.scheme import WeightScheme


def stored_tensors(matrix: QuantizedMatrix, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors to store for a module's matrix; their names follow the module's name."""
    scale = matrix.scale.to(scale_dtype)
    if matrix.activations != "float" and matrix.bits == 8:
        return {"weight": matrix.values, "weight_scale": scale}
    numbers = matrix.values.to(torch.int16).add_(1 << (matrix.bits - 1))
    return {
        "weight_packed": pack(numbers, matrix.bits, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(matrix.values.shape),
    }


def quantization_config(scheme: WeightScheme, ignore: list[str]) -> dict[str, Any]:
    """Return the value of `quantization_config` in config.json."""
    kind = "float" if scheme.floating else "int"
    form = "pack-quantized" if scheme.activations == "float" or scheme.bits < 8 else f"{kind}-quantized"
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": kind, "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
    inputs = None
    if scheme.activations != "float":
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": form,  # compressed-tensors guesses a format by the types unless the group has one
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
