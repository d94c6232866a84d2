"""Qwen3.5 and Qwen3.6 (Qwen Team 2026): gated DeltaNets, and attention with an output gate in every fourth layer."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.families.gemma import around_one
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.mixer import Attention, GatedDeltaNet
from batchinfer.models.rope import RopeFields, read_rope
from batchinfer.models.tensors import Matrix, Norm, Vectors

ARCHITECTURES = ("Qwen3_5ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4, "head_dim": 256, "attention_bias": False, "partial_rotary_factor": 0.25,
    "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
FIXED: dict[str, Any] = {"attn_output_gate": True, "mamba_ssm_dtype": "float32"}
_ROPE = RopeFields(partial=True, others=frozenset({"mrope_section", "mrope_interleaved"}))


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    return hybrid(config, delta_net(config))


def hybrid(config: ConfigFile, linear: GatedDeltaNet) -> list[Layer]:
    """Describe layers of attention with an output gate, and layers with this mixer, as `layer_types` names them."""
    plain = config.changed(layer_types=None, mlp_bias=False)
    rope = read_rope(config, llama.head_dim(config), _ROPE)
    described = [_around_one(layer) for layer in llama.layers(plain, ropes={"full_attention": rope}, head_norm=True)]
    return [
        replace(layer, mixer=_gated(layer.attention) if kind == "full_attention" else linear)
        for kind, layer in zip(_kinds(config), described, strict=True)
    ]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one.

    The layers that predict several tokens are left aside: drafts are found without them.
    """
    return Ends(
        around_one(Norm("model.norm", config.size("hidden_size"))), config.number("rms_norm_eps"), left_aside=("mtp.",)
    )


def _kinds(config: ConfigFile) -> list[str]:
    """Return the type of each layer."""
    every = config.size("full_attention_interval", 4)
    count = config.size("num_hidden_layers")
    default = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    return llama.hybrid_kinds(config, default, "linear_attention")


def _around_one(layer: Layer) -> Layer:
    """Let the norms of the residual stream store their weights' distance from 1."""
    return replace(layer, input_norm=around_one(layer.input_norm), mlp_norm=around_one(layer.mlp_norm))


def _gated(a: Attention) -> Attention:
    """Add the output gate, whose rows lie behind the queries of each head, and norms of heads around 1."""
    d = a.head_dim
    plain = tuple(range(d))
    q = replace(a.q, module_rows=2 * a.q.rows, order=a.q.order or plain, head_rows=2 * d)
    assert a.head_norms is not None
    norms = [around_one(replace(norm, order=a.q.order)) for norm in a.head_norms]
    return replace(a, q=q, gate=replace(q, first=d, order=plain), head_norms=(norms[0], norms[1]))


def delta_net(config: ConfigFile) -> GatedDeltaNet:
    """Describe the mixer of the layers with linear attention."""
    hidden, length = config.size("hidden_size"), config.size("linear_conv_kernel_dim")
    heads, key_heads = config.size("linear_num_value_heads"), config.size("linear_num_key_heads")
    key_dim, value_dim = config.size("linear_key_head_dim"), config.size("linear_value_head_dim")
    if heads % key_heads:
        raise ValueError(
            f"config.json: linear_num_value_heads {heads} is not a multiple of linear_num_key_heads {key_heads}"
        )
    if length < 2:
        raise ValueError(f"config.json: linear_conv_kernel_dim is {length}; it must be at least 2")
    keys, values = key_heads * key_dim, heads * value_dim
    channels, name = 2 * keys + values, "linear_attn.in_proj_qkv"
    return GatedDeltaNet(
        heads,
        key_heads,
        key_dim,
        value_dim,
        length,
        qkv=(
            Matrix(name, keys, hidden, module_rows=channels),
            Matrix(name, keys, hidden, first=keys, module_rows=channels),
            Matrix(name, values, hidden, first=2 * keys, module_rows=channels),
        ),
        z=Matrix("linear_attn.in_proj_z", values, hidden),
        rates=(Matrix("linear_attn.in_proj_b", heads, hidden), Matrix("linear_attn.in_proj_a", heads, hidden)),
        output=Matrix("linear_attn.out_proj", hidden, values),
        taps=Vectors("linear_attn.conv1d.weight", (channels, 1, length)),
        decay_log=Vectors("linear_attn.A_log", (heads,)),
        decay_bias=Vectors("linear_attn.dt_bias", (heads,)),
        norm=Norm("linear_attn.norm", value_dim),
    )
