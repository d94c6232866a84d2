"""compressed-tensors checkpoints (`quant_method: compressed-tensors`), as llm-compressor and this project write them.

`config_groups` says which modules are quantized and how. A module's format is the `format` of its group, or else that
of the whole config:
- pack-quantized: `weight_packed` is int32 [N, K * bits / 32] and holds q + 2^(bits - 1); `weight_scale` is [N, G];
  `weight_shape` is [2]. Asymmetric weights have `weight_zero_point`, int32 [ceil(N * bits / 32), G], packed along N
  with the same offset. Reordered columns have `weight_g_idx` [K].
- int-quantized: `weight` is int8 [N, K], numbers of 4 bits included.
- float-quantized and mxfp8-quantized: `weight` is float8_e4m3fn [N, K].
- nvfp4-pack-quantized and mxfp4-pack-quantized: see `formats/fp4.py`.
For int and float, `weight_scale` is one number, [N, 1], [N, G], or one number per block of rows and columns; mxfp8 has
the exponents of powers of two. Every scale is a multiplier. Inputs with a static scale have `input_scale`, one number
for each module.
"""

from typing import Any

import torch
from torch import Tensor

from batchinfer.formats.cache_scales import LEFT_ASIDE, drop_scales_of_keys
from batchinfer.formats.compressed_tensors_group import (
    FLOAT,
    INT,
    MXFP4,
    MXFP8,
    NVFP4,
    Group,
    rank,
    read_group,
    read_targets,
)
from batchinfer.formats.fields import WHERE, refuse_unknown
from batchinfer.formats.fp4 import mxfp4, nvfp4, powers_of_two
from batchinfer.formats.matrix import (
    QuantizedMatrix,
    Tensors,
    checked_groups,
    checked_input_scale,
    checked_scale,
)
from batchinfer.formats.pack import unpack
from batchinfer.kernels.float8_inputs import InputScales

KNOWN = {"config_groups", "format", "ignore", "kv_cache_scheme", "sparsity_config", "transform_config"}
OF_LIBRARY = {"quantization_status", "global_compression_ratio", "version", "run_compressed", "dequantize"}
FOLDED = ("weight_input", "weight_output")
"""Places of a transform that is multiplied into the weights before they are stored; others act when a model runs."""


