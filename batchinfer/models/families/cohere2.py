"""Command R7B and Command A (Cohere 2024): Command R with windows; layers without a window do not rotate."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import cohere, llama
from batchinfer.models.families.variations import without_rope
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Cohere2ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True, "attention_bias": False,
    "sliding_window": 4096, "sliding_window_pattern": 4,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = cohere.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    llama.head_dim_of_hidden(config)
    every, count = config.size("sliding_window_pattern"), config.size("num_hidden_layers")
    types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    described = llama.layers(config, window=config.size_or_none("sliding_window"), types=types)
    turned = [layer if layer.attention.window else without_rope(layer) for layer in described]
    return [cohere.with_cohere_blocks(layer) for layer in turned]
