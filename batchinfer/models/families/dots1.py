"""dots.llm1 (rednote-hilab 2025): Qwen3 with windows in some layers, and experts chosen as in DeepSeek-V3."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import glm4_moe, llama
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Dots1ForCausalLM",)
DEFAULTS: dict[str, Any] = glm4_moe.DEEPSEEK | {
    "num_key_value_heads": 32, "attention_bias": False, "sliding_window": 4096, "max_window_layers": 62,
    "n_routed_experts": None, "n_shared_experts": None, "num_experts_per_tok": None, "norm_topk_prob": False,
    "moe_intermediate_size": 1408, "first_k_dense_replace": 0, "intermediate_size": 10944,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    window, first = config.size_or_none("sliding_window"), config.whole("max_window_layers")
    count, dense = config.size("num_hidden_layers"), config.whole("first_k_dense_replace")
    types = ["sliding_attention" if window is not None and i >= first else "full_attention" for i in range(count)]
    described = llama.layers(config, window=window, types=types, head_norm=True)
    return [layer if i < dense else glm4_moe.with_deepseek_experts(layer, config) for i, layer in enumerate(described)]
