"""Llama (Touvron et al. 2023). The other families here are variations of its layer."""

from collections.abc import Mapping
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.feed_forward import FeedForward
from batchinfer.models.layer import LAYERS, Ends, Layer
from batchinfer.models.mixer import Attention
from batchinfer.models.rope import Rope, read_rope
from batchinfer.models.tensors import Matrix, Norm

ARCHITECTURES = ("LlamaForCausalLM",)
DEFAULTS: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
# transformers keeps that many positions of a cache, but lets a prompt see all of its own.
FIXED: dict[str, Any] = {"sliding_window": None}


def layers(
    config: ConfigFile,
    *,
    window: int | None = None,
    types: list[str] | None = None,
    ropes: Mapping[str, Rope] | None = None,
    head_norm: bool = False,
    qkv_bias: bool = False,
) -> list[Layer]:
    """Describe the layers that `config.json` asks for.

    `window` is the attention window of the layers that `layer_types` names, or `types` if the file does not have it (by
    default all layers). `ropes` holds the rotary embedding of each type. Raises `ValueError` for sizes that do not fit
    together.
    """
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    d = head_dim(config)
    inner = config.size("intermediate_size")
    bias, mlp_bias = config.flag("attention_bias"), config.flag("mlp_bias")
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * config.size("num_hidden_layers")
    types = layer_types(config, types, window)
    if ropes is None:
        ropes = dict.fromkeys(types, read_rope(config, d))

    def layer(i: int, kind: str) -> Layer:
        rope = ropes[kind]
        order = rope.order(interleaved=False)
        norms = (Norm("self_attn.q_norm", d, order=order), Norm("self_attn.k_norm", d, order=order))
        attention = Attention(
            heads,
            kv_heads,
            d,
            window if kind == "sliding_attention" else None,
            q=Matrix("self_attn.q_proj", heads * d, hidden, qkv_bias or bias, order=order),
            k=Matrix("self_attn.k_proj", kv_heads * d, hidden, qkv_bias or bias, order=order),
            v=Matrix("self_attn.v_proj", kv_heads * d, hidden, qkv_bias or bias),
            output=Matrix("self_attn.o_proj", hidden, heads * d, bias),
            rope=rope,
            scale=d**-0.5,
            head_norms=norms if head_norm else None,
        )
        feed_forward = FeedForward(
            gate=Matrix("mlp.gate_proj", inner, hidden, mlp_bias),
            up=Matrix("mlp.up_proj", inner, hidden, mlp_bias),
            down=Matrix("mlp.down_proj", hidden, inner, mlp_bias),
        )
        return Layer(
            f"{LAYERS}{i}.",
            mixer=attention,
            feed_forward=feed_forward,
            input_norm=Norm("input_layernorm", hidden),
            mlp_norm=Norm("post_attention_layernorm", hidden),
        )

    return [layer(i, kind) for i, kind in enumerate(types)]


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    return Ends(Norm("model.norm", config.size("hidden_size")), config.number("rms_norm_eps"))


def head_dim(config: ConfigFile) -> int:
    """Return the size of a head. Raises `ValueError` if it is not even or does not follow from the other sizes."""
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    d = config.size("head_dim", hidden // heads)
    if d % 2:
        raise ValueError(
            f"config.json: head_dim is {d}; it must be even, because rotary embedding takes pairs of numbers"
        )
    return d


def head_dim_of_hidden(config: ConfigFile) -> int:
    """Return the size of a head. Raises `ValueError` unless the heads' sizes add up to the hidden size."""
    d, expected = head_dim(config), config.size("hidden_size") / config.size("num_attention_heads")
    if d != expected:
        raise ValueError(
            f"config.json: head_dim is {d}; for this model_type it must be hidden_size / num_attention_heads, "
            f"{expected:g}"
        )
    return d


def layer_types(config: ConfigFile, default: list[str], window: int | None) -> list[str]:
    """Return the type of each layer's attention: full_attention or sliding_attention."""
    kinds = named_kinds(config, default, "sliding_attention")
    if "sliding_attention" in kinds and window is None:
        raise ValueError("config.json: layer_types has sliding_attention, but there is no sliding_window")
    return kinds


def named_kinds(config: ConfigFile, default: list[str], other: str) -> list[str]:
    """Return the type of each layer, full_attention or `other`: `default` if the file does not have `layer_types`."""
    count, kinds = config.size("num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        kinds = default
    if not isinstance(kinds, list) or len(kinds) != count or any(k not in ("full_attention", other) for k in kinds):
        raise ValueError(f"config.json: layer_types must name full_attention or {other} for {count} layers")
    return kinds


def hybrid_kinds(config: ConfigFile, default: list[str], other: str) -> list[str]:
    """Return the type of each layer, as `named_kinds`; at least one must have attention."""
    kinds = named_kinds(config, default, other)
    if "full_attention" not in kinds:
        raise ValueError("config.json: layer_types has no full_attention; at least one layer must have it")
    return kinds
