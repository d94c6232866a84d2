"""Granite with experts and one that all tokens share (IBM 2025)."""

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import granitemoe, llama
from batchinfer.models.families.mixtures import block
from batchinfer.models.families.variations import fused_block, with_multipliers
from batchinfer.models.feed_forward import FeedForward
from batchinfer.models.layer import Layer

ARCHITECTURES = ("GraniteMoeSharedForCausalLM",)
DEFAULTS = granitemoe.DEFAULTS | {"shared_intermediate_size": 0}
FIXED = granitemoe.FIXED
ends = granitemoe.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    described = [
        granitemoe.with_fused_experts(layer, config, shared(layer, config))
        for layer in llama.layers(config.changed(layer_types=None))
    ]
    return with_multipliers(described, config, config.number("attention_multiplier"))


def shared(layer: Layer, config: ConfigFile) -> FeedForward | None:
    """Describe the block that all tokens pass through, or None if its size is 0."""
    inner = config.whole("shared_intermediate_size")
    if not inner:
        return None
    names = ("input_linear", "input_linear", "output_linear")
    return fused_block(block("shared_mlp", layer.block.up.columns, inner, names), "shared_mlp.input_linear")
