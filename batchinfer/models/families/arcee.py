"""Arcee (Arcee AI 2025): Llama without a gate, with the square of the rectified input for the activation."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import without_gate
from batchinfer.models.layer import Layer

ARCHITECTURES = ("ArceeForCausalLM",)
DEFAULTS = llama.DEFAULTS | {"rms_norm_eps": 1e-5}
FIXED = llama.FIXED | {"hidden_act": "relu2"}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return [without_gate(layer, "relu2") for layer in llama.layers(config)]
