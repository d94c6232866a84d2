"""What llama.cpp's converter writes of a checkpoint's config: the entries of a GGUF file, and divisors of RoPE."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURES = {
    "cohere": "command-r", "ernie4_5_moe": "ernie4_5-moe", "exaone_moe": "exaone-moe", "gemma3_text": "gemma3",
    "gemma4_text": "gemma4", "gemma4_unified_text": "gemma4", "glm": "chatglm", "glm4_moe": "glm4moe",
    "gpt_neox": "gptneox", "gpt_oss": "gpt-oss", "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense", "internlm3": "llama", "iquestcoder": "llama", "lfm2_moe": "lfm2moe",
    "minimax_m2": "minimax-m2", "ministral3": "mistral3", "mistral": "llama", "mixtral": "llama", "olmo3": "olmo2",
    "phi": "phi2", "qwen2_moe": "qwen2moe", "qwen3_5_moe_text": "qwen35moe", "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe", "qwen3_next": "qwen3next", "solar_open": "glm4moe",
}  # fmt: skip
"""Names the architecture of each family whose name differs."""


def architecture_of(config: dict[str, Any]) -> str:
    family: str = config["model_type"]
    if family == "granitemoehybrid":  # without Mamba
        return "granitemoe" if config["num_local_experts"] else "granite"
    return ARCHITECTURES.get(family, family)


def config_of(model: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return config


_NUMBERS = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "layer_norm_eps": "attention.layer_norm_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon", "norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts": "expert_count", "num_local_experts": "expert_count", "n_routed_experts": "expert_count",
    "moe_num_experts": "expert_count", "num_experts_per_tok": "expert_used_count", "moe_k": "expert_used_count",
    "n_group": "expert_group_count", "topk_group": "expert_group_used_count",
}  # fmt: skip
"""What the converter writes of every family."""
_OF_DEEPSEEK = {
    "routed_scaling_factor": "expert_weights_scale", "norm_topk_prob": "expert_weights_norm",
    "first_k_dense_replace": "leading_dense_block_count",
}  # fmt: skip
_OF_GRANITE = {
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip
_OF_DELTA_NET = {
    "linear_conv_kernel_dim": "ssm.conv_kernel", "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count", "linear_num_value_heads": "ssm.time_step_rank",
}  # fmt: skip
_WINDOW = {"sliding_window": "attention.sliding_window"}
_OWN: dict[str, dict[str, str]] = {
    "cohere": {"logit_scale": "logit_scale"},
    "cohere2": {"logit_scale": "logit_scale"} | _WINDOW,
    "dots1": _OF_DEEPSEEK,
    "ernie4_5_moe": {
        "moe_layer_interval": "interleave_moe_layer_step", "moe_layer_start_index": "leading_dense_block_count",
    },
    "exaone4": _WINDOW,
    "exaone_moe": _OF_DEEPSEEK | _WINDOW,
    "gemma2": _WINDOW | {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
    "gemma3_text": _WINDOW,
    "gemma4_text": _WINDOW,
    "gemma4_unified_text": _WINDOW,
    "glm4_moe": _OF_DEEPSEEK,
    "gpt_neox": {"use_parallel_residual": "use_parallel_residual"},
    "gpt_oss": _WINDOW,
    "granite": _OF_GRANITE,
    "granitemoe": _OF_GRANITE,
    "granitemoehybrid": _OF_GRANITE,
    "granitemoeshared": _OF_GRANITE,
    "lfm2": {"conv_L_cache": "shortconv.l_cache"},
    "lfm2_moe": {"conv_L_cache": "shortconv.l_cache"},
    "mellum": _WINDOW,
    "nemotron": {"norm_eps": "attention.layer_norm_epsilon"},
    "olmo": {"clip_qkv": "attention.clamp_kqv"},
    "olmo3": _WINDOW,
    "phi3": _WINDOW,
    "qwen3_5_moe_text": _OF_DELTA_NET,
    "qwen3_5_text": _OF_DELTA_NET,
    "qwen3_next": _OF_DELTA_NET,
    "solar_open": _OF_DEEPSEEK,
}  # fmt: skip
"""What it writes of one family, beside that."""


def entries_of(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of the architecture, without its name before them."""
    family = config["model_type"]
    numbers = list(_NUMBERS.items()) + list(_OWN.get(family, {}).items())
    found = {key: config[field] for field, key in numbers if config.get(field) is not None}
    parameters = config["rope_parameters"]
    rope = parameters.get("full_attention", parameters)
    found["rope.freq_base"] = rope["rope_theta"]
    if rope["rope_type"] == "yarn":
        found |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": rope["beta_fast"], "rope.scaling.yarn_beta_slow": rope["beta_slow"],
        }  # fmt: skip
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    part = rope.get("partial_rotary_factor")
    if config.get("rotary_dim") is not None:
        part = config["rotary_dim"] / size
    if part is not None and not family.startswith("gemma4"):
        found["rope.dimension_count"] = int(size * part)
    types = config.get("layer_types")
    if "attention.sliding_window" in found and types and family in ("exaone4", "exaone_moe", "mellum", "olmo3"):
        found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in types]
    if "sliding_attention" in parameters:
        found["rope.freq_base_swa"] = parameters["sliding_attention"]["rope_theta"]
    return found | _more(family, config, rope)


