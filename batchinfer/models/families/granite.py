"""Granite 3 and 4 (IBM 2024): Llama with four multipliers."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import multiplied_ends, with_multipliers
from batchinfer.models.layer import Ends, Layer

ARCHITECTURES = ("GraniteForCausalLM",)
DEFAULTS = llama.DEFAULTS | {
    "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
}  # fmt: skip
FIXED = llama.FIXED


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return with_multipliers(llama.layers(config), config, config.number("attention_multiplier"))


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    return multiplied_ends(config, 1 / config.number("logits_scaling"))
