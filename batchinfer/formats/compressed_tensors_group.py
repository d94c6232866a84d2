"""`Group`: the settings of some modules of a compressed-tensors checkpoint, from an entry of its `config_groups`."""

import re
from dataclasses import dataclass
from typing import Any

from batchinfer.formats.fields import WHERE, names, pattern, refuse_unknown
from batchinfer.formats.matrix import groups_of

PACKED, INT, FLOAT, MXFP8 = "pack-quantized", "int-quantized", "float-quantized", "mxfp8-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
STRATEGIES = ("tensor", "channel", "group", "block")
SCHEME = {"targets", "weights", "input_activations", "format"}
ARGUMENTS = {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"}
OF_OBSERVERS = {"observer", "observer_kwargs", "zp_dtype"}  # fields that say how scales were found


@dataclass(frozen=True)
class Numbers:
    """What a format may hold."""

    kind: str  # int | float
    bits: tuple[int, ...]
    strategies: tuple[str, ...] = STRATEGIES
    group_size: int = 0  # the only one; 0: any


FORMATS = {
    PACKED: Numbers("int", (4, 8)),
    INT: Numbers("int", (4, 8)),
    FLOAT: Numbers("float", (8,)),
    MXFP8: Numbers("float", (8,), ("group",), 32),
    NVFP4: Numbers("float", (4,), ("tensor_group",), 16),
    MXFP4: Numbers("float", (4,), ("group",), 32),
}


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a group of modules are rounded to, and which of them share a scale."""

    kind: str = "float"  # float | int8 | fp8, or one of `matrix.UNROUNDED`
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
        if self.strategy == "block":
            rows, columns = self.block
            return (-(-n // rows), -(-k // columns)), self.block
        return (n, groups_of(k, self.group_size, module)), (1, self.group_size)


def read_group(name: str, raw: Any, format_of_all: Any) -> Group:
    """Read an entry of `config_groups`. Raises `ValueError` naming a field that is not supported."""
    where = f"{WHERE}: config_groups: {name}"
    if not isinstance(raw, dict) or not isinstance(raw.get("weights"), dict):
        raise ValueError(f"{where}: expected targets and weights")
    refuse_unknown(raw, SCHEME, where)
    weights, form = raw["weights"], raw.get("format") or format_of_all
    refuse_unknown(weights, ARGUMENTS | OF_OBSERVERS, f"{where}: weights")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    if not isinstance(form, str) or form not in FORMATS:
        raise ValueError(f"{where}: format is {form!r}; supported are {', '.join(FORMATS)}")
    numbers = FORMATS[form]
    if kind != numbers.kind or bits not in numbers.bits:
        raise ValueError(f"{where}: weights of {bits} bits and type {kind!r} in {form} are not supported")
    if strategy is None:
        strategy = "group" if weights.get("group_size") else "tensor"
    if strategy not in numbers.strategies:
        raise ValueError(f"{where}: strategy is {strategy!r}; supported in {form}: {', '.join(numbers.strategies)}")
    if weights.get("dynamic"):
        raise ValueError(f"{where}: weights with dynamic scales are not supported")
    group_size = weights.get("group_size") or 0
    if strategy == "group" and not (type(group_size) is int and group_size > 0):
        raise ValueError(f"{where}: group_size is {group_size!r}; it must be a positive whole number")
    if numbers.group_size not in (0, group_size):
        raise ValueError(f"{where}: group_size is {group_size!r}; in {form} it must be {numbers.group_size}")
    block = weights.get("block_structure") or [1, 1]
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise ValueError(f"{where}: block_structure is {block!r}; expected two positive whole numbers")
    symmetric = bool(weights.get("symmetric", True))
    if kind == "float" and not symmetric:
        raise ValueError(f"{where}: floating-point weights with a zero point are not supported")
    return Group(
        targets=read_targets(raw, "targets", f"config_groups: {name}: "),
        format=form,
        bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        block=(block[0], block[1]),
        inputs=_inputs(f"{where}: input_activations", raw.get("input_activations")),
    )


def _inputs(where: str, raw: Any) -> Inputs:
    if not raw:
        return Inputs()
    if not isinstance(raw, dict) or (raw.get("num_bits"), raw.get("type", "int")) not in (
        (8, "int"),
        (8, "float"),
        (4, "float"),
    ):
        raise ValueError(f"{where} is {raw!r}; supported are 8 bits, int or float, and 4 bits, float")
    refuse_unknown(raw, ARGUMENTS | OF_OBSERVERS, where)
    columns, static = raw.get("group_size") or 0, not raw.get("dynamic", False)
    if type(columns) is not int or columns < -1 or (raw.get("strategy") == "group" and columns < 1):
        raise ValueError(f"{where}: group_size is {columns!r}; it must be a positive whole number")
    if raw.get("num_bits") == 4:
        return Inputs("nvfp4" if raw.get("strategy") == "tensor_group" else "mxfp4")
    if raw.get("scale_dtype") == "torch.uint8":  # scales that are powers of two
        return Inputs("mxfp8")
    return Inputs(
        kind="fp8" if raw.get("type") == "float" else "int8",
        static=static,
        columns=max(columns, 0),
        of_batch=not static and not columns and raw.get("strategy") in (None, "tensor"),
    )


def read_targets(config: dict[str, Any], key: str, where: str = "") -> tuple[str, ...]:
    """Return the field `key`, names of modules and of classes, and patterns after "re:"."""
    found = names(config, key)
    for name in found:
        if name.startswith("re:"):
            pattern(name[3:], name, where + key)
    return found


def rank(module: str, targets: tuple[str, ...]) -> int | None:
    """Rank how targets refer to a module: 0 by its name, 1 by a pattern after "re:", 2 by its class, None not at all.

    The class of every module here is Linear.
    """
    if module in targets:
        return 0
    if any(name.startswith("re:") and re.match(name[3:], module) for name in targets):
        return 1
    return 2 if "Linear" in targets else None