def _more(family: str, config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """What no field says as it is."""
    kv = config["num_key_value_heads"] if "num_key_value_heads" in config else config["num_attention_heads"]
    if family in ("lfm2", "lfm2_moe"):
        attends = [kind == "full_attention" for kind in config["layer_types"]]
        more: dict[str, Any] = {"attention.head_count_kv": [kv if there else 0 for there in attends]}
        if family == "lfm2" and config["block_auto_adjust_ff_dim"]:
            inner = int(config["block_ffn_dim_multiplier"] * int(2 * config["intermediate_size"] / 3))
            grain = config["block_multiple_of"]
            more["feed_forward_length"] = -(-inner // grain) * grain
        return more | ({"expert_gating_func": 2} if family == "lfm2_moe" else {})
    if family in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"):
        return {"ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"]}
    if family in ("glm4_moe", "solar_open"):
        return {"expert_gating_func": 2}
    if family == "olmo":
        return {"attention.layer_norm_epsilon": 1e-5}
    if family == "granitemoehybrid":
        return {"rope.scaling.finetuned": True}
    if family == "hunyuan_v1_dense" and rope["rope_type"] == "dynamic":
        d = config["head_dim"]
        stretched = rope["rope_theta"] * rope["alpha"] ** (d / (d - 2))
        return {"rope.freq_base": stretched, "rope.scaling.type": "none", "rope.scaling.factor": 1.0}
    if family == "ministral3":
        return {
            "attention.temperature_scale": rope["llama_4_scaling_beta"],
            "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"],
        }
    if family == "phi3":
        original = config["original_max_position_embeddings"]
        more = {"rope.scaling.original_context_length": original}
        if rope["rope_type"] == "longrope":
            scale = config["max_position_embeddings"] / original
            more["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(scale) / np.log(original)))
        return more
    if family.startswith("gemma4"):
        return _of_gemma4(config)
    return {}


def _of_gemma4(config: dict[str, Any]) -> dict[str, Any]:
    windows = [kind == "sliding_attention" for kind in config["layer_types"]]
    count, usual, heads = config["num_hidden_layers"], config["intermediate_size"], config["num_key_value_heads"]
    full = next(iter(config["per_layer_config"].values()))
    own = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), full["head_dim"])
    own |= {f"{key}_swa": config["head_dim"] for key in own}
    own["attention.sliding_window_pattern"] = windows
    own["attention.shared_kv_layers"] = config["num_kv_shared_layers"]
    own["embedding_length_per_layer_input"] = config.get("hidden_size_per_layer_input", 0)
    if config["final_logit_softcapping"]:
        own["final_logit_softcapping"] = config["final_logit_softcapping"]
    if config["use_double_wide_mlp"]:
        first = count - config["num_kv_shared_layers"]
        own["feed_forward_length"] = [usual if i < first else 2 * usual for i in range(count)]
    if "num_key_value_heads" in full:
        own["attention.head_count_kv"] = [heads if window else full["num_key_value_heads"] for window in windows]
    return own


def divisors_of(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """The tensors of numbers by which rotary embedding divides."""
    rope = config["rope_parameters"]
    if config["model_type"].startswith("gemma4"):
        half = next(iter(config["per_layer_config"].values()))["head_dim"] // 2
        turned = int(half * rope["full_attention"]["partial_rotary_factor"])
        return {"rope_freqs": np.array([1.0] * turned + [1e30] * (half - turned), np.float32)}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")}
    return {}
