"""OLMoE (Muennighoff et al. 2024): Llama with experts, and norms of queries and keys over all heads."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, qwen2_moe
from batchinfer.models.families.mixtures import number_of_experts, with_experts
from batchinfer.models.families.variations import with_norms_of_all_heads
from batchinfer.models.layer import Layer

ARCHITECTURES = ("OlmoeForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 16, "attention_bias": False, "rms_norm_eps": 1e-5, "num_experts": None,
    "num_local_experts": None, "num_experts_per_tok": 8, "norm_topk_prob": False, "intermediate_size": 2048,
}  # fmt: skip
FIXED = llama.FIXED
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = [with_norms_of_all_heads(layer) for layer in llama.layers(config.changed(layer_types=None))]
    experts = number_of_experts(config, 64)
    router = qwen2_moe.router(config, experts)
    return [with_experts(layer, router, experts, config.size("intermediate_size")) for layer in described]
