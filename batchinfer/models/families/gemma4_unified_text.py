"""Gemma 4 12B (Gemma Team 2026), which reads images and sounds without towers: Gemma 4 without per-layer embeddings."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import gemma4_text
from batchinfer.models.layer import Ends, Layer

ARCHITECTURES = ("Gemma4UnifiedForCausalLM",)
_ABSENT = ("vocab_size_per_layer_input", "hidden_size_per_layer_input")
DEFAULTS: dict[str, Any] = {key: value for key, value in gemma4_text.DEFAULTS.items() if key not in _ABSENT} | {
    "max_position_embeddings": 262144, "sliding_window": 1024,
}  # fmt: skip
FIXED = gemma4_text.FIXED


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return gemma4_text.layers(_without_per_layer_embeddings(config))


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    return gemma4_text.ends(_without_per_layer_embeddings(config))


def _without_per_layer_embeddings(config: ConfigFile) -> ConfigFile:
    return config.changed(hidden_size_per_layer_input=0)
