"""StableLM 2 (Bellagente et al. 2024): Llama with LayerNorm and a part of each head rotated."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.variations import (
    in_parallel,
    layer_norm_ends,
    with_head_norms,
    with_layer_norms,
    with_output_bias,
)
from batchinfer.models.layer import Layer
from batchinfer.models.rope import RopeFields, read_rope
from batchinfer.models.tensors import Norm

ARCHITECTURES = ("StableLmForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_qkv_bias": False,
    "qk_layernorm": False, "use_parallel_residual": False,
}  # fmt: skip
FIXED: dict[str, Any] = {}
ends = layer_norm_ends


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    rope = read_rope(config, llama.head_dim_of_hidden(config), RopeFields(partial=True))
    same = config.changed(attention_bias=config.flag("use_qkv_bias"))
    described = llama.layers(same, ropes={"full_attention": rope})
    described = [with_layer_norms(with_output_bias(layer, False)) for layer in described]
    if config.flag("qk_layernorm"):
        described = [_with_norm_for_each_head(layer) for layer in described]
    return [in_parallel(layer) for layer in described] if config.flag("use_parallel_residual") else described


def _with_norm_for_each_head(layer: Layer) -> Layer:
    """Normalize heads by LayerNorms with weights of their own, each in a module of its own."""
    a = layer.attention

    def norm(name: str, heads: int) -> Norm:
        modules = tuple(f"{name}.norms.{i}" for i in range(heads))
        return Norm(name, a.head_dim, centered=True, heads=heads, modules=modules)

    return with_head_norms(layer, norm("self_attn.q_layernorm", a.heads), norm("self_attn.k_layernorm", a.kv_heads))
