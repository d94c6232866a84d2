"""GPT-NeoX (Black et al. 2022) and Pythia: both blocks in parallel, LayerNorm, and one matrix for q, k and v."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import (
    layer_norm_ends,
    read_activation,
    with_heads_of_qkv,
    with_layer_norms,
    with_names,
    without_gate,
)
from batchinfer.models.layer import LAYERS, Ends, Layer
from batchinfer.models.rope import RopeFields, read_rope

ARCHITECTURES = ("GPTNeoXForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000.0,
    "use_parallel_residual": True, "attention_bias": True,
}  # fmt: skip
FIXED: dict[str, Any] = {}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    config = config.changed(
        rope_theta=config.number("rotary_emb_base"),
        partial_rotary_factor=config.number("rotary_pct"),
        num_key_value_heads=None,
        mlp_bias=True,
    )
    rope = read_rope(config, llama.head_dim_of_hidden(config), RopeFields(partial=True))
    parallel, activation = config.flag("use_parallel_residual"), read_activation(config)

    def renamed(layer: Layer) -> Layer:
        named = with_names(layer, output="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
        prefix = "gpt_neox.layers." + layer.prefix.removeprefix(LAYERS)
        return replace(with_heads_of_qkv(named, "attention.query_key_value"), prefix=prefix, parallel=parallel)

    described = llama.layers(config, ropes={"full_attention": rope})
    return [renamed(without_gate(with_layer_norms(layer), activation)) for layer in described]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    plain = layer_norm_ends(config)
    norm = replace(plain.norm, name="gpt_neox.final_layer_norm")
    return replace(plain, norm=norm, embedding="gpt_neox.embed_in", head="embed_out")
