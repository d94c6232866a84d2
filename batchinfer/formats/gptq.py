"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them (`quant_method: gptq`).

`qweight` is int32 [K * bits / 32, N], packed along K; `qzeros` is int32 [G, N * bits / 32], packed along N; `scales` is
[G, N]; `g_idx` is int32 [K]. W[n, k] = scales[g, n] * (q[k, n] - z[g, n]) with g = g_idx[k]. Version 1 stores z - 1.
"""

from typing import Any

import torch

from batchinfer.formats.fields import flag, refuse_module, whole
from batchinfer.formats.matrix import QuantizedMatrix, Tensors, checked_groups, checked_scale, groups_of
from batchinfer.formats.pack import unpack


class GPTQ:
    """A GPTQ checkpoint's format, from its `quantization_config`. Raises `ValueError` for settings not supported."""

    eight_bit_inputs: frozenset[str] = frozenset()
    for_cpu_alone = False

    def __init__(self, config: dict[str, Any]) -> None:
        self.bits = whole(config, "bits")
        if self.bits not in (4, 8):
            raise ValueError(
                f"config.json: quantization_config: bits is {self.bits}; GPTQ is read with 4 or 8 bits: quantize the "
                "model anew, or take another checkpoint of it"
            )
        self.group_size = whole(config, "group_size")
        self.symmetric = flag(config, "sym", True)
        self.head = flag(config, "lm_head", False)
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"config.json: quantization_config: checkpoint_format is {version!r}; supported are gptq and gptq_v2: "
                "convert the checkpoint with GPTQModel, or take another one"
            )
        if config.get("dynamic"):
            raise ValueError("config.json: quantization_config: dynamic (other settings by module) is not supported")
        self.offset = 1 if version == "gptq" else 0
        self.name = f"GPTQ, {self.bits} bits"

    def matrix(self, module: str, shape: tuple[int, int], tensors: Tensors) -> QuantizedMatrix | None:
        """Return the module's weight [N, K], or None if it is not quantized."""
        if module == "lm_head" and not self.head:
            return None
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
