"""OLMo 3 (Team OLMo 2025): OLMo 2 with windows, and a rotary embedding for each type of layer."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import gemma3_text, llama, olmo2
from batchinfer.models.families.gemma3_text import FULL, SLIDING
from batchinfer.models.families.variations import with_norms_of_all_heads, with_output_norms_only
from batchinfer.models.layer import Layer

ARCHITECTURES = ("Olmo3ForCausalLM",)
DEFAULTS: dict[str, Any] = olmo2.DEFAULTS | {"sliding_window": 4096, "rope_theta": 500000.0}
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    types = [SLIDING if (i + 1) % 4 else FULL for i in range(config.size("num_hidden_layers"))]
    ropes = gemma3_text.ropes(config, config.number("rope_theta"))
    described = llama.layers(config, window=config.size_or_none("sliding_window"), types=types, ropes=ropes)
    return [with_norms_of_all_heads(with_output_norms_only(layer)) for layer in described]