class CompressedTensors:
    """The format of a checkpoint, from its `quantization_config`. Raises `ValueError` for settings not supported."""

    def __init__(self, config: dict[str, Any]) -> None:
        refuse_unknown(config, KNOWN | OF_LIBRARY)
        sparsity = config.get("sparsity_config")
        if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            raise ValueError(f"{WHERE}: sparsity_config is not supported; take a checkpoint without it")
        _refuse_transforms(config.get("transform_config"))
        self.scales_of_keys = _scales_of_keys(config.get("kv_cache_scheme"))
        groups = config.get("config_groups") or {}
        if not isinstance(groups, dict) or not (groups or self.scales_of_keys):
            raise ValueError(f"{WHERE}: config_groups is {groups!r}; expected named groups")
        self.groups = [read_group(name, raw, config.get("format")) for name, raw in groups.items()]
        self.ignore = read_targets(config, "ignore")
        self.eight_bit_inputs = frozenset(g.inputs.kind for g in self.groups) & {"int8", "fp8"}
        self.for_cpu_alone = any(group.format in (NVFP4, MXFP4) for group in self.groups)
        kinds = sorted({f"{g.format} {g.bits} bits" for g in self.groups}) or ["no weights quantized"]
        self.name = "compressed-tensors, " + ", ".join(kinds)
        if any(group.inputs.of_batch for group in self.groups):
            self.name += ", its inputs' scale of a whole batch replaced by per-token scales"
        if self.scales_of_keys:
            self.name += LEFT_ASIDE

    def group(self, module: str) -> Group | None:
        """Return the settings of a module, or None if it is not quantized.

        A group that names the module has precedence over one with a matching pattern, and that over one that names the
        module's class.
        """
        ranked = [(found, group) for group in self.groups if (found := rank(module, group.targets)) is not None]
        if not ranked or rank(module, self.ignore) is not None:
            return None
        return min(ranked, key=lambda entry: entry[0])[1]

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        if self.scales_of_keys:
            drop_scales_of_keys(module, tensors)
        group = self.group(module)
        if group is None:
            return None
        kind = group.inputs.kind
        if group.format == NVFP4:
            return nvfp4(module, shape, tensors, kind)
        if group.format == MXFP4:
            return mxfp4(module, shape, tensors, kind)
        static = None
        if group.inputs.static:
            tensors.drop(f"{module}.input_zero_point")
            static = checked_input_scale(f"{module}.input_scale", tensors)
        inputs = InputScales(group.inputs.columns, static)
        counts, block = group.scale_shape(module, shape)
        name = f"{module}.weight_scale"
        # A single scale for the tensor is stored as a scalar or as a vector of length 1.
        stored: tuple[int, ...] = counts
        if group.strategy == "tensor" and tensors.shape(name) in ((), (1,)):
            stored = tensors.shape(name)
        if group.format == MXFP8:
            scale = powers_of_two(name, counts, tensors)
        else:
            scale = checked_scale(tensors.take(name, stored), name).view(counts)
        if group.format in (FLOAT, MXFP8):
            values = tensors.take(f"{module}.weight", shape, torch.float8_e4m3fn)
            return QuantizedMatrix(values, scale, block, 8, kind, inputs=inputs)
        zero_point = group_of = None
        if group.format == INT:
            values = _in_range(tensors.take(f"{module}.weight", shape, torch.int8), group.bits, f"{module}.weight")
            if not group.symmetric:
                zero_point = (
                    tensors.take(f"{module}.weight_zero_point", stored, torch.int8).view(counts).to(torch.int16)
                )
            elif tensors.has(f"{module}.weight_zero_point"):
                tensors.drop(f"{module}.weight_zero_point")
        else:
            values = self._packed(module, shape, group, tensors)
            if not group.symmetric:
                zero_point = _packed_zero_point(module, counts, group.bits, tensors)
            if tensors.has(f"{module}.weight_g_idx"):
                index = tensors.take(f"{module}.weight_g_idx", (shape[1],), torch.int32, torch.int64)
                # An index that is all -1 means that columns are in order.
                if not bool((index == -1).all()):
                    group_of = checked_groups(index, counts[1], f"{module}.weight_g_idx")
        return QuantizedMatrix(values, scale, block, group.bits, kind, zero_point, group_of, inputs)

    def _packed(self, module: str, shape: tuple[int, int], group: Group, tensors: Tensors) -> Tensor:
        n, k = shape
        a_word = 32 // group.bits
        name = f"{module}.weight_shape"
        stated = tensors.take(name, (2,), torch.int32, torch.int64).tolist()
        if tuple(stated) != shape:
            raise ValueError(f"tensor {name} says {stated}; config.json asks for {list(shape)}")
        words = tensors.take(f"{module}.weight_packed", (n, -(-k // a_word)), torch.int32)
        return _signed(unpack(words, group.bits, 1)[:, :k], group.bits).contiguous()


def _packed_zero_point(module: str, counts: tuple[int, int], bits: int, tensors: Tensors) -> Tensor:
    n, groups = counts
    words = tensors.take(f"{module}.weight_zero_point", (-(-n * bits // 32), groups), torch.int32)
    return _signed(unpack(words, bits, 0)[:n], bits).to(torch.int16)


def _in_range(values: Tensor, bits: int, name: str) -> Tensor:
    """Return the values. Raises `ValueError` if one of them does not fit into the bits that the config names."""
    most = (1 << (bits - 1)) - 1
    if bits < 8 and not bool(((values >= -most - 1) & (values <= most)).all()):
        raise ValueError(
            f"tensor {name} holds numbers outside {-most - 1} to {most}, which are no numbers of {bits} bits: the "
            "checkpoint is damaged"
        )
    return values


def _signed(numbers: Tensor, bits: int) -> Tensor:
    """Return int8 numbers from numbers that were stored with 2^(bits - 1) added."""
    return numbers.to(torch.int16).sub_(1 << (bits - 1)).to(torch.int8)


def _refuse_transforms(raw: Any) -> None:
    """Raise `ValueError` if a transform acts when the model runs. What is folded into the weights needs nothing."""
    groups = raw.get("config_groups") if isinstance(raw, dict) else None
    schemes = list(groups.values()) if isinstance(groups, dict) else [raw] if raw else []
    for scheme in schemes:
        places = scheme.get("apply") if isinstance(scheme, dict) else None
        if not isinstance(places, list) or not all(
            isinstance(place, dict) and place.get("location") in FOLDED for place in places
        ):
            raise ValueError(
                f"{WHERE}: transform_config has transforms that act when the model runs; "
                f"supported are those at {' and '.join(FOLDED)}, which are in the weights: take a checkpoint without "
                "others"
            )


def _scales_of_keys(raw: Any) -> bool:
    """Return whether the checkpoint has scales of keys and values. They are not needed: see `kernels/kv_cache.py`."""
    if raw and not isinstance(raw, dict):
        raise ValueError(f"{WHERE}: kv_cache_scheme is {raw!r}; expected an object")
    return bool(raw)
