"""Gemma 2 (Gemma Team 2024): Gemma with norms on both sides of each block, soft caps, and windows by turns."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import gemma, llama
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.tensors import Norm

ARCHITECTURES = ("Gemma2ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}  # fmt: skip
FIXED: dict[str, Any] = {
    "use_bidirectional_attention": False, "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    types = [("sliding_attention", "full_attention")[i % 2] for i in range(config.size("num_hidden_layers"))]
    window = config.size_or_none("sliding_window")
    if window is None:
        types = ["full_attention"] * len(types)
    return [between_norms(layer, config) for layer in llama.layers(config, window=window, types=types)]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    return replace(gemma.ends(config), softcap=config.number_or_none("final_logit_softcapping"))


def between_norms(layer: Layer, config: ConfigFile) -> Layer:
    """Set the norms around each block, and how scores are scaled and capped."""
    hidden = layer.attention.output.rows
    attention = replace(
        layer.attention,
        scale=config.number("query_pre_attn_scalar") ** -0.5,
        softcap=config.number_or_none("attn_logit_softcapping"),
    )
    return gemma.with_gemma_blocks(
        replace(
            layer,
            mixer=attention,
            attention_norm=Norm("post_attention_layernorm", hidden),
            mlp_norm=Norm("pre_feedforward_layernorm", hidden),
            mlp_output_norm=Norm("post_feedforward_layernorm", hidden),
        )
    )
