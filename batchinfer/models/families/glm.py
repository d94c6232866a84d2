"""GLM-4 (Zhipu 2024): Llama with half of each head rotated, in pairs of neighbours, and gate and up in one module."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import (
    with_fused_gate_up,
    with_output_bias,
    with_pairs_of_neighbours,
)
from batchinfer.models.layer import Layer
from batchinfer.models.rope import RopeFields, read_rope

ARCHITECTURES = ("GlmForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 0.00000015625, "attention_bias": True,
    "partial_rotary_factor": 0.5,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    rope = read_rope(config, llama.head_dim(config), RopeFields(partial=True))
    described = llama.layers(config, ropes={"full_attention": rope})
    turned = [with_pairs_of_neighbours(with_output_bias(layer, False)) for layer in described]
    return [with_fused_gate_up(layer) for layer in turned]
