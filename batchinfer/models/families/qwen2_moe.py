"""Qwen1.5-MoE and Qwen2-MoE (Yang et al. 2024): Qwen2 with experts, and one behind a gate that all tokens share."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, qwen2
from batchinfer.models.families.mixtures import block, chosen_experts, number_of_experts, with_experts
from batchinfer.models.feed_forward import Router
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("Qwen2MoeForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 16, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "qkv_bias": True, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1,
    "mlp_only_layers": None, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "intermediate_size": 5632,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    window, most, count = qwen2.window(config), config.whole("max_window_layers"), config.size("num_hidden_layers")
    types = ["sliding_attention" if window and i % 2 == 0 and i < most else "full_attention" for i in range(count)]
    described = llama.layers(config, window=window, types=types, qkv_bias=config.flag("qkv_bias"))
    chooses = router(config, number_of_experts(config, 60))
    return [
        with_shared_expert(layer, config, chooses) if sparse else layer
        for layer, sparse in zip(described, with_mixture(config), strict=True)
    ]


def with_shared_expert(layer: Layer, config: ConfigFile, router: Router) -> Layer:
    """Replace a layer's feed-forward block by experts, and one behind a gate that all tokens share."""
    hidden = layer.block.up.columns
    return with_experts(
        layer,
        router,
        router.matrix.rows,
        config.size("moe_intermediate_size"),
        shared=block("mlp.shared_expert", hidden, config.size("shared_expert_intermediate_size")),
        shared_gate=Matrix("mlp.shared_expert_gate", 1, hidden),
    )


def router(config: ConfigFile, experts: int) -> Router:
    """Describe how experts are chosen: the best of a softmax."""
    return Router(
        Matrix("mlp.gate", experts, config.size("hidden_size")),
        chosen_experts(config, experts),
        normalized=config.flag("norm_topk_prob"),
    )


def with_mixture(config: ConfigFile) -> list[bool]:
    """Return for each layer whether it has experts: every so-manieth one, but those of `mlp_only_layers`."""
    step, dense = config.size("decoder_sparse_step"), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(number) is not int for number in dense):
        raise ValueError(f"config.json: mlp_only_layers is {dense!r}; it must be a list of whole numbers")
    return [i not in dense and (i + 1) % step == 0 for i in range(config.size("num_hidden_layers"))]
