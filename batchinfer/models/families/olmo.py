"""OLMo (Groeneveld et al. 2024): Llama with LayerNorm that has no weights, and clamped queries, keys and values."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import layer_norm, with_layer_norms
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.tensors import Norm

ARCHITECTURES = ("OlmoForCausalLM",)
DEFAULTS: dict[str, Any] = {"attention_bias": False, "clip_qkv": None}
FIXED = llama.FIXED


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    limit = config.number_or_none("clip_qkv")
    described = [with_layer_norms(layer, weight=False, bias=False) for layer in llama.layers(config)]
    return [replace(layer, mixer=replace(layer.attention, limit=limit)) for layer in described]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    norm = Norm("model.norm", config.size("hidden_size"))
    return Ends(layer_norm(norm, weight=False, bias=False), norm_eps=1e-5)
