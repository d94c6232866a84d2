"""SmolLM3 (Hugging Face 2025): Llama without rotary embedding in some layers."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, qwen2
from batchinfer.models.families.variations import without_rope
from batchinfer.models.layer import Layer

ARCHITECTURES = ("SmolLM3ForCausalLM",)
DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layers": None,
    "no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip
FIXED: dict[str, object] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for.

    In `no_rope_layers`, 1 stands for rotary embedding. Raises `ValueError` if it does not say that of each layer.
    """
    count, interval = config.size("num_hidden_layers"), config.size("no_rope_layer_interval")
    rotated = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    if not isinstance(rotated, list) or len(rotated) != count or any(flag not in (0, 1) for flag in rotated):
        raise ValueError(f"config.json: no_rope_layers is {rotated!r}; it must be a list of {count} numbers, 0 or 1")
    window = qwen2.window(config)
    types = ["full_attention" if flag or window is None else "sliding_attention" for flag in rotated]
    described = llama.layers(config, window=window, types=types)
    return [layer if flag else without_rope(layer) for layer, flag in zip(described, rotated, strict=True)]
