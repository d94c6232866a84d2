"""GLM-4-0414 (Zhipu 2025): GLM-4 with norms of the blocks' outputs too."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import glm
from batchinfer.models.families.variations import with_output_norms
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Glm4ForCausalLM",)
DEFAULTS, FIXED, ends = glm.DEFAULTS, glm.FIXED, glm.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return [with_output_norms(layer, "post_self_attn_layernorm", "post_mlp_layernorm") for layer in glm.layers(config)]
