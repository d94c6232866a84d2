"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them (`quant_method: gptq`).

`qweight` is int32 [K * bits / 32, N], packed along K; `qzeros` is int32 [G, N * bits / 32], packed along N; `scales` is
[G, N]; `g_idx` is int32 [K]. W[n, k] = scales[g, n] * (q[k, n] - z[g, n]) with g = g_idx[k]. Version 1 stores z - 1.
`dynamic` of GPTQModel has other settings by module: the first pattern that a module's name begins with counts. "-:"
before it leaves the module in floating point, "+:" or nothing changes what is named.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from batchinfer.formats.fields import (
    WHERE,
    flag,
    one_of,
    pattern,
    refuse_module,
    refuse_unknown,
    settings_by_name,
    whole,
)
from batchinfer.formats.left_out import is_head
from batchinfer.formats.matrix import QuantizedMatrix, Tensors, checked_groups, checked_scale, groups_of
from batchinfer.formats.pack import unpack

PACKING = {"bits", "group_size", "sym"}
KNOWN = PACKING | {
    "lm_head",
    "checkpoint_format",
    "format",
    "dynamic",
    "modules_in_block_to_quantize",
    "pack_dtype",
    "data_type",
}


@dataclass(frozen=True)
class Packing:
    """How the numbers of a module are packed."""

    bits: int
    group_size: int  # -1: whole rows
    symmetric: bool
    offset: int  # what is to be added to stored zero points

    def changed(self, settings: dict[str, Any], where: str = WHERE) -> "Packing":
        """Return the packing with other settings. Raises `ValueError` for settings that are not supported."""
        refuse_unknown(settings, PACKING, where)
        given = {"bits": self.bits, "group_size": self.group_size, "sym": self.symmetric, **settings}
        if (bits := whole(given, "bits", where)) not in (4, 8):
            raise ValueError(
                f"{where}: bits is {bits}; GPTQ is read with 4 or 8 bits: quantize the model anew, or take another "
                "checkpoint of it"
            )
        return replace(
            self, bits=bits, group_size=whole(given, "group_size", where), symmetric=flag(given, "sym", True, where)
        )

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix:
        """Return the module's weight [N, K]."""
        n, k = shape
        a_word = 32 // self.bits
        if n % a_word or k % a_word:
            refuse_module(module, shape, f"{self.bits}-bit numbers in 32-bit words")
        size = k if self.group_size == -1 else self.group_size
        groups = groups_of(k, size, module)
        half = 1 << (self.bits - 1)
        q = unpack(tensors.take(f"{module}.qweight", (k // a_word, n), torch.int32), self.bits, 0).t()
        scale = checked_scale(tensors.take(f"{module}.scales", (groups, n)), f"{module}.scales").t()
        zero_point = None
        if self.symmetric:
            # The zero points of symmetric weights are known, and some files store wrong ones.
            tensors.drop(f"{module}.qzeros")
        else:
            z = unpack(tensors.take(f"{module}.qzeros", (groups, n // a_word), torch.int32), self.bits, 1).t()
            # Version 1 wraps around: a zero point of 0 is stored as the largest number.
            z = (z.to(torch.int16) + self.offset) % (1 << self.bits) if self.offset else z.to(torch.int16)
            zero_point = z - half
        group_of = None
        if tensors.has(f"{module}.g_idx"):
            index = checked_groups(
                tensors.take(f"{module}.g_idx", (k,), torch.int32, torch.int64), groups, f"{module}.g_idx"
            )
            if not index.equal(torch.arange(k) // size):
                group_of = index
        values = (q.to(torch.int16) - half).to(torch.int8).contiguous()
        return QuantizedMatrix(values, scale.contiguous(), (1, size), self.bits, "float", zero_point, group_of)


class GPTQ:
    """A GPTQ checkpoint's format, from its `quantization_config`. Raises `ValueError` for settings not supported."""

    eight_bit_inputs: frozenset[str] = frozenset()
    for_cpu_alone = False

    def __init__(self, config: dict[str, Any]) -> None:
        refuse_unknown(config, KNOWN)
        remedy = "convert the checkpoint with GPTQModel, or take another one"
        key = "checkpoint_format" if config.get("checkpoint_format") else "format"
        version = one_of(config, key, ("gptq", "gptq_v2"), remedy)
        one_of(config, "pack_dtype", ("int32",), remedy)
        one_of(config, "data_type", ("int",), remedy)
        base = Packing(bits=4, group_size=-1, symmetric=True, offset=1 if version == "gptq" else 0)
        stated = {"bits": config.get("bits"), "group_size": config.get("group_size"), "sym": config.get("sym", True)}
        self.packing = base.changed(stated)
        self.head = flag(config, "lm_head", False)
        self.rules = [_rule(name, given, self.packing) for name, given in settings_by_name(config, "dynamic").items()]
        self.within = _modules_in_block(config.get("modules_in_block_to_quantize"))
        bits = sorted({p.bits for p in (self.packing, *(packing for _, packing in self.rules)) if p is not None})
        self.name = f"GPTQ, {' and '.join(map(str, bits))} bits"

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        packing = self._packing(module)
        return None if packing is None else packing.matrix(module, shape, tensors)

    def _packing(self, module: str) -> Packing | None:
        if is_head(module):
            if not self.head:
                return None
        elif self.within and not module.endswith(self.within):
            return None
        return next((packing for name, packing in self.rules if name.match(module)), self.packing)


def _rule(name: str, settings: dict[str, Any], base: Packing) -> tuple[re.Pattern[str], Packing | None]:
    """Return (the pattern of modules' names, their packing) of an entry of `dynamic`; None: in floating point."""
    sign = name[:2] if name.startswith(("+:", "-:")) else ""
    text = name.removeprefix(sign)
    packing = None if sign == "-:" else base.changed(settings, f"{WHERE}: dynamic: {name}")
    return pattern(text, name, "dynamic"), packing


def _modules_in_block(raw: Any) -> tuple[str, ...]:
    """Return the ends of the names of all quantized modules of a layer; (): all modules are quantized."""
    lists = raw or []
    if not isinstance(lists, list) or not all(isinstance(entry, str | list) for entry in lists):
        raise ValueError(f"{WHERE}: modules_in_block_to_quantize is {raw!r}; expected lists of names")
    found = [name for entry in lists for name in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(name, str) for name in found):
        raise ValueError(f"{WHERE}: modules_in_block_to_quantize is {raw!r}; expected lists of names")
    return tuple(found)
