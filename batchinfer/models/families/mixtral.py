"""Mixtral (Jiang et al. 2024): Mistral with experts."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.mixtures import W1_W3_W2, chosen_experts, number_of_experts, with_experts
from batchinfer.models.feed_forward import Router
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("MixtralForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts": None,
    "num_local_experts": None, "num_experts_per_tok": 2, "intermediate_size": 14336,
}  # fmt: skip
FIXED: dict[str, Any] = {"router_jitter_noise": 0.0}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    experts, name = number_of_experts(config, 8), "block_sparse_moe"
    router = Router(Matrix(f"{name}.gate", experts, config.size("hidden_size")), chosen_experts(config, experts))
    described = llama.layers(config.changed(layer_types=None), window=config.size_or_none("sliding_window"))
    inner = config.size("intermediate_size")
    return [with_experts(layer, router, experts, inner, name=name, names=W1_W3_W2) for layer in described]
