"""GLM-4.5 and 4.6 (Zhipu 2025): Llama with half of each head rotated, and experts chosen as in DeepSeek-V3."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.mixtures import best_groups, block, chosen_experts, with_experts
from batchinfer.models.families.variations import with_output_bias
from batchinfer.models.feed_forward import Router
from batchinfer.models.layer import Layer
from batchinfer.models.rope import RopeFields, read_rope
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("Glm4MoeForCausalLM",)
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "routed_scaling_factor": 1.0,
}  # fmt: skip
DEFAULTS: dict[str, Any] = DEEPSEEK | {
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "attention_bias": False, "partial_rotary_factor": 0.5,
    "use_qk_norm": False, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "intermediate_size": 10944,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    rope = read_rope(config, llama.head_dim(config), RopeFields(partial=True))
    plain = config.changed(layer_types=None)
    described = llama.layers(plain, ropes={"full_attention": rope}, head_norm=config.flag("use_qk_norm"))
    dense = config.whole("first_k_dense_replace")
    return [
        layer if i < dense else with_deepseek_experts(layer, config)
        for i, layer in enumerate(with_output_bias(layer, False) for layer in described)
    ]


def with_deepseek_experts(layer: Layer, config: ConfigFile, bias: str = "mlp.gate.e_score_correction_bias") -> Layer:
    """Replace the feed-forward block by experts, and one of several times their size that all tokens share."""
    experts, inner, hidden = (
        config.size("n_routed_experts"),
        config.size("moe_intermediate_size"),
        layer.block.up.columns,
    )
    shared = config.size("n_shared_experts") * inner
    return with_experts(
        layer,
        deepseek_router(config, experts, hidden, bias),
        experts,
        inner,
        shared=block("mlp.shared_experts", hidden, shared),
    )


def deepseek_router(config: ConfigFile, experts: int, hidden: int, bias: str) -> Router:
    """Describe how experts are chosen: by sigmoids and a bias, from the best groups."""
    chosen = chosen_experts(config, experts)
    groups, best = best_groups(config, experts, chosen)
    return Router(
        Matrix("mlp.gate", experts, hidden),
        chosen,
        "sigmoid",
        config.flag("norm_topk_prob"),
        config.number("routed_scaling_factor"),
        bias=bias,
        bias_shape=(experts,),
        groups=groups,
        chosen_groups=best,
    )
