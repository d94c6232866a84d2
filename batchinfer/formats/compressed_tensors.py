"""compressed-tensors checkpoints (`quant_method: compressed-tensors`), as llm-compressor and this project write them.

`config_groups` says which modules are quantized and how. A module's format is the `format` of its group, or else that
of the whole config:
- pack-quantized: `weight_packed` is int32 [N, K * bits / 32] and holds q + 2^(bits - 1); `weight_scale` is [N, G];
  `weight_shape` is [2]. Asymmetric weights have `weight_zero_point`, int32 [ceil(N * bits / 32), G], packed along N
  with the same offset. Reordered columns have `weight_g_idx` [K].
- int-quantized: `weight` is int8 [N, K], numbers of 4 bits included.
- float-quantized: `weight` is float8_e4m3fn [N, K].
In the last two, `weight_scale` is one number, [N, 1], [N, G], or one number per block of rows and columns. Every scale
is a multiplier. Inputs with a static scale have `input_scale`, one number for each module.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.formats.cache_scales import LEFT_ASIDE, drop_scales_of_keys
from batchinfer.formats.fields import names, pattern
from batchinfer.formats.matrix import (
    QuantizedMatrix,
    Tensors,
    checked_groups,
    checked_input_scale,
    checked_scale,
    groups_of,
)
from batchinfer.formats.pack import unpack
from batchinfer.kernels.float8_inputs import InputScales

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
STRATEGIES = ("tensor", "channel", "group", "block")
FOLDED = ("weight_input", "weight_output")
"""Places of a transform that is multiplied into the weights before they are stored; others act when a model runs."""


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a group of modules are rounded to, and which of them share a scale."""

    kind: str = "float"  # float | int8 | fp8
    static: bool = False  # one scale for all, which the checkpoint has as `input_scale`
    columns: int = 0  # columns of a row that share a scale; 0: all of them
    of_batch: bool = False  # one scale for all rows of a batch


@dataclass(frozen=True)
class Group:
    """One entry of `config_groups`: the settings of a group of modules."""

    targets: tuple[str, ...]
    format: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int]
    inputs: Inputs

    def scale_shape(self, module: str, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return ((rows, columns) of the scales' tensor, (rows, columns) of the weight that share a scale)."""
        n, k = shape
        if self.strategy == "tensor":
            return (1, 1), (n, k)
        if self.strategy == "channel":
            return (n, 1), (1, k)
        if self.strategy == "group":
            return (n, groups_of(k, self.group_size, module)), (1, self.group_size)
        rows, columns = self.block
        return (-(-n // rows), -(-k // columns)), self.block


class CompressedTensors:
    """The format of a checkpoint, from its `quantization_config`. Raises `ValueError` for settings not supported."""

    def __init__(self, config: dict[str, Any]) -> None:
        sparsity = config.get("sparsity_config")
        if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            raise ValueError(
                "config.json: quantization_config: sparsity_config is not supported; take a checkpoint without it"
            )
        _refuse_transforms(config.get("transform_config"))
        self.scales_of_keys = _scales_of_keys(config.get("kv_cache_scheme"))
        groups = config.get("config_groups") or {}
        if not isinstance(groups, dict) or not (groups or self.scales_of_keys):
            raise ValueError(f"config.json: quantization_config: config_groups is {groups!r}; expected named groups")
        self.groups = [_group(name, raw, config.get("format")) for name, raw in groups.items()]
        self.ignore = _names(config, "ignore")
        self.eight_bit_inputs = frozenset(g.inputs.kind for g in self.groups) - {"float"}
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
        ranked = [(rank, group) for group in self.groups if (rank := _rank(module, group.targets)) is not None]
        if not ranked or _rank(module, self.ignore) is not None:
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
        scale = checked_scale(tensors.take(name, stored), name).view(counts)
        if group.format == FLOAT:
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


def _group(name: str, raw: Any, format_of_all: Any) -> Group:
    where = f"config.json: quantization_config: config_groups: {name}"
    if not isinstance(raw, dict) or not isinstance(raw.get("weights"), dict):
        raise ValueError(f"{where}: expected targets and weights")
    weights, form = raw["weights"], raw.get("format") or format_of_all
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    known = {PACKED: ("int", (4, 8)), INT: ("int", (4, 8)), FLOAT: ("float", (8,))}
    if not isinstance(form, str) or form not in known:
        raise ValueError(f"{where}: format is {form!r}; supported are {', '.join(known)}")
    if kind != known[form][0] or bits not in known[form][1]:
        raise ValueError(f"{where}: weights of {bits} bits and type {kind!r} in {form} are not supported")
    if strategy is None:
        strategy = "group" if weights.get("group_size") else "tensor"
    if strategy not in STRATEGIES:
        raise ValueError(f"{where}: strategy is {strategy!r}; supported are {', '.join(STRATEGIES)}")
    if weights.get("dynamic"):
        raise ValueError(f"{where}: weights with dynamic scales are not supported")
    group_size = weights.get("group_size") or 0
    if strategy == "group" and not (type(group_size) is int and group_size > 0):
        raise ValueError(f"{where}: group_size is {group_size!r}; it must be a positive whole number")
    block = weights.get("block_structure") or [1, 1]
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise ValueError(f"{where}: block_structure is {block!r}; expected two positive whole numbers")
    symmetric = bool(weights.get("symmetric", True))
    if form == FLOAT and not symmetric:
        raise ValueError(f"{where}: floating-point weights with a zero point are not supported")
    return Group(
        targets=_names(raw, "targets", f"config_groups: {name}: "),
        format=form,
        bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        block=(block[0], block[1]),
        inputs=_inputs(where, raw.get("input_activations")),
    )


def _inputs(where: str, raw: Any) -> Inputs:
    if not raw:
        return Inputs()
    if not isinstance(raw, dict) or raw.get("num_bits") != 8 or raw.get("type", "int") not in ("int", "float"):
        raise ValueError(f"{where}: input_activations is {raw!r}; supported are 8 bits, int or float")
    columns, static = raw.get("group_size") or 0, not raw.get("dynamic", False)
    if type(columns) is not int or columns < -1 or (raw.get("strategy") == "group" and columns < 1):
        raise ValueError(f"{where}: input_activations: group_size is {columns!r}; it must be a positive whole number")
    return Inputs(
        kind="fp8" if raw.get("type") == "float" else "int8",
        static=static,
        columns=max(columns, 0),
        of_batch=not static and not columns and raw.get("strategy") in (None, "tensor"),
    )


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
                "config.json: quantization_config: transform_config has transforms that act when the model runs; "
                f"supported are those at {' and '.join(FOLDED)}, which are in the weights: take a checkpoint without "
                "others"
            )


def _scales_of_keys(raw: Any) -> bool:
    """Return whether the checkpoint has scales of keys and values. They are not needed: see `kernels/kv_cache.py`."""
    if raw and not isinstance(raw, dict):
        raise ValueError(f"config.json: quantization_config: kv_cache_scheme is {raw!r}; expected an object")
    return bool(raw)


def _names(config: dict[str, Any], key: str, where: str = "") -> tuple[str, ...]:
    found = names(config, key)
    for name in found:
        if name.startswith("re:"):
            pattern(name[3:], name, where + key)
    return found


def _rank(module: str, targets: tuple[str, ...]) -> int | None:
    """Rank how targets refer to a module: 0 by its name, 1 by a pattern after "re:", 2 by its class, None not at all.

    The class of every module here is Linear.
    """
    if module in targets:
        return 0
    if any(name.startswith("re:") and re.match(name[3:], module) for name in targets):
        return 1
    return 2 if "Linear" in targets else None
