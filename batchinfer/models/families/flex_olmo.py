"""FlexOlmo (Shi et al. 2025): OLMoE with norms of the blocks' outputs instead of their inputs."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, qwen2_moe
from batchinfer.models.families.mixtures import number_of_experts, with_experts
from batchinfer.models.families.variations import with_norms_of_all_heads, with_output_norms_only
from batchinfer.models.layer import Layer

ARCHITECTURES = ("FlexOlmoForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "attention_bias": False, "rope_theta": 500000.0, "num_experts": None, "num_local_experts": None,
    "num_experts_per_tok": 5, "norm_topk_prob": False, "intermediate_size": 11008,
}  # fmt: skip
FIXED = llama.FIXED
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = llama.layers(config.changed(layer_types=None))
    normed = [with_norms_of_all_heads(with_output_norms_only(layer)) for layer in described]
    experts = number_of_experts(config, 7)
    router = qwen2_moe.router(config, experts)
    return [with_experts(layer, router, experts, config.size("intermediate_size")) for layer in normed]
