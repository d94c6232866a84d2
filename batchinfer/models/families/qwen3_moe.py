"""Qwen3-MoE (Yang et al. 2025): Qwen3 with experts."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, qwen2, qwen2_moe
from batchinfer.models.families.mixtures import number_of_experts, with_experts
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 4096, "attention_bias": False,
    "num_experts": None, "num_local_experts": None, "num_experts_per_tok": 8, "norm_topk_prob": False,
    "decoder_sparse_step": 1, "mlp_only_layers": None, "moe_intermediate_size": 768, "intermediate_size": 6144,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for. The window is that of all layers."""
    described = llama.layers(config.changed(layer_types=None), window=qwen2.window(config), head_norm=True)
    experts, inner = number_of_experts(config, 128), config.size("moe_intermediate_size")
    router = qwen2_moe.router(config, experts)
    return [
        with_experts(layer, router, experts, inner) if sparse else layer
        for layer, sparse in zip(described, qwen2_moe.with_mixture(config), strict=True)
    ]
