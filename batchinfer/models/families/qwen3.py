"""Qwen3 (Yang et al. 2025): Llama with an RMSNorm on each head of queries and keys."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, qwen2
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Qwen3ForCausalLM",)
DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128, "attention_bias": False}
FIXED = qwen2.FIXED
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return llama.layers(config, window=qwen2.window(config), types=qwen2.types(config), head_norm=True)
