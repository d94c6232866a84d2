"""Ministral 3 (Mistral AI 2025): Mistral with YaRN, and queries that grow with the position."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.layer import Layer
from batchinfer.models.mixer import QueryGrowth
from batchinfer.models.rope import RopeFields, read_rope

ARCHITECTURES = ("Ministral3ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends
_ROPE = RopeFields(others=frozenset({"llama_4_scaling_beta", "max_position_embeddings"}))


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for.

    Raises `ValueError` if rope_parameters are missing: their defaults are those of one model.
    """
    parameters = config.object("rope_parameters")
    if parameters.get("llama_4_scaling_beta") is None:
        raise ValueError("config.json: rope_parameters has no llama_4_scaling_beta; it must have a value")
    rope = read_rope(config, llama.head_dim(config), _ROPE)
    growth = QueryGrowth(parameters.number("llama_4_scaling_beta"), parameters.size("original_max_position_embeddings"))
    window = config.size_or_none("sliding_window")
    described = llama.layers(
        config.changed(layer_types=None), window=window, ropes={"full_attention": rope, "sliding_attention": rope}
    )
    return [replace(layer, mixer=replace(layer.attention, query_growth=growth)) for layer in described]
