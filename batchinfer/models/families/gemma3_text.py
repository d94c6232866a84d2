"""Gemma 3 (Gemma Team 2025): Gemma 2 with norms of queries and keys, and a rotary embedding for each type of layer."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import gemma2, llama
from batchinfer.models.layer import Layer
from batchinfer.models.rope import Rope, RopeFields, read_rope

ARCHITECTURES = ("Gemma3ForCausalLM",)
DEFAULTS: dict[str, Any] = gemma2.DEFAULTS | {
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "rope_local_base_freq": None,
    "sliding_window_pattern": 6, "rope_theta": 1e6,
    # Files of wrappers leave out what is as in the first model.
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "max_position_embeddings": 131072,
}  # fmt: skip
FIXED, ends = gemma2.FIXED, gemma2.ends
SLIDING, FULL = "sliding_attention", "full_attention"


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    every = config.size("sliding_window_pattern")
    types = [SLIDING if (i + 1) % every else FULL for i in range(config.size("num_hidden_layers"))]
    window = config.size_or_none("sliding_window")
    local = config.number("rope_local_base_freq", 10000.0)
    described = llama.layers(config, window=window, types=types, ropes=ropes(config, local), head_norm=True)
    return [gemma2.between_norms(layer, config) for layer in described]


def ropes(config: ConfigFile, local: float) -> dict[str, Rope]:
    """Return the rotary embedding of each type of layer. `local` is the default of theta in layers with a window.

    Older files scale the embedding of the other layers only.
    """
    d = llama.head_dim(config)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and any(isinstance(value, dict) for value in parameters.values()):
        kept = config.changed(rope_scaling=None)
        thetas = {SLIDING: local, FULL: config.number("rope_theta")}
        return {kind: read_rope(kept, d, RopeFields(kind, theta)) for kind, theta in thetas.items()}
    full = read_rope(config, d)
    plain = config.changed(rope_parameters=None, rope_scaling=None, rope_theta=local)
    return {FULL: full, SLIDING: read_rope(plain, d)}
