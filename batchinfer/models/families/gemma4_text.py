"""Gemma 4 (Gemma Team 2026): heads of two sizes, layers without keys of their own, and embeddings for each layer.

The mixture of experts (26B-A4B) is refused: `enable_moe_block`.
"""

from dataclasses import replace
from typing import Any

from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import llama
from batchinfer.models.feed_forward import FeedForward
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.mixer import Attention
from batchinfer.models.per_layer import PerLayerBlock, PerLayerEmbeddings
from batchinfer.models.rope import RopeFields, no_rope, read_rope
from batchinfer.models.tensors import Matrix, Norm

ARCHITECTURES = ("Gemma4ForCausalLM",)
SLIDING, FULL = "sliding_attention", "full_attention"
ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
"""Rotary embedding of each type of layer, where the file does not say."""
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "attention_bias": False, "sliding_window": 512,
    "final_logit_softcapping": None, "use_bidirectional_attention": None, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    # Sizes of layers that see all positions, as the models were published, and as transformers saves them.
    "global_head_dim": 512, "num_global_key_value_heads": None, "per_layer_config": None,
}  # fmt: skip
FIXED: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "enable_moe_block": False,
}  # fmt: skip
UNREAD = ("self_attn.k_proj.", "self_attn.v_proj.", "self_attn.k_norm.", "self_attn.v_norm.")
"""Tensors that the published models hold for layers that read the keys and values of others."""


def layers(config: ConfigFile) -> list[Layer]:
    """Describe the layers that `config.json` asks for."""
    if config.get("use_bidirectional_attention") not in (None, "vision"):
        raise ValueError(
            f"config.json: use_bidirectional_attention is {config.get('use_bidirectional_attention')!r}; supported are "
            "null and 'vision', which is for images alone"
        )
    if config.get("rope_scaling") is not None:
        raise ValueError("config.json: rope_scaling is not read for Gemma 4; give each type of layer rope_parameters")
    types = _types(config)
    sizes = _sizes(config, types)
    plain = {size: _plain(config, types, sizes, size) for size in dict.fromkeys(sizes)}
    first_sharing = _first_sharing(config, types)
    described: list[Layer] = []
    for i, (kind, size) in enumerate(zip(types, sizes, strict=True)):
        layer = _as_gemma(plain[size][i], config)
        if kind == FULL and config.flag("attention_k_eq_v"):
            a = layer.attention
            layer = replace(layer, mixer=replace(a, v=replace(a.v, name=a.k.name)))
        if i >= first_sharing:
            source = max(j for j in range(first_sharing) if types[j] == kind)
            layer = _sharing(layer, source, described[source].attention, config)
        described.append(layer)
    return described


def ends(config: ConfigFile) -> Ends:
    """Describe what is computed before the first layer and after the last one."""
    hidden, size = config.size("hidden_size"), config.size_or_zero("hidden_size_per_layer_input")
    per_layer = None
    if size:
        rows, vocab = config.size("vocab_size_per_layer_input"), config.size("vocab_size")
        if rows < vocab:
            raise ValueError(
                f"config.json: vocab_size_per_layer_input is {rows}, and vocab_size {vocab}: each token needs a row of "
                "the table of per-layer embeddings"
            )
        width = config.size("num_hidden_layers") * size
        # Both parts are divided by the root of 2.
        per_layer = PerLayerEmbeddings(
            size,
            Matrix("model.embed_tokens_per_layer", rows, width),
            (size / 2) ** 0.5,
            Matrix("model.per_layer_model_projection", width, hidden, factor=hidden**-0.5),
            Norm("model.per_layer_projection_norm", size, factor=0.5**0.5),
        )
    return Ends(
        Norm("model.norm", hidden),
        config.number("rms_norm_eps"),
        embedding_factor=hidden**0.5,
        softcap=config.number_or_none("final_logit_softcapping"),
        per_layer=per_layer,
    )


def _types(config: ConfigFile) -> list[str]:
    """Return the type of each layer. The last one sees all positions, whatever the file says of it."""
    default = [SLIDING if (i + 1) % 6 else FULL for i in range(config.size("num_hidden_layers"))]
    return [*llama.layer_types(config, default, config.size("sliding_window"))[:-1], FULL]


