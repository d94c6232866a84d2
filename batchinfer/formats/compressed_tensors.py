"""compressed-tensors checkpoints (`quant_method: compressed-tensors`), as llm-compressor and this project write them.

`config_groups` says which modules are quantized and how. A module's format is the `format` of its group, or else that
of the whole config:
- pack-quantized: `weight_packed` is int32 [N, K * bits / 32] and holds q + 2^(bits - 1); `weight_scale` is [N, G];
  `weight_shape` is [2]. Asymmetric weights have `weight_zero_point`, int32 [ceil(N * bits / 32), G], packed along N
  with the same offset. Reordered columns have `weight_g_idx` [K].
- int-quantized: `weight` is int8 [N, K].
- float-quantized: `weight` is float8_e4m3fn [N, K].
In the last two, `weight_scale` is one number, [N, 1], or one number per block of rows and columns. Every scale is a
multiplier.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchinfer.formats.matrix import QuantizedMatrix, Tensors, checked_groups, checked_scale, groups_of
from batchinfer.formats.pack import unpack

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
STRATEGIES = ("tensor", "channel", "group", "block")


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
    activations: str  # float | int8 | fp8
    static_input: bool  # the checkpoint has an `input_scale` for each weight

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
        for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
            value = config.get(key)
            dense = key == "sparsity_config" and isinstance(value, dict) and value.get("format") == "dense"
            if value and not dense:
                raise ValueError(
                    f"config.json: quantization_config: {key} is not supported; take a checkpoint without it"
                )
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ValueError(f"config.json: quantization_config: config_groups is {groups!r}; expected named groups")
        self.groups = [_group(name, raw, config.get("format")) for name, raw in groups.items()]
        self.ignore = _names(config.get("ignore") or [], "ignore")
        self.eight_bit_inputs = frozenset(g.activations for g in self.groups) - {"float"}
        self.name = "compressed-tensors, " + ", ".join(sorted({f"{g.format} {g.bits} bits" for g in self.groups}))
        if any(group.static_input for group in self.groups):
            self.name += ", its static input scales replaced by per-token scales"

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
        group = self.group(module)
        if group is None:
            return None
        if group.static_input:
            tensors.drop(f"{module}.input_scale")
            tensors.drop(f"{module}.input_zero_point")
        counts, block = group.scale_shape(module, shape)
        name = f"{module}.weight_scale"
        # A single scale for the tensor is stored as a scalar or as a vector of length 1.
        stored: tuple[int, ...] = counts
        if group.strategy == "tensor" and tensors.shape(name) in ((), (1,)):
            stored = tensors.shape(name)
        scale = checked_scale(tensors.take(name, stored), name).view(counts)
        if group.format == FLOAT:
            values = tensors.take(f"{module}.weight", shape, torch.float8_e4m3fn)
            return QuantizedMatrix(values, scale, block, 8, group.activations)
        zero_point = group_of = None
        if group.format == INT:
            values = tensors.take(f"{module}.weight", shape, torch.int8)
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
        return QuantizedMatrix(values, scale, block, group.bits, group.activations, zero_point, group_of)

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


def _signed(numbers: Tensor, bits: int) -> Tensor:
    """Return int8 numbers from numbers that were stored with 2^(bits - 1) added."""
    return numbers.to(torch.int16).sub_(1 << (bits - 1)).to(torch.int8)


def _group(name: str, raw: Any, format_of_all: Any) -> Group:
    where = f"config.json: quantization_config: config_groups: {name}"
    if not isinstance(raw, dict) or not isinstance(raw.get("weights"), dict):
        raise ValueError(f"{where}: expected targets and weights")
    weights, form = raw["weights"], raw.get("format") or format_of_all
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    known = {PACKED: ("int", (4, 8)), INT: ("int", (8,)), FLOAT: ("float", (8,))}
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
    activations = raw.get("input_activations")
    return Group(
        targets=_names(raw.get("targets") or [], f"config_groups: {name}: targets"),
        format=form,
        bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        block=(block[0], block[1]),
        activations=_activations(where, activations),
        static_input=isinstance(activations, dict) and not activations.get("dynamic", False),
    )


def _activations(where: str, raw: Any) -> str:
    if not raw:
        return "float"
    if not isinstance(raw, dict) or raw.get("num_bits") != 8 or raw.get("type", "int") not in ("int", "float"):
        raise ValueError(f"{where}: input_activations is {raw!r}; supported are 8 bits, int or float")
    return "fp8" if raw.get("type") == "float" else "int8"


def _names(raw: Any, field: str) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(name, str) for name in raw):
        raise ValueError(f"config.json: quantization_config: {field} is {raw!r}; expected a list of names")
    for name in raw:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise ValueError(
                    f"config.json: quantization_config: {field}: {name!r} is not a regular expression: {error}"
                ) from None
    return tuple(raw)


def _rank(module: str, names: tuple[str, ...]) -> int | None:
    """Rank how names refer to a module: 0 by its name, 1 by a pattern after "re:", 2 by its class, None not at all.

    The class of every module here is Linear.
    """
    if module in names:
        return 0
    if any(name.startswith("re:") and re.match(name[3:], module) for name in names):
        return 1
    return 2 if "Linear" in names else None
