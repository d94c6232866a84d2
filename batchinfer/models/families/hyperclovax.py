"""HyperCLOVA X (NAVER 2025): Granite with norms of the blocks' outputs too, and logits that are multiplied."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import granite, llama
from batchinfer.models.families.variations import multiplied_ends, with_multipliers, with_output_norms
from batchinfer.models.layer import Ends, Layer

ARCHITECTURES = ("HyperCLOVAXForCausalLM",)
DEFAULTS: dict[str, Any] = granite.DEFAULTS | {"attention_multiplier": None, "use_post_norm": True}
FIXED: dict[str, Any] = {}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = llama.layers(config)
    if config.flag("use_post_norm"):
        described = [with_output_norms(layer, "post_norm1", "post_norm2") for layer in described]
    scale = config.number("attention_multiplier", llama.head_dim(config) ** -0.5)
    return with_multipliers(described, config, scale)


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    return multiplied_ends(config, config.number("logits_scaling"))
