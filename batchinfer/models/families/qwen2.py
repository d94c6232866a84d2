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
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return llama.layers(config, window=window(config), types=types(config), qkv_bias=True)


def window(config: ConfigFile) -> int | None:
    """Return the attention window, or None. Qwen's `sliding_window` counts only if `use_sliding_window` is true."""
    return config.size_or_none("sliding_window") if config.flag("use_sliding_window") else None


def types(config: ConfigFile) -> list[str] | None:
    """Return the types of layers that follow from `max_window_layers`, the number of the first layer with the window.

    Return None if `layer_types` names them.
    """
    if config.get("layer_types") is not None:
        return None
    first, count = config.get("max_window_layers"), config.size("num_hidden_layers")
    if type(first) is not int:
        raise ValueError(f"config.json: max_window_layers is {first!r}; it must be a whole number")
    windowed = window(config) is not None
    return ["sliding_attention" if windowed and i >= first else "full_attention" for i in range(count)]
