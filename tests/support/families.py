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
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5,
}  # fmt: skip
QWEN_3_5 = {
    "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("arcee", {"mlp_bias": True}),
    "cwm": ("cwm", {"head_dim": 16, "sliding_window": 24, "layer_types": ALTERNATING}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    "exaone4": ("exaone4", {"head_dim": 16, "sliding_window": 24, "layer_types": ALTERNATING}),
    "exaone4, no windows": ("exaone4", {"head_dim": 16, "sliding_window": None, "layer_types": [FULL] * 3}),
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
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 32, "attention_bias": False}),
    "granite": ("granite", MULTIPLIERS | {"attention_bias": True, "mlp_bias": True}),
    "granitemoehybrid": ("granitemoehybrid", GRANITE_4 | {"position_embedding_type": "rope"}),
    "granitemoehybrid, no rope": ("granitemoehybrid", GRANITE_4 | {"position_embedding_type": "nope"}),
    "helium": ("helium", {"head_dim": 16, "attention_bias": True}),
    "hyperclovax": ("hyperclovax", MULTIPLIERS | {"attention_multiplier": None}),
    "internlm3": ("internlm3", {"head_dim": 16}),
    "iquestcoder": ("iquestcoder", {"head_dim": 16}),
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
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 24, "layer_types": [FULL, SLIDING, SLIDING]}),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}}),
    "mistral": ("mistral", {"sliding_window": 24}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 24, "layer_types": ALTERNATING}),
    "phi3": ("phi3", {"sliding_window": 40}),
    "phi3, part of a head": ("phi3", {"partial_rotary_factor": 0.5}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_5_text": (
        "qwen3_5_text",
        QWEN_3_5 | {"attention_bias": True, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "qwen3_5_text, by turns": ("qwen3_5_text", QWEN_3_5 | {"full_attention_interval": 2, "num_hidden_layers": 4}),
    "qwen3_next": (
        "qwen3_next",
        QWEN_3_5 | {"num_experts": 0, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_out_bias": True}),
    "seed_oss, output without bias": ("seed_oss", {"head_dim": 16}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, windows": ("smollm3", {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 24}),
    "vaultgemma": ("vaultgemma", GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
}  # fmt: skip

QUICK = [case for case in CASES if "," not in case]
"""One case of each family."""

RECURRENT = ["lfm2", "qwen3_5_text", "qwen3_next"]
"""The families with layers that keep a state; no GPU has kernels for them yet."""


def made(make_model: Callable[..., Path], case: str, **shape: int) -> Path:
    family, changes = CASES[case]
    return make_model(family, **{"tie_word_embeddings": False, "pad_token_id": None, **shape, **changes})
