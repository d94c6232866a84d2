"""Jais 2 (Inception 2025): Llama with LayerNorm, biases, and a squared ReLU without a gate."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import (
    layer_norm_ends,
    read_activation,
    with_layer_norms,
    without_gate,
)
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Jais2ForCausalLM",)
DEFAULTS = llama.DEFAULTS | {"attention_bias": True, "mlp_bias": True, "hidden_act": "relu2", "layer_norm_eps": 1e-5}
FIXED: dict[str, object] = {}
ends = layer_norm_ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = llama.layers(config)
    return [without_gate(with_layer_norms(layer), read_activation(config)) for layer in described]
