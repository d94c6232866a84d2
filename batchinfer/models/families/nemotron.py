"""Nemotron-4 and Minitron (NVIDIA 2024): LayerNorm around 1, a squared ReLU, and a part of each head rotated."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import gemma, llama
from batchinfer.models.families.variations import (
    layer_norm_ends,
    read_activation,
    with_layer_norms,
    without_gate,
)
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.rope import RopeFields, read_rope

ARCHITECTURES = ("NemotronForCausalLM",)
DEFAULTS: dict[str, Any] = llama.DEFAULTS | {
    "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5,
}  # fmt: skip
FIXED: dict[str, Any] = {}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    rope = read_rope(config, llama.head_dim(config), RopeFields(partial=True))
    described = llama.layers(config, ropes={"full_attention": rope})
    plain = [without_gate(with_layer_norms(layer), read_activation(config)) for layer in described]
    around_one = gemma.around_one
    return [
        replace(layer, input_norm=around_one(layer.input_norm), mlp_norm=around_one(layer.mlp_norm)) for layer in plain
    ]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    plain = layer_norm_ends(config, eps="norm_eps")
    return replace(plain, norm=gemma.around_one(plain.norm))
