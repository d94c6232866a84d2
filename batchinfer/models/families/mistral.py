"""Mistral (Jiang et al. 2023): Llama with an optional attention window."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.layer import Layer

ARCHITECTURES = ("MistralForCausalLM",)
DEFAULTS: dict[str, Any] = {"num_key_value_heads": 8, "sliding_window": 4096}
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return llama.layers(config, window=config.size_or_none("sliding_window"))
