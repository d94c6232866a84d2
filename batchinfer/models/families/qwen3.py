"""Qwen3 (Yang et al. 2025): Llama with an RMSNorm on each head of queries and keys."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, qwen2
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Qwen3ForCausalLM",)
DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128, "attention_bias": False}
FIXED = qwen2.FIXED


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    window, first = qwen2.window(config), qwen2.first_window(config)
    return llama.layers(config, window=window, first_window=first, head_norm=True)
