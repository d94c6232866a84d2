"""LFM2 with experts (Liquid AI 2025), chosen by sigmoids and a bias, in all layers but the first ones."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import lfm2
from batchinfer.models.families.mixtures import W1_W3_W2, chosen_experts, number_of_experts, with_experts
from batchinfer.models.feed_forward import Router
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("Lfm2MoeForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "norm_eps": 1e-5, "tie_word_embeddings": True, "tie_embedding": None, "rope_theta": 1e6,
    "conv_bias": False, "conv_L_cache": 3, "intermediate_size": 7168, "moe_intermediate_size": 1792,
    "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "use_expert_bias": True, "routed_scaling_factor": 1.0,
}  # fmt: skip
FIXED = lfm2.FIXED
ends = lfm2.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    if config.get("layer_types") is None:
        raise ValueError("config.json has no layer_types; it must name full_attention or conv for each layer")
    described = lfm2.layers(config.changed(block_auto_adjust_ff_dim=False))
    experts, inner, name = number_of_experts(config, 32), config.size("moe_intermediate_size"), "feed_forward"
    router = Router(
        Matrix(f"{name}.gate", experts, config.size("hidden_size")),
        chosen_experts(config, experts),
        "sigmoid",
        config.flag("norm_topk_prob"),
        config.number("routed_scaling_factor"),
        bias=f"{name}.expert_bias" if config.flag("use_expert_bias") else None,
        bias_shape=(experts,),
    )
    dense = config.whole("num_dense_layers")
    return [
        layer if i < dense else with_experts(layer, router, experts, inner, name=name, names=W1_W3_W2)
        for i, layer in enumerate(described)
    ]
