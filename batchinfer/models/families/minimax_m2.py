"""MiniMax M2 (MiniMax 2025): Llama with norms of queries and keys over all heads, and experts chosen by sigmoids."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.mixtures import W1_W3_W2, chosen_experts, number_of_experts, with_experts
from batchinfer.models.families.variations import with_norms_of_all_heads
from batchinfer.models.feed_forward import Router
from batchinfer.models.layer import Layer
from batchinfer.models.rope import RopeFields, read_rope
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("MiniMaxM2ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e6, "partial_rotary_factor": 1.0, "rotary_dim": None,
    "num_experts": None, "num_local_experts": None, "num_experts_per_tok": 8, "intermediate_size": 1536,
}  # fmt: skip
FIXED: dict[str, Any] = {"router_jitter_noise": 0.0}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    d, experts, name = llama.head_dim(config), number_of_experts(config, 256), "block_sparse_moe"
    if (rotated := config.size_or_none("rotary_dim")) is not None:
        config = config.changed(partial_rotary_factor=rotated / d)
    rope = read_rope(config, d, RopeFields(partial=True))
    router = Router(
        Matrix(f"{name}.gate", experts, config.size("hidden_size")),
        chosen_experts(config, experts),
        "sigmoid",
        bias=f"{name}.e_score_correction_bias",
        bias_shape=(experts,),
    )
    described = llama.layers(config.changed(layer_types=None), ropes={"full_attention": rope})
    inner = config.size("intermediate_size")
    return [
        with_experts(with_norms_of_all_heads(layer), router, experts, inner, name=name, names=W1_W3_W2)
        for layer in described
    ]
