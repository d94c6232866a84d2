"""Phi-1 to Phi-2 (Li et al. 2023): both blocks in parallel, LayerNorm, biases, and a part of each head rotated."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import (
    in_parallel,
    layer_norm_ends,
    read_activation,
    with_head_norms,
    with_layer_norms,
    with_names,
    without_gate,
)
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.rope import RopeFields, read_rope
from batchinfer.models.tensors import Norm

ARCHITECTURES = ("PhiForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "qk_layernorm": False,
}  # fmt: skip
FIXED: dict[str, Any] = {}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    d, activation = llama.head_dim_of_hidden(config), read_activation(config)
    rope = read_rope(config, d, RopeFields(partial=True))
    same = config.changed(attention_bias=True, mlp_bias=True)
    described = llama.layers(same, ropes={"full_attention": rope})
    described = [in_parallel(with_layer_norms(without_gate(layer, activation))) for layer in described]
    if config.flag("qk_layernorm"):
        norms = (Norm(f"self_attn.{name}_layernorm", d, centered=True, bias=True) for name in "qk")
        query, key = norms
        described = [with_head_norms(layer, query, key) for layer in described]
    return [with_names(layer, output="self_attn.dense", up="mlp.fc1", down="mlp.fc2") for layer in described]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    plain = layer_norm_ends(config)
    return replace(plain, norm=replace(plain.norm, name="model.final_layernorm"), head_bias=True)
