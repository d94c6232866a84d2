"""LFM2 (Liquid AI 2025): short convolutions, and attention in some of the layers."""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.mixer import ShortConvolution
from batchinfer.models.tensors import Matrix, Norm, Vectors

ARCHITECTURES = ("Lfm2ForCausalLM",)
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8, "norm_eps": 1e-5, "tie_word_embeddings": True, "tie_embedding": None, "rope_theta": 1e6,
    "conv_bias": False, "conv_L_cache": 3, "full_attn_idxs": None, "block_ff_dim": None, "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
}  # fmt: skip
FIXED: dict[str, Any] = {"block_use_swiglu": True, "use_pos_enc": True}


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    plain = config.changed(layer_types=None, intermediate_size=_inner(config), attention_bias=False, mlp_bias=False)
    described = [_renamed(layer) for layer in llama.layers(plain, head_norm=True)]
    convolution = _convolution(config)
    kinds = _kinds(config)
    return [
        layer if kind == "full_attention" else replace(layer, mixer=convolution)
        for kind, layer in zip(kinds, described, strict=True)
    ]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    tied = config.flag("tie_word_embeddings" if config.get("tie_embedding") is None else "tie_embedding", True)
    return Ends(Norm("model.embedding_norm", config.size("hidden_size")), config.number("norm_eps"), tied=tied)


def _kinds(config: ConfigFile) -> list[str]:
    """Return the type of each layer; `full_attn_idxs` names those with attention in older files."""
    numbers = config.get("full_attn_idxs")
    if numbers is not None and (not isinstance(numbers, list) or any(type(number) is not int for number in numbers)):
        raise ValueError(f"config.json: full_attn_idxs is {numbers!r}; it must be a list of layers' numbers")
    count = config.size("num_hidden_layers")
    default = ["full_attention" if numbers is None or i in numbers else "conv" for i in range(count)]
    return llama.hybrid_kinds(config, default, "conv")


def _inner(config: ConfigFile) -> int:
    """Return the size of feed-forward blocks, which the file states before it is adjusted."""
    inner = config.size("intermediate_size" if config.get("block_ff_dim") is None else "block_ff_dim")
    if not config.flag("block_auto_adjust_ff_dim", True):
        return inner
    grain = config.size("block_multiple_of")
    adjusted = int(config.number("block_ffn_dim_multiplier") * int(2 * inner / 3))
    return -(-adjusted // grain) * grain


def _convolution(config: ConfigFile) -> ShortConvolution:
    hidden, bias, length = config.size("hidden_size"), config.flag("conv_bias"), config.size("conv_L_cache")
    if length < 2:
        raise ValueError(f"config.json: conv_L_cache is {length}; it must be at least 2")
    parts = [Matrix("conv.in_proj", hidden, hidden, bias, first=i * hidden, module_rows=3 * hidden) for i in range(3)]
    return ShortConvolution(
        length,
        bcx=(parts[0], parts[1], parts[2]),
        output=Matrix("conv.out_proj", hidden, hidden, bias),
        taps=Vectors("conv.conv.weight", (hidden, 1, length)),
        taps_bias=Vectors("conv.conv.bias", (hidden,)) if bias else None,
    )


def _renamed(layer: Layer) -> Layer:
    """Give Llama's modules the names that they have here."""
    a, f = layer.attention, layer.block
    assert f.gate is not None
    norms = (Norm("self_attn.q_layernorm", a.head_dim), Norm("self_attn.k_layernorm", a.head_dim))
    hidden = a.output.rows
    return replace(
        layer,
        mixer=replace(a, output=replace(a.output, name="self_attn.out_proj"), head_norms=norms),
        feed_forward=replace(
            f,
            gate=replace(f.gate, name="feed_forward.w1"),
            up=replace(f.up, name="feed_forward.w3"),
            down=replace(f.down, name="feed_forward.w2"),
        ),
        input_norm=Norm("operator_norm", hidden),
        mlp_norm=Norm("ffn_norm", hidden),
    )
