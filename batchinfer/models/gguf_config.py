"""Making a checkpoint's `config.json` from a GGUF model. This module does not import torch.

`_FACTS` says of fields of `config.json` what in the file they are taken from: fields in one line mean the same in
different families. A model gets those that its family reads, and on top what its architecture alone knows.
"""

from collections.abc import Callable
from typing import Any

from batchinfer.formats.gguf_parts import GGUFParts
from batchinfer.models.config import FAMILIES
from batchinfer.models.gguf_architectures import ARCHITECTURES, Architecture
from batchinfer.models.gguf_entries import Entries, shown
from batchinfer.models.gguf_rope import rope_parameters

_RMS_NORM, _LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
Fact = Callable[[Entries], Any]
_FACTS: tuple[tuple[str, Fact], ...] = (
    ("vocab_size", lambda e: e.file.tensors["token_embd.weight"].shape[0]),
    ("hidden_size", lambda e: e.size("embedding_length")),
    ("num_hidden_layers", lambda e: e.layers),
    ("num_attention_heads", lambda e: e.size("attention.head_count")),
    ("num_key_value_heads", lambda e: e.number("attention.head_count_kv", e.size("attention.head_count"))),
    ("head_dim", lambda e: e.head_dim),
    ("max_position_embeddings", lambda e: e.number("context_length")),
    ("tie_word_embeddings", lambda e: "output.weight" not in e.file.tensors),
    ("rms_norm_eps", lambda e: None if e.has(_LAYER_NORM) else e.number(_RMS_NORM)),
    ("layer_norm_eps norm_epsilon", lambda e: e.number(_LAYER_NORM)),
    ("norm_eps", lambda e: e.number(_LAYER_NORM if e.has(_LAYER_NORM) else _RMS_NORM)),
    ("sliding_window", lambda e: e.number_or_none("attention.sliding_window")),
    ("attention_multiplier", lambda e: e.number("attention.scale", e.head_dim**-0.5)),
    ("embedding_multiplier", lambda e: e.number("embedding_scale", 1.0)),
    ("residual_multiplier", lambda e: e.number("residual_scale", 1.0)),
    ("logits_scaling logit_scale", lambda e: e.number("logit_scale", 1.0)),
    ("attn_logit_softcapping", lambda e: e.number_or_none("attn_logit_softcapping")),
    ("final_logit_softcapping", lambda e: e.number_or_none("final_logit_softcapping")),
    ("clip_qkv", lambda e: e.number_or_none("attention.clamp_kqv")),
    # Biases and norms of heads: those that are stored.
    ("attention_bias qkv_bias use_qkv_bias use_bias", lambda e: e.biased("attn_q") or e.biased("attn_qkv")),
    ("attention_out_bias", lambda e: e.biased("attn_output")),
    ("mlp_bias", lambda e: e.biased("ffn_up")),
    ("qk_layernorm use_qk_norm", lambda e: any(e.having("attn_q_norm.weight"))),
    # Feed-forward blocks have the sizes of their tensors: not all files say them.
    ("intermediate_size", lambda e: e.inner("ffn_down") or e.inner("ffn_down_exps")),
    ("moe_intermediate_size", lambda e: e.inner("ffn_down_exps")),
    ("shared_expert_intermediate_size shared_intermediate_size", lambda e: e.inner("ffn_down_shexp")),
    (
        "n_shared_experts num_shared_experts moe_num_shared_experts",
        lambda e: e.inner("ffn_down_shexp") // max(1, e.inner("ffn_down_exps")),
    ),
    # Layers with experts: those where they are stored.
    ("first_k_dense_replace num_dense_layers", lambda e: [*_mixtures(e), True].index(True)),
    ("mlp_only_layers", lambda e: [i for i, mixture in enumerate(_mixtures(e)) if not mixture]),
    ("mlp_layer_types", lambda e: ["sparse" if mixture else "dense" for mixture in _mixtures(e)]),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", lambda e: e.number("expert_count", 0)),
    ("num_experts_per_tok moe_k", lambda e: e.number("expert_used_count", 0)),
    ("routed_scaling_factor", lambda e: e.number_or_none("expert_weights_scale") or 1.0),
    ("n_group", lambda e: e.number_or_none("expert_group_count") or 1),
    ("topk_group", lambda e: e.number_or_none("expert_group_used_count") or 1),
    ("use_expert_bias", lambda e: any(e.having("exp_probs_b.bias"))),
    # Gated DeltaNets and short convolutions.
    ("linear_conv_kernel_dim", lambda e: e.size("ssm.conv_kernel")),
    ("linear_key_head_dim", lambda e: e.size("ssm.state_size")),
    ("linear_num_key_heads", lambda e: e.size("ssm.group_count")),
    ("linear_num_value_heads", lambda e: e.size("ssm.time_step_rank")),
    ("linear_value_head_dim", lambda e: e.size("ssm.inner_size") // e.size("ssm.time_step_rank")),
    ("conv_L_cache", lambda e: e.size("shortconv.l_cache")),
)
_FIELDS = {name: fact for names, fact in _FACTS for name in names.split()}
_OF_ALL = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
"""The fields of all families."""

# Entries that llama.cpp reads and that change the result, each with the value that changes nothing. A family that reads
# one of them takes what is there.
_NEUTRAL = {
    "attention.causal": True, "attention.clamp_kqv": 0.0, "attention.scale": 0.0, "attention.sliding_window": 0,
    "attention.temperature_scale": 0.0, "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0,
    "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "expert_count": 0, "expert_group_count": 1,
    "expert_weights_scale": 1.0, "rope.scale_linear": 1.0, "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0,
}  # fmt: skip


def entries_of(file: GGUFParts) -> Entries:
    """Take the entries from a file. Raises `ValueError` if its architecture is not supported."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ValueError(f"{file.path}: general.architecture is {shown(name)}; expected a str")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture is {shown(name)}; supported are {', '.join(ARCHITECTURES)} "
            "(Mistral and Mixtral say llama): take the model in the Hugging Face layout, if its family is supported"
        )
    return Entries(file, name)


def config_of(entries: Entries) -> dict[str, Any]:
    """Return `config.json`. Raises `ValueError` for an entry that is missing or asks for another computation."""
    architecture, tensors = ARCHITECTURES[entries.name], entries.file.tensors
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{entries.file.path} has no tensor token_embd.weight")
    name, own = architecture.family_of(entries), architecture.fields(entries)
    known = FAMILIES[name].DEFAULTS
    config: dict[str, Any] = {"model_type": name, "dtype": _dtype(entries.file)}
    for key in dict.fromkeys((*_OF_ALL, *known)):
        if key in _FIELDS and key not in own:
            config[key] = _FIELDS[key](entries)
    if "norm_topk_prob" in known:
        config["norm_topk_prob"] = entries.flag("expert_weights_norm", architecture.normalized)
    if architecture.every:
        config["layer_types"] = _layer_types(entries, architecture.every)
    if "rope_parameters" not in own:
        partial = not {"partial_rotary_factor", "rotary_pct"}.isdisjoint(known)
        config["rope_parameters"] = rope_parameters(entries, partial)
    _refuse_other_models(entries, architecture)
    return config | own


def _refuse_other_models(entries: Entries, architecture: Architecture) -> None:
    """Raise `ValueError` for an entry that asks for another computation."""
    size = entries.head_dim
    as_usual = {
        "attention.key_length_swa": size, "rope.freq_base_swa": entries.number("rope.freq_base", 10000.0),
        "expert_weights_norm": architecture.normalized,
    }  # fmt: skip
    unread = {key: value for key, value in (_NEUTRAL | as_usual).items() if key not in entries.read}
    entries.refuse_others(unread | {"attention.value_length": size, "expert_gating_func": architecture.scores})


def _layer_types(entries: Entries, every: int) -> list[str]:
    """Return the type of each layer's attention."""
    if not entries.number_or_none("attention.sliding_window"):
        return ["full_attention"] * entries.layers
    return ["sliding_attention" if window else "full_attention" for window in entries.windowed(every)]


def _dtype(file: GGUFParts) -> str:
    return "float32" if all(tensor.type == "F32" for tensor in file.tensors.values()) else "bfloat16"


def _mixtures(entries: Entries) -> list[bool]:
    """Return whether each layer has experts."""
    return entries.having("ffn_gate_inp.weight")
