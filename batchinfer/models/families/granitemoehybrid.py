"""Granite 4 (IBM 2025) without Mamba layers: Granite with a block that all tokens share, and experts or none."""

from dataclasses import replace

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import granite, granitemoe, granitemoeshared, llama
from batchinfer.models.families.variations import with_multipliers
from batchinfer.models.layer import Layer
from batchinfer.models.rope import no_rope, read_rope

ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)
DEFAULTS = granitemoe.DEFAULTS | {
    "shared_intermediate_size": 1024, "position_embedding_type": "nope", "layers_block_type": None,
}  # fmt: skip
FIXED = granite.FIXED
ends = granite.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for. Raises `ValueError` for layers with Mamba."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    count = config.size("num_hidden_layers")
    if kinds is None or len(kinds) != count or any(kind not in ("attention", "full_attention") for kind in kinds):
        raise ValueError(
            f"config.json: layer_types of {count} layers is {kinds!r}; only layers of attention are supported"
        )
    d = llama.head_dim(config)
    kind = config.get("position_embedding_type")
    rope = read_rope(config, d) if kind == "rope" else no_rope(d)
    plain = config.changed(layer_types=None, intermediate_size=config.size("shared_intermediate_size"))
    described = [_with_experts(layer, config) for layer in llama.layers(plain, ropes={"full_attention": rope})]
    return with_multipliers(described, config, config.number("attention_multiplier"))


def _with_experts(layer: Layer, config: ConfigFile) -> Layer:
    shared = granitemoeshared.shared(layer, config)
    assert shared is not None
    if not config.whole("num_local_experts"):
        return replace(layer, feed_forward=shared)
    return granitemoe.with_fused_experts(layer, config, shared)
