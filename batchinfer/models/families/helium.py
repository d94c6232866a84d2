"""Helium (Kyutai 2025): Llama with rotary embedding of neighbours."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import with_output_bias, with_pairs_of_neighbours
from batchinfer.models.layer import Layer

ARCHITECTURES = ("HeliumForCausalLM",)
DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8, "rope_theta": 100000.0,
}  # fmt: skip
FIXED = llama.FIXED
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return [with_pairs_of_neighbours(with_output_bias(layer, False)) for layer in llama.layers(config)]
