"""EXAONE 4 (LG AI Research 2025): Llama with norms of the blocks' outputs; layers without a window do not rotate."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import with_output_norms_only, without_rope
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Exaone4ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4,
}  # fmt: skip
FIXED: dict[str, Any] = {"attention_bias": False}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return [with_output_norms_only(layer) for layer in attention_layers(config)]


def attention_layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers before their norms are moved: those without a window do not rotate."""
    window, count = config.size_or_none("sliding_window"), config.size("num_hidden_layers")
    types = ["full_attention"] * count
    if window is not None and config.get("layer_types") is None:
        every = config.size("sliding_window_pattern")
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    described = llama.layers(config, window=window, types=types, head_norm=True)
    return [layer if window is None or layer.attention.window else without_rope(layer) for layer in described]
