"""AutoRound's own format (`quant_method: auto-round`): modules packed as in GPTQ or AWQ, with settings by module.

`packing_format` names the layout: auto_round:auto_gptq is GPTQ's version 1; auto_round and auto_round:gptqmodel have
zero points as they are (version 2); auto_round:auto_awq is AWQ's gemm. `block_name_to_quantize` has the beginnings of
the names of the modules that are quantized. `extra_config` has other settings, by the name of a module, or else by a
pattern that is found in it, the first that is; 16 bits stand for floating point. The head is quantized if it is named.
"""

from typing import Any

from batchinfer.formats.awq import awq_matrix
from batchinfer.formats.fields import WHERE, names, one_of, pattern, refuse_unknown, settings_by_name
from batchinfer.formats.gptq import PACKING, Packing
from batchinfer.formats.left_out import is_head
from batchinfer.formats.matrix import QuantizedMatrix, Tensors

KNOWN = PACKING | {"data_type", "packing_format", "extra_config", "block_name_to_quantize", "to_quant_block_names"}
ZEROS_LESS_ONE = ("auto_round:auto_gptq", "auto_round:gptq")
ZEROS = ("auto_round", "auto_round:gptqmodel")
GEMM = ("auto_round:auto_awq", "auto_round:awq")


class AutoRound:
    """An AutoRound checkpoint's format. Raises `ValueError` for settings that are not supported."""

    eight_bit_inputs: frozenset[str] = frozenset()
    for_cpu_alone = False

    def __init__(self, config: dict[str, Any]) -> None:
        refuse_unknown(config, KNOWN)
        remedy = "export the model in one of them, or in the format llm_compressor"
        form = one_of(config, "packing_format", (*ZEROS_LESS_ONE, *ZEROS, *GEMM), remedy)
        self.gemm = form in GEMM
        base = Packing(bits=4, group_size=128, symmetric=True, offset=1 if form in ZEROS_LESS_ONE else 0)
        stated = {key: config[key] for key in (*PACKING, "data_type") if config.get(key) is not None}
        # Modules that extra_config alone gives fewer bits have the other settings of all.
        base = base.changed({key: value for key, value in stated.items() if key in ("group_size", "sym")})
        self.packing = self._changed(base, stated, WHERE)
        self.others = {
            name: self._changed(self.packing or base, settings, f"{WHERE}: extra_config: {name}")
            for name, settings in settings_by_name(config, "extra_config").items()
            if settings
        }
        self.patterns = {name: pattern(name, name, "extra_config") for name in self.others}
        self.blocks = _blocks(config)
        bits = sorted({packing.bits for packing in (self.packing, *self.others.values()) if packing is not None})
        self.name = f"AutoRound, {' and '.join(map(str, bits))} bits"

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        packing = self._packing(module)
        if packing is None:
            return None
        if self.gemm:
            return awq_matrix(module, shape, tensors, packing.group_size, not packing.symmetric)
        return packing.matrix(module, shape, tensors)

    def _packing(self, module: str) -> Packing | None:
        if module in self.others:
            return self.others[module]
        if is_head(module) or not module.startswith(self.blocks):
            return None
        found = (self.others[name] for name, pattern in self.patterns.items() if pattern.search(module))
        return next(found, self.packing)

    def _changed(self, base: Packing, settings: dict[str, Any], where: str) -> Packing | None:
        """Return the packing with other settings, None for floating point."""
        one_of(settings, "data_type", ("int",), "take a checkpoint of whole numbers", where)
        # Settings of inputs and of scales have no value here, or that of floating point.
        asked = {key: value for key, value in settings.items() if key != "data_type" and value is not None}
        if asked.pop("act_bits", 16) != 16:
            raise ValueError(f"{where}: act_bits is {settings['act_bits']!r}; inputs stay in floating point: take 16")
        if asked.get("bits") in (16, 32):
            return None
        packing = base.changed(asked, where)
        if self.gemm and packing.bits != 4:
            raise ValueError(f"{where}: bits is {packing.bits}; AWQ's layout is read with 4 bits: export auto_gptq")
        return packing


def _blocks(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the beginnings of the names of modules that are quantized; without the field, all are."""
    key = "block_name_to_quantize" if config.get("block_name_to_quantize") else "to_quant_block_names"
    value = config.get(key)
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(","))
    if isinstance(value, list):  # names, or lists of names
        value = [name for entry in value for name in (entry if isinstance(entry, list) else [entry])]
    return names({key: value}, key) or ("",)
