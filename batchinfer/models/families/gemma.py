"""Gemma (Gemma Team 2024): Llama with GELU, norms around 1, and embeddings times the root of the hidden size."""

from dataclasses import replace
from typing import Any, TypeVar

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.tensors import Norm

ARCHITECTURES = ("GemmaForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
FIXED: dict[str, Any] = {"use_bidirectional_attention": False, "hidden_activation": "gelu_pytorch_tanh"}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    if config.get("hidden_act") not in ("gelu", "gelu_pytorch_tanh"):  # the first one is the second one's older name
        raise ValueError(f"config.json: hidden_act is {config.get('hidden_act')!r}; supported is 'gelu_pytorch_tanh'")
    return [with_gemma_blocks(layer) for layer in llama.layers(config)]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    plain = llama.ends(config)
    return replace(plain, norm=around_one(plain.norm), embedding_factor=plain.norm.size**0.5)


def with_gemma_blocks(layer: Layer) -> Layer:
    """Take GELU for the activation, and let all norms of the layer store their weights' distance from 1."""
    a = layer.attention
    if a.head_norms is not None:
        a = replace(a, head_norms=(around_one(a.head_norms[0]), around_one(a.head_norms[1])))
    return replace(
        layer,
        mixer=a,
        feed_forward=replace(layer.block, activation="gelu_tanh"),
        input_norm=around_one(layer.input_norm),
        attention_norm=around_one(layer.attention_norm),
        mlp_norm=around_one(layer.mlp_norm),
        mlp_output_norm=around_one(layer.mlp_output_norm),
    )


AnyNorm = TypeVar("AnyNorm", Norm, Norm | None)


def around_one(norm: AnyNorm) -> AnyNorm:
    """Let a norm, if there is one, store its weight's distance from 1."""
    return norm if norm is None else replace(norm, added=1.0)
