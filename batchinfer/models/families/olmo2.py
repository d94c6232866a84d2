"""OLMo 2 (Team OLMo 2024): Llama with norms of the blocks' outputs instead of their inputs, and of queries and keys."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import with_norms_of_all_heads, with_output_norms_only
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Olmo2ForCausalLM",)
DEFAULTS: dict[str, object] = {"attention_bias": False, "rms_norm_eps": 1e-5}
FIXED = llama.FIXED
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return [with_norms_of_all_heads(with_output_norms_only(layer)) for layer in llama.layers(config)]
