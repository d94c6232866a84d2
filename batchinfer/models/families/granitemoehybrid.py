"""Granite 4 (IBM 2025) without Mamba layers and without experts: Granite with gate and up in one module."""

from dataclasses import replace

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import granite, llama
from batchinfer.models.families.variations import with_fused_gate_up, with_multipliers
from batchinfer.models.layer import Layer
from batchinfer.models.rope import no_rope, read_rope

ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)
DEFAULTS = granite.DEFAULTS | {
    "shared_intermediate_size": 1024, "position_embedding_type": "nope", "num_local_experts": 8,
    "layers_block_type": None,
}  # fmt: skip
FIXED = granite.FIXED
ends = granite.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for. Raises `ValueError` for layers with Mamba or with experts."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    count = config.size("num_hidden_layers")
    if kinds is None or len(kinds) != count or any(kind not in ("attention", "full_attention") for kind in kinds):
        raise ValueError(
            f"config.json: layer_types of {count} layers is {kinds!r}; only layers of attention are supported"
        )
    if config.get("num_local_experts"):
        raise ValueError(f"config.json: num_local_experts is {config.get('num_local_experts')}; only 0 is supported")
    d = llama.head_dim(config)
    kind = config.get("position_embedding_type")
    rope = read_rope(config, d) if kind == "rope" else no_rope(d)
    plain = config.changed(layer_types=None, intermediate_size=config.size("shared_intermediate_size"))
    fused = [
        with_fused_gate_up(layer, "shared_mlp.input_linear")
        for layer in llama.layers(plain, ropes={"full_attention": rope})
    ]
    return with_multipliers([_renamed(layer) for layer in fused], config, config.number("attention_multiplier"))


def _renamed(layer: Layer) -> Layer:
    f = layer.feed_forward
    return replace(layer, feed_forward=replace(f, down=replace(f.down, name="shared_mlp.output_linear")))
