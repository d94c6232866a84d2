"""Seed-OSS (ByteDance 2025): Llama whose output projection has a bias of its own or none."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import with_output_bias
from batchinfer.models.layer import Layer

ARCHITECTURES = ("SeedOssForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "attention_out_bias": False, "mlp_bias": False,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    biased = config.flag("attention_out_bias")
    return [with_output_bias(layer, biased) for layer in llama.layers(config)]
