"""Llama (Touvron et al. 2023). The other families here are variations of its layer."""

from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.layer import LAYERS, Attention, FeedForward, Layer, Matrix, Norm

ARCHITECTURES = ("LlamaForCausalLM",)
DEFAULTS: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
# transformers keeps that many positions of a cache, but lets a prompt see all of its own.
FIXED: dict[str, Any] = {"sliding_window": None}


def layers(
    config: ConfigFile,
    *,
    window: int | None = None,
    first_window: int = 0,
    head_norm: bool = False,
    qkv_bias: bool = False,
) -> list[Layer]:
    """Describe the layers that `config.json` asks for.

    `window` is the attention window of the layers that `layer_types` names, or, if the file has no `layer_types`, of
    the layers from `first_window` on. Raises `ValueError` for sizes that do not fit together.
    """
    heads, hidden = config.size("num_attention_heads"), config.size("hidden_size")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    d = config.size("head_dim", hidden // heads)
    if d % 2:
        raise ValueError(
            f"config.json: head_dim is {d}; it must be even, because rotary embedding takes pairs of numbers"
        )
    inner = config.size("intermediate_size")
    bias, mlp_bias = config.flag("attention_bias"), config.flag("mlp_bias")

    def layer(i: int, window: int | None) -> Layer:
        attention = Attention(
            heads,
            kv_heads,
            d,
            window,
            q=Matrix("self_attn.q_proj", heads * d, hidden, qkv_bias or bias),
            k=Matrix("self_attn.k_proj", kv_heads * d, hidden, qkv_bias or bias),
            v=Matrix("self_attn.v_proj", kv_heads * d, hidden, qkv_bias or bias),
            output=Matrix("self_attn.o_proj", hidden, heads * d, bias),
            head_norms=(Norm("self_attn.q_norm", d), Norm("self_attn.k_norm", d)) if head_norm else None,
        )
        feed_forward = FeedForward(
            gate=Matrix("mlp.gate_proj", inner, hidden, mlp_bias),
            up=Matrix("mlp.up_proj", inner, hidden, mlp_bias),
            down=Matrix("mlp.down_proj", hidden, inner, mlp_bias),
        )
        return Layer(
            f"{LAYERS}{i}.",
            input_norm=Norm("input_layernorm", hidden),
            attention=attention,
            mlp_norm=Norm("post_attention_layernorm", hidden),
            feed_forward=feed_forward,
        )

    return [layer(i, window) for i, window in enumerate(_windows(config, window, first_window))]


def _windows(config: ConfigFile, window: int | None, first: int) -> list[int | None]:
    count, kinds = config.size("num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(count)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
        raise ValueError(f"config.json: layer_types must name full_attention or sliding_attention for {count} layers")
    if "sliding_attention" in kinds and window is None:
        raise ValueError("config.json: layer_types has sliding_attention, but there is no sliding_window")
    return [window if kind == "sliding_attention" else None for kind in kinds]
