"""Telling the fields of a `config.json` apart: those that are read, must have one value, or do not matter."""

from collections.abc import Mapping
from typing import Any

from batchinfer.models.config_file import ConfigFile

# Fields that are read for every family, and what transformers takes for one that is missing. A family's own `DEFAULTS`
# come on top. None stands for a field without a default.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": None, "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None,
    "num_attention_heads": None, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": None,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None,
    "original_max_position_embeddings": None, "layer_types": None, "tie_word_embeddings": False,
    "quantization_config": None,
}  # fmt: skip

# Fields that change the result, and the one value that is supported. A family's own `FIXED` come on top. The first ones
# are read by transformers for every family. With the others, other families compute something else: whoever sets them
# means such a model.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu", "partial_rotary_factor": 1.0, "is_causal": True, "is_encoder_decoder": False,
    "attention_chunk_size": None, "per_layer_config": None, "kv_sharing_modes": None,

    "residual_multiplier": 1.0, "embedding_multiplier": 1.0, "attention_multiplier": None, "logits_scaling": 1.0,
    "logit_scale": 1.0, "attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": None,
    "clip_qkv": None, "num_experts": None, "num_local_experts": None, "n_routed_experts": None, "qk_layernorm": False,
    "use_qk_norm": False, "no_rope_layers": None, "rope_interleaved": False, "parallel_attn": False, "alibi": False,
}  # fmt: skip

# Fields that never change what the model computes here, and that most checkpoints have.
_IGNORED = {
    "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "is_decoder", "label2id", "name_or_path", "pad_token_id", "pretraining_tp",
    "torch_dtype", "transformers_version", "use_cache", "return_dict", "task_specific_params", "tokenizer_class",
    "model_type", "problem_type", "finetuning_task", "prefix", "embd_pdrop", "embedding_dropout", "hidden_dropout",
    "resid_pdrop", "residual_dropout", "router_aux_loss_coef", "output_router_logits",
}  # fmt: skip


def read_fields(
    raw: Mapping[str, Any], defaults: Mapping[str, Any], fixed: Mapping[str, Any]
) -> tuple[ConfigFile, tuple[str, ...]]:
    """Return (the fields to read, with their defaults; the names of fields that are set and not known).

    `defaults` and `fixed` are a family's own. Fields that are not known are not read by transformers either. Raises
    `ValueError` for a field that would change the result.
    """
    if "auto_map" in raw:
        raise ValueError("config.json: auto_map asks to run code from the checkpoint, which is never done")
    defaults, fixed = {**_DEFAULTS, **defaults}, {**_FIXED, **fixed}
    read = {key: value for key, value in defaults.items() if value is not None}
    unknown = []
    for key, value in raw.items():
        if key in defaults:
            read[key] = value
        elif key in fixed:
            if value is not None and value != fixed[key]:
                raise ValueError(f"config.json: {key} is {value!r}; supported is {_shown(fixed[key])}")
        elif key not in _IGNORED and not key.startswith("_") and value not in (None, False, {}, []):
            unknown.append(key)
    return ConfigFile(read), tuple(unknown)


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
