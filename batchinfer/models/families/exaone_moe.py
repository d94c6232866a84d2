"""K-EXAONE (LG AI Research 2026): EXAONE 4 with norms of the blocks' inputs, and experts chosen as in DeepSeek-V3."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import exaone4, glm4_moe, llama, mellum
from batchinfer.models.layer import Layer

ARCHITECTURES = ("ExaoneMoeForCausalLM",)
DEFAULTS: dict[str, Any] = glm4_moe.DEEPSEEK | {
    "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4,
    "num_experts": 64, "num_shared_experts": 1, "routed_scaling_factor": 2.5, "mlp_layer_types": None,
    "moe_intermediate_size": 1024, "first_k_dense_replace": 1, "intermediate_size": 16384,
}  # fmt: skip
FIXED: dict[str, Any] = {"attention_bias": False}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = exaone4.attention_layers(config)
    dense = config.whole("first_k_dense_replace")
    sparse = mellum.with_mixture(config, ["dense" if i < dense else "sparse" for i in range(len(described))])
    named = config.changed(
        n_routed_experts=config.size("num_experts"), n_shared_experts=config.size("num_shared_experts")
    )
    return [
        glm4_moe.with_deepseek_experts(layer, named, "mlp.e_score_correction_bias") if mixture else layer
        for layer, mixture in zip(described, sparse, strict=True)
    ]