def _sizes(config: ConfigFile, types: list[str]) -> list[tuple[int, int]]:
    """Return (size of a head, number of key heads) of each layer."""
    usual = (config.size("head_dim"), config.size("num_key_value_heads"))
    if "per_layer_config" in config.fields:
        return _saved_sizes(config, usual, len(types))
    full_heads = config.size_or_none("num_global_key_value_heads") if config.flag("attention_k_eq_v") else None
    full = (config.size("global_head_dim"), usual[1] if full_heads is None else full_heads)
    return [full if kind == FULL else usual for kind in types]


def _saved_sizes(config: ConfigFile, usual: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Return the same from `per_layer_config`, which names the layers that are not as usual."""
    found = dict.fromkeys(range(count), usual)
    saved = config.object("per_layer_config")
    for key in saved.fields:
        if not key.isdecimal() or int(key) not in found:
            raise ValueError(f"config.json: per_layer_config has a key {key!r}; expected the number of a layer")
        own = saved.object(key)
        if others := sorted(own.fields.keys() - {"head_dim", "num_key_value_heads"}):
            raise ValueError(
                f"config.json: per_layer_config sets {', '.join(others)} of layer {key}; supported are head_dim and "
                "num_key_value_heads"
            )
        found[int(key)] = own.size("head_dim", usual[0]), own.size("num_key_value_heads", usual[1])
    return list(found.values())


def _plain(config: ConfigFile, types: list[str], sizes: list[tuple[int, int]], size: tuple[int, int]) -> list[Layer]:
    """Describe layers as if all had heads of this size, and so many key heads; only those that do are of use."""
    (head_dim, kv_heads), own = size, {kind for kind, of in zip(types, sizes, strict=True) if of == size}
    sized = config.changed(head_dim=head_dim, num_key_value_heads=kv_heads, layer_types=types)
    rotated = config if config.get("rope_parameters") else config.changed(rope_parameters=ROPES)
    ropes = dict.fromkeys(types, no_rope(head_dim))
    ropes |= {kind: read_rope(rotated, head_dim, RopeFields(kind, 1e4)) for kind in own}
    return llama.layers(sized, window=config.size("sliding_window"), ropes=ropes, head_norm=True)


def _as_gemma(layer: Layer, config: ConfigFile) -> Layer:
    """Set norms on both sides of each block, GELU, the scalar, and the per-layer block where the model has one."""
    hidden, size = config.size("hidden_size"), config.size_or_zero("hidden_size_per_layer_input")
    per_layer = None
    if size:
        per_layer = PerLayerBlock(
            Matrix("per_layer_input_gate", size, hidden),
            Matrix("per_layer_projection", hidden, size),
            Norm("post_per_layer_input_norm", hidden),
            "gelu_tanh",
        )
    return replace(
        layer,
        mixer=replace(layer.attention, scale=1.0, value_norm=True),
        feed_forward=replace(layer.block, activation="gelu_tanh"),
        attention_norm=Norm("post_attention_layernorm", hidden),
        mlp_norm=Norm("pre_feedforward_layernorm", hidden),
        mlp_output_norm=Norm("post_feedforward_layernorm", hidden),
        per_layer=per_layer,
        scalar="layer_scalar",
    )


def _first_sharing(config: ConfigFile, types: list[str]) -> int:
    """Return the first of the layers, up to the last one, that read the keys and values of earlier layers."""
    count = config.size_or_zero("num_kv_shared_layers")
    first = len(types) - count
    if count and (first < 1 or set(types[:first]) != set(types)):
        raise ValueError(
            f"config.json: num_kv_shared_layers is {count}: of {len(types)} layers, those before must have layers of "
            "each type whose keys and values the others can read"
        )
    return first


def _sharing(layer: Layer, source: int, read: Attention, config: ConfigFile) -> Layer:
    """Let a layer read the keys and values of the layer `source`, whose attention is `read`."""
    a, f = layer.attention, layer.block
    if (a.kv_heads, a.head_dim) != (read.kv_heads, read.head_dim):
        raise ValueError(
            f"config.json: {layer.prefix} reads the keys of layer {source}, which has {read.kv_heads} heads of "
            f"{read.head_dim}; it has {a.kv_heads} of {a.head_dim} itself"
        )
    wide = _twice_as_wide(f) if config.flag("use_double_wide_mlp") else f
    return replace(layer, mixer=replace(a, source=source), feed_forward=wide, unread=UNREAD)


def _twice_as_wide(f: FeedForward) -> FeedForward:
    assert f.gate is not None
    gate, up = (replace(matrix, rows=2 * matrix.rows) for matrix in (f.gate, f.up))
    return replace(f, gate=gate, up=up, down=replace(f.down, columns=2 * f.down.columns))
