"""Hunyuan (Tencent 2025): Llama with norms of queries and keys behind rotary embedding, whose base may be stretched."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.layer import Layer
from batchinfer.models.tensors import Norm

ARCHITECTURES = ("HunYuanDenseV1ForCausalLM",)
DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-5, "attention_bias": False}
# The first files say what all of them do, and have fields of larger models.
FIXED: dict[str, Any] = {"use_qk_norm": True, "use_rotary_pos_emb": True, "use_cla": False}
ends = llama.ends
# Files call the stretched base a dynamic scaling, and give fields of other scalings with it, which nothing reads.
_STRETCHED = {
    "type", "rope_type", "rope_theta", "alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
}  # fmt: skip


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    stretched = config.changed(
        **{key: _stretched(config, key) for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    )
    return [_with_norms_behind_rope(layer) for layer in llama.layers(stretched)]


def _stretched(config: ConfigFile, key: str) -> dict[str, Any]:
    """Return the parameters of rotary embedding, with the base that `alpha` asks for in the place of `alpha`."""
    rope = config.object(key)
    if (rope.get("rope_type") or rope.get("type")) != "dynamic" or not rope.get("alpha"):
        return rope.fields
    if unknown := sorted(rope.fields.keys() - _STRETCHED):
        raise ValueError(f"{rope.name} has a field {unknown[0]!r}, which is not known beside alpha")
    d = llama.head_dim(config)
    theta = (rope if "rope_theta" in rope.fields else config).number("rope_theta")
    return {"rope_type": "default", "rope_theta": theta * rope.number("alpha") ** (d / (d - 2))}


def _with_norms_behind_rope(layer: Layer) -> Layer:
    """Normalize each head of queries and keys after rotary embedding."""
    a = layer.attention
    norms = (Norm("self_attn.query_layernorm", a.head_dim), Norm("self_attn.key_layernorm", a.head_dim))
    return replace(layer, mixer=replace(a, head_norms=norms, normed_after_rope=True))
