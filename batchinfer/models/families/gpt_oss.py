"""gpt-oss (OpenAI 2025): Llama with windows in every other layer, sinks, and experts with biases."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.gemma3_text import FULL, SLIDING
from batchinfer.models.families.mixtures import chosen_experts, number_of_experts, with_experts
from batchinfer.models.feed_forward import Router
from batchinfer.models.fused_experts import FusedExperts
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Matrix

ARCHITECTURES = ("GptOssForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128,
    "rope_theta": 150000.0, "num_experts": None, "num_local_experts": None, "num_experts_per_tok": 4,
    "intermediate_size": 2880,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
# Hub files have swiglu_limit and say experts_per_token too, for other engines.
FIXED: dict[str, Any] = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config = config.changed(rope_parameters=_YARN)
    types = [FULL if i % 2 else SLIDING for i in range(config.size("num_hidden_layers"))]
    described = llama.layers(config, window=config.size_or_none("sliding_window"), types=types)
    count, hidden, inner = number_of_experts(config, 128), config.size("hidden_size"), config.size("intermediate_size")
    router = Router(Matrix("mlp.router", count, hidden, bias=True), chosen_experts(config, count))
    fused = FusedExperts(alternating=True, transposed=True, only_form=True)
    with_sinks = [_clamped_with_sinks(layer) for layer in described]
    return [with_experts(layer, router, count, inner, bias=True, fused=fused) for layer in with_sinks]


def _clamped_with_sinks(layer: Layer) -> Layer:
    return replace(
        layer,
        mixer=replace(layer.attention, sinks="self_attn.sinks"),
        feed_forward=replace(layer.block, activation="clamped_swiglu"),
    )
