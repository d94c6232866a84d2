"""ERNIE 4.5 with experts (Baidu 2025): chosen by a softmax and a bias, in some layers."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import ernie4_5
from batchinfer.models.families.mixtures import block, chosen_experts
from batchinfer.models.feed_forward import Experts, Router
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("Ernie4_5_MoeForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "num_key_value_heads": 4,
    "moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2,
    "moe_intermediate_size": 1536, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
    "intermediate_size": 12288,
}  # fmt: skip
FIXED: dict[str, Any] = {"use_bias": False, "moe_norm_min": 1e-12}  # a bias would be the head's too
ends = ernie4_5.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    first, last = (config.get(f"moe_layer_{end}_index") for end in ("start", "end"))
    step, described = config.size("moe_layer_interval"), ernie4_5.layers(config.changed(layer_types=None))
    if type(first) is not int or type(last) is not int:
        raise ValueError(
            f"config.json: moe_layer_start_index is {first!r} and moe_layer_end_index {last!r}; both must "
            "be whole numbers"
        )
    last = len(described) - 1 if last == -1 else last
    return [
        _with_experts(layer, config) if first <= i <= last and (i + 1) % step == 0 else layer
        for i, layer in enumerate(described)
    ]


def _with_experts(layer: Layer, config: ConfigFile) -> Layer:
    experts, inner, hidden = (
        config.size("moe_num_experts"),
        config.size("moe_intermediate_size"),
        layer.block.up.columns,
    )
    router = Router(
        Matrix("mlp.gate", experts, hidden),
        chosen_experts(config, experts, "moe_k"),
        bias="mlp.moe_statics.e_score_correction_bias",
        bias_shape=(1, experts),
    )
    shared = config.whole("moe_num_shared_experts") * inner
    found = tuple(block(f"mlp.experts.{i}", hidden, inner) for i in range(experts))
    return replace(
        layer,
        feed_forward=Experts(router, found, block("mlp.shared_experts", hidden, shared) if shared else None),
    )
