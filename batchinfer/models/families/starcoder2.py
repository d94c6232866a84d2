"""StarCoder 2 (Lozhkov et al. 2024): Mistral with LayerNorm, biases, and GELU without a gate."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import (
    layer_norm_ends,
    read_activation,
    with_layer_norms,
    with_names,
    without_gate,
)
from batchinfer.models.layer import Ends, Layer

ARCHITECTURES = ("Starcoder2ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "sliding_window": None,
    "use_bias": True, "tie_word_embeddings": True,
}  # fmt: skip
FIXED: dict[str, Any] = {}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    biased, activation = config.flag("use_bias"), read_activation(config)
    same = config.changed(attention_bias=biased, mlp_bias=biased, layer_types=None)
    described = llama.layers(same, window=config.size_or_none("sliding_window"))
    plain = [without_gate(with_layer_norms(layer), activation) for layer in described]
    return [with_names(layer, output="self_attn.o_proj", up="mlp.c_fc", down="mlp.c_proj") for layer in plain]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    return layer_norm_ends(config, eps="norm_epsilon")
