"""Command R (Cohere 2024): both blocks in parallel, LayerNorm without a bias, and rotary embedding of neighbours."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import (
    in_parallel,
    layer_norm_ends,
    with_head_norms,
    with_layer_norms,
    with_pairs_of_neighbours,
)
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.tensors import Norm

ARCHITECTURES = ("CohereForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "attention_bias": False, "use_qk_norm": False,
}  # fmt: skip
FIXED: dict[str, Any] = {}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = [with_cohere_blocks(layer) for layer in llama.layers(config)]
    return [_with_norm_for_each_head(layer) for layer in described] if config.flag("use_qk_norm") else described


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    return replace(layer_norm_ends(config, bias=False), logits_factor=config.number("logit_scale"))


def with_cohere_blocks(layer: Layer) -> Layer:
    """Let both blocks take the same input, after one LayerNorm, and rotate pairs of neighbours."""
    return with_pairs_of_neighbours(in_parallel(with_layer_norms(layer, bias=False)))


def _with_norm_for_each_head(layer: Layer) -> Layer:
    """Normalize heads by LayerNorms with weights of their own."""
    a = layer.attention
    query = Norm("self_attn.q_norm", a.head_dim, centered=True, heads=a.heads)
    return with_head_norms(layer, query, Norm("self_attn.k_norm", a.head_dim, centered=True, heads=a.kv_heads))
