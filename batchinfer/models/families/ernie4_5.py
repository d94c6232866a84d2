"""ERNIE 4.5 (Baidu 2025): Llama with rotary embedding of neighbours."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import with_pairs_of_neighbours
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Ernie4_5ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "use_bias": False,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    biased = config.flag("use_bias")
    described = llama.layers(config.changed(attention_bias=biased, mlp_bias=biased))
    return [with_pairs_of_neighbours(layer) for layer in described]
