"""Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values, and an optional attention window."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Qwen2ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
FIXED: dict[str, Any] = {}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return llama.layers(config, window=window(config), first_window=first_window(config), qkv_bias=True)


def window(config: ConfigFile) -> int | None:
    """Return the attention window, or None. Qwen's `sliding_window` counts only if `use_sliding_window` is true."""
    return config.size_or_none("sliding_window") if config.flag("use_sliding_window") else None


def first_window(config: ConfigFile) -> int:
    """Return the number of the first layer with the window; 0 if `layer_types` names the layers."""
    if config.get("layer_types") is not None:
        return 0
    first = config.get("max_window_layers")
    if type(first) is not int:
        raise ValueError(f"config.json: max_window_layers is {first!r}; it must be a whole number")
    return first
