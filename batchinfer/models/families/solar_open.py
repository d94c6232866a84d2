"""Solar Open (Upstage 2026): Llama with experts in all layers, chosen as in DeepSeek-V3."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import glm4_moe, llama
from batchinfer.models.families.variations import with_output_bias
from batchinfer.models.layer import Layer
from batchinfer.models.rope import RopeFields, read_rope

ARCHITECTURES = ("SolarOpenForCausalLM",)
DEFAULTS: dict[str, Any] = glm4_moe.DEEPSEEK | {
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "attention_bias": False,
    "moe_intermediate_size": 1280, "partial_rotary_factor": 1.0,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = llama.ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    rope = read_rope(config, llama.head_dim(config), RopeFields(partial=True))
    plain = config.changed(layer_types=None, intermediate_size=config.size("moe_intermediate_size"))
    described = llama.layers(plain, ropes={"full_attention": rope})
    return [glm4_moe.with_deepseek_experts(with_output_bias(layer, False), config) for layer in described]
