"""A small model of each family that GGUF files hold, with what llama.cpp's converter keeps of its config."""

from copy import deepcopy
from typing import Any

from families import ALTERNATING, CASES, LONG, YARN

PROPORTIONAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
ADAPTED: dict[str, dict[str, Any]] = {
    "arcee": {},
    "cohere": {"tie_word_embeddings": True},
    "cohere, no norms of heads": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "attention_bias": False, "num_hidden_layers": 5, "layer_types": None},
    "dots1": {"sliding_window": None},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "ernie4_5_moe, few layers": {},
    "exaone_moe": {},
    "exaone4": {},
    "exaone4, no windows": {},
    "gemma": {},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "num_hidden_layers": 7, "layer_types": None},
    "gemma4_text": {"rope_parameters": PROPORTIONAL, "attention_k_eq_v": False, "num_global_key_value_heads": None},
    "gemma4_text, like 31B": {"rope_parameters": PROPORTIONAL, "layer_types": ALTERNATING, "attention_bias": False},
    "gemma4_unified_text": {"rope_parameters": PROPORTIONAL, "layer_types": ALTERNATING},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt_neox": {},
    "gpt_neox, one block after the other": {"attention_bias": True},
    "gpt_oss": {"rope_parameters": {**YARN, "truncate": False, "mscale": None, "mscale_all_dim": None}},
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "granitemoehybrid, experts": {},
    "granitemoehybrid": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_dense, plain": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "lfm2": {"conv_bias": False},
    "lfm2, not adjusted": {},
    "lfm2_moe": {"tie_word_embeddings": True, "routed_scaling_factor": 1.0},
    "llama": {},
    "mellum": {"mlp_layer_types": ["sparse"] * 3},
    "minimax_m2": {},
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"norm_topk_prob": False},
    "phi": {"qk_layernorm": False},
    "phi3": {},
    "phi3, part of a head": {
        "rope_parameters": LONG | {"original_max_position_embeddings": 128}, "original_max_position_embeddings": 128,
    },
    "qwen2": {"use_sliding_window": False},
    "qwen2_moe": {"use_sliding_window": False, "mlp_only_layers": []},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_5_text": {},
    "qwen3_5_moe_text": {},
    "qwen3_next": {"mlp_only_layers": []},
    "seed_oss": {},
    "seed_oss, output without bias": {},
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": None},
    "solar_open": {"partial_rotary_factor": 1.0},
    "stablelm": {},
    "stablelm, one block after the other": {},
    "starcoder2": {"sliding_window": None},
}  # fmt: skip
"""Lists, by the name of a case, the fields that differ there, because the converter has no entry for them."""


def gguf_case(case: str) -> tuple[str, dict[str, Any]]:
    """The family, and the fields of its config: copies, because transformers changes lists that it is given."""
    family, fields = CASES[case]
    changed = deepcopy({"tie_word_embeddings": False, "pad_token_id": None, **fields, **ADAPTED[case]})
    return family, {key: _without_none(value) for key, value in changed.items() if key != "layer_types" or value}


def _without_none(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
