"""Mellum 2 (JetBrains 2026): Qwen3 with experts in some layers, and a rotary embedding for each type of layer."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama, qwen2_moe
from batchinfer.models.families.gemma3_text import FULL, SLIDING
from batchinfer.models.families.mixtures import number_of_experts, with_experts
from batchinfer.models.layer import Layer
from batchinfer.models.rope import RopeFields, read_rope

ARCHITECTURES = ("MellumForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 128, "attention_bias": False, "sliding_window": 1024, "num_experts": None,
    "num_local_experts": None, "num_experts_per_tok": 8, "norm_topk_prob": True, "mlp_layer_types": None,
    "moe_intermediate_size": 896, "intermediate_size": 7168,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    d, window = llama.head_dim(config), config.size_or_none("sliding_window")
    ropes = {kind: read_rope(config, d, RopeFields(kind, theta)) for kind, theta in ((FULL, 5e5), (SLIDING, 1e4))}
    types = [FULL] * config.size("num_hidden_layers")
    described = llama.layers(config, window=window, types=types, ropes=ropes, head_norm=True)
    experts, inner = number_of_experts(config, 64), config.size("moe_intermediate_size")
    router = qwen2_moe.router(config, experts)
    return [
        with_experts(layer, router, experts, inner) if sparse else layer
        for layer, sparse in zip(described, with_mixture(config, ["sparse"] * len(described)), strict=True)
    ]


def with_mixture(config: ConfigFile, default: list[str]) -> list[bool]:
    """Return for each layer whether it has experts, as `mlp_layer_types` says: sparse or dense."""
    kinds = config.get("mlp_layer_types")
    kinds = default if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != len(default) or any(k not in ("sparse", "dense") for k in kinds):
        raise ValueError(f"config.json: mlp_layer_types must name sparse or dense for {len(default)} layers")
    return [kind == "sparse" for kind in kinds]
