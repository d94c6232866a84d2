"""Phi-3 and Phi-4 (Microsoft 2024): Mistral with fused matrices, LongRoPE, and a part of each head rotated."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import with_fused_gate_up, with_fused_qkv
from batchinfer.models.layer import Layer
from batchinfer.models.rope import RopeFields, read_rope

ARCHITECTURES = ("Phi3ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
FIXED: dict[str, Any] = {"attention_bias": False}
ends = llama.ends
# The first files call LongRoPE by other names.
_ROPE = RopeFields(partial=True, names=(("su", "longrope"), ("yarn", "longrope")))


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    window = config.size_or_none("sliding_window")
    rope = read_rope(config, llama.head_dim(config), _ROPE)
    ropes = {"full_attention": rope, "sliding_attention": rope}
    described = llama.layers(config.changed(layer_types=None), window=window, ropes=ropes)
    return [with_fused_gate_up(with_fused_qkv(layer)) for layer in described]
