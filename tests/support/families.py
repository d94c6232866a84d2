"""A small model of each family, in which each switch of the config does something."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
ALTERNATING = [SLIDING, FULL, SLIDING]
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1,
}  # fmt: skip
GRANITE_4 = MULTIPLIERS | {
    "layer_types": [FULL] * 3, "num_local_experts": 0, "shared_intermediate_size": 160, "mamba_n_heads": 4,
}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 40, "sliding_window": 24, "layer_types": ALTERNATING}
GEMMA_4 = {
    "head_dim": 16, "global_head_dim": 32, "sliding_window": 24, "layer_types": [SLIDING, FULL, FULL],
    "final_logit_softcapping": 3.0, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 320,
    "tie_word_embeddings": True,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4, "factor": 2.0},
    },
}  # fmt: skip
SHARING = {"num_kv_shared_layers": 1, "use_double_wide_mlp": True}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "routed_scaling_factor": 1.5, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
STRETCHED = {
    "rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
QWEN_3_5 = {
    "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("arcee", {"mlp_bias": True}),
    "cohere": ("cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.3}),
    "cohere, no norms of heads": ("cohere", {"logit_scale": 0.3}),
    "cohere2": ("cohere2", {"sliding_window": 24, "layer_types": ALTERNATING, "attention_bias": True}),
    "cwm": ("cwm", {"head_dim": 16, "sliding_window": 24, "layer_types": ALTERNATING}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "dots1": (
        "dots1",
        DEEPSEEK | {"head_dim": 16, "attention_bias": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2, "moe_intermediate_size": 32,
         "moe_layer_start_index": 1, "moe_layer_end_index": -1},
    ),
    "ernie4_5_moe, few layers": (
        "ernie4_5_moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 0, "moe_intermediate_size": 32,
         "moe_layer_start_index": 0, "moe_layer_end_index": 1, "moe_layer_interval": 2},
    ),
    "exaone_moe": (
        "exaone_moe",
        {**DEEPSEEK, "head_dim": 16, "num_experts": 8, "num_shared_experts": 2, "sliding_window": 24,
         "layer_types": ALTERNATING, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "exaone4": ("exaone4", {"head_dim": 16, "sliding_window": 24, "layer_types": ALTERNATING}),
    "exaone4, no windows": ("exaone4", {"head_dim": 16, "sliding_window": None, "layer_types": [FULL] * 3}),
    "flex_olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma2, no caps": ("gemma2", GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text": ("gemma3_text", GEMMA | {"tie_word_embeddings": True}),
    "gemma3_text, scaled": (
        "gemma3_text",
        GEMMA
        | {
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            }
        },
    ),
    "gemma4_text": ("gemma4_text", GEMMA_4 | SHARING | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4_text, like E2B": (
        "gemma4_text",
        GEMMA_4
        | {"num_hidden_layers": 7, "num_kv_shared_layers": 3, "use_double_wide_mlp": True}
        | {"layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL], "attention_bias": True},
    ),
    "gemma4_text, like 31B": (
        "gemma4_text",
        GEMMA_4
        | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"layer_types": [FULL, SLIDING, FULL], "attention_bias": True, "final_logit_softcapping": None},
    ),
    "gemma4_unified_text": (
        "gemma4_unified_text", GEMMA_4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 32, "attention_bias": False}),
    "glm4_moe": ("glm4_moe", DEEPSEEK | {"head_dim": 32, "attention_bias": True, "use_qk_norm": True}),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64,
         "sliding_window": 24, "layer_types": ALTERNATING, "rope_parameters": YARN | {"truncate": False}},
    ),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "gpt_neox, one block after the other": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "granite": ("granite", MULTIPLIERS | {"attention_bias": True, "mlp_bias": True}),
    "granitemoe": (
        "granitemoe",
        MULTIPLIERS | {"num_local_experts": 4, "intermediate_size": 64, "attention_bias": True},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        MULTIPLIERS | {"num_local_experts": 4, "intermediate_size": 64, "shared_intermediate_size": 32},
    ),
    "granitemoeshared, nothing shared": ("granitemoeshared", {"num_local_experts": 4, "intermediate_size": 64}),
    "granitemoehybrid, experts": (
        "granitemoehybrid",
        GRANITE_4 | {"position_embedding_type": "rope", "num_local_experts": 4, "intermediate_size": 64},
    ),
    "granitemoehybrid": ("granitemoehybrid", GRANITE_4 | {"position_embedding_type": "rope"}),
    "granitemoehybrid, no rope": ("granitemoehybrid", GRANITE_4 | {"position_embedding_type": "nope"}),
    "helium": ("helium", {"head_dim": 16, "attention_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16, "attention_bias": True, "rope_parameters": STRETCHED}),
    "hunyuan_v1_dense, plain": ("hunyuan_v1_dense", {"head_dim": 16}),
    "hyperclovax": ("hyperclovax", MULTIPLIERS | {"attention_multiplier": None}),
    "internlm3": ("internlm3", {"head_dim": 16}),
    "iquestcoder": ("iquestcoder", {"head_dim": 16}),
    "jais2": ("jais2", {"head_dim": 16}),
    "lfm2": (
        "lfm2",
        {
            "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.5,
        },
    ),
    "lfm2, not adjusted": (
        "lfm2", {"full_attn_idxs": [0, 2], "conv_L_cache": 4, "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_experts": 6,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32, "routed_scaling_factor": 1.5},
    ),
    "lfm2_moe, no bias": (
        "lfm2_moe",
        {"layer_types": ["full_attention", "conv", "conv"], "num_dense_layers": 0, "num_experts": 6,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32, "use_expert_bias": False, "norm_topk_prob": False},
    ),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mellum": (
        "mellum",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "sliding_window": 24, "layer_types": ALTERNATING, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "minimax_m2": (
        "minimax_m2",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "rotary_dim": 8},
    ),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 24, "layer_types": [FULL, SLIDING, SLIDING]}),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "intermediate_size": 64, "sliding_window": 24}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 24, "layer_types": ALTERNATING}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "norm_topk_prob": True}),
    "nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "olmo": ("olmo", {"clip_qkv": 1.0}),
    "olmo, biases": ("olmo", {"attention_bias": True}),
    "phi": ("phi", {"qk_layernorm": True}),
    "phi, exact GELU": ("phi", {"hidden_act": "gelu", "partial_rotary_factor": 0.25}),
    "phi3": ("phi3", {"sliding_window": 40}),
    "phi3, part of a head": ("phi3", {"partial_rotary_factor": 0.5}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1],
         "shared_expert_intermediate_size": 64, "use_sliding_window": True, "sliding_window": 24,
         "max_window_layers": 2},
    ),
    "qwen2_moe, normalized": (
        "qwen2_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True,
         "shared_expert_intermediate_size": 64, "decoder_sparse_step": 2, "qkv_bias": False},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "norm_topk_prob": True, "attention_bias": True},
    ),
    "qwen3_moe, windows": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1],
         "use_sliding_window": True, "sliding_window": 24},
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        QWEN_3_5 | {"attention_bias": True, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "qwen3_5_text, by turns": ("qwen3_5_text", QWEN_3_5 | {"full_attention_interval": 2, "num_hidden_layers": 4}),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        QWEN_3_5 | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 64,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "qwen3_next": (
        "qwen3_next",
        QWEN_3_5 | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1],
         "shared_expert_intermediate_size": 64,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "qwen3_next, no experts": (
        "qwen3_next",
        QWEN_3_5 | {"num_experts": 0, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_out_bias": True}),
    "seed_oss, output without bias": ("seed_oss", {"head_dim": 16}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, windows": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 24}),
    "solar_open": ("solar_open", DEEPSEEK | {"head_dim": 16, "attention_bias": True}),
    "stablelm": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}),
    "stablelm, one block after the other": ("stablelm", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {"sliding_window": 24}),
    "starcoder2, no biases": ("starcoder2", {"use_bias": False}),
    "vaultgemma": ("vaultgemma", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
}  # fmt: skip

QUICK = [case for case in CASES if "," not in case]
"""One case of each family."""

RECURRENT = ["lfm2", "lfm2_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"]
"""The families with layers that keep a state; no GPU has kernels for them yet."""


def made(make_model: Callable[..., Path], case: str, **shape: int) -> Path:
    family, changes = CASES[case]
    return make_model(family, **{"tie_word_embeddings": False, "pad_token_id": None, **changes, **shape})
