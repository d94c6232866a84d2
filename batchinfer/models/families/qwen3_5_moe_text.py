"""Qwen3.5 and Qwen3.6 with experts (Qwen Team 2026), and one behind a gate that all tokens share."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import qwen2_moe, qwen3_5_text
from batchinfer.models.families.mixtures import number_of_experts
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Qwen3_5MoeForCausalLM",)
DEFAULTS: dict[str, Any] = qwen3_5_text.DEFAULTS | {
    "num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}  # fmt: skip
FIXED: dict[str, Any] = qwen3_5_text.FIXED | {"norm_topk_prob": True}
ends = qwen3_5_text.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    plain = config.changed(intermediate_size=config.size("moe_intermediate_size"))
    # The weights of the chosen experts are always normalized here.
    router = qwen2_moe.router(config.changed(norm_topk_prob=True), number_of_experts(config, 256))
    described = qwen3_5_text.hybrid(plain, qwen3_5_text.delta_net(config))
    return [qwen2_moe.with_shared_expert(layer, config, router) for layer in described]
