"""The architectures of GGUF files: the family of each, and what is its own. This module does not import torch.

Rows of queries and keys of the `interleaved` ones are in the order in which rotary embedding pairs neighbours: it is
that of the checkpoint, or llama.cpp's converter put them so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchinfer.models.gguf_entries import Entries, shown
from batchinfer.models.gguf_rope import rope_parameters, ropes_by_type

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3
"""Numbers of the scores by which experts are chosen."""


def _none(entries: Entries) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`."""

    family: str
    variants: Mapping[str, str] = field(default_factory=dict)
    """Other families, by an entry that only their files have. The first one that is there decides."""
    same: tuple[str, ...] = ()  # families whose files are read as this one, which computes the same
    fields: Callable[[Entries], dict[str, Any]] = _none  # of config.json: those of this architecture alone
    interleaved: bool = False
    every: int = 0  # which layers have no window where the file does not say; 0: windows are the same in all layers
    scores: int = SOFTMAX  # of experts
    normalized: bool = True  # whether the weights of chosen experts are divided by their sum where the file is silent
    tiled: bool = False  # whether neighbouring heads of a DeltaNet's values belong to different heads of its keys

    def family_of(self, entries: Entries) -> str:
        """Return the family of a file."""
        return next((name for key, name in self.variants.items() if entries.number_or_none(key)), self.family)

    @property
    def families(self) -> set[str]:
        """The families that files of this architecture hold."""
        return {self.family, *self.variants.values(), *self.same}


def _granite(entries: Entries) -> dict[str, Any]:
    entries.refuse_others({"rope.scaling.finetuned": True})  # which means that nothing is rotated
    return {}


def _gemma2(entries: Entries) -> dict[str, Any]:
    return {
        "sliding_window": entries.number("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _scaled_by(entries, layers_of_27b=46),
        "attn_logit_softcapping": entries.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": entries.number("final_logit_softcapping", 30.0),
    }


def _gemma3(entries: Entries) -> dict[str, Any]:
    return {
        "rope_parameters": ropes_by_type(entries, 1e6, 10000.0),
        "query_pre_attn_scalar": _scaled_by(entries, layers_of_27b=62),
    }


def _gemma4(entries: Entries) -> dict[str, Any]:
    """Return the fields of Gemma 4. Entries without `swa` in their names are those of layers without a window."""
    layers, heads, tensors = entries.layers, entries.size("attention.head_count"), entries.file.tensors
    shared = entries.number("attention.shared_kv_layers", 0)
    inner = entries.by_layer("feed_forward_length")
    usual, wide = [inner[0]] * layers, [*[inner[0]] * (layers - shared), *[2 * inner[0]] * shared]
    if inner not in (usual, wide):
        raise ValueError(
            f"{entries.file.path}: gemma4.feed_forward_length is {shown(inner)}; supported is one size, or twice that "
            f"in the last {shared} layers, which share keys"
        )
    windows = entries.by_layer("attention.sliding_window_pattern")
    size, size_in_windows = entries.head_dim, entries.size("attention.key_length_swa", entries.head_dim)
    entries.refuse_others(dict.fromkeys(("attention.value_length_swa", "rope.dimension_count_swa"), size_in_windows))
    kv_heads = entries.by_layer("attention.head_count_kv", heads)
    per_layer = tensors.get("per_layer_token_embd.weight")
    storing = [i for i in range(layers - shared) if not windows[i]]
    return {
        "rope_parameters": ropes_by_type(entries, 1e6, 10000.0),
        "sliding_window": entries.number("attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "intermediate_size": inner[0],
        "num_key_value_heads": kv_heads[0],
        "per_layer_config": {
            str(i): {"head_dim": size_in_windows if window else size, "num_key_value_heads": kv}
            for i, (window, kv) in enumerate(zip(windows, kv_heads, strict=True))
        },
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": inner != usual,
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in tensors for i in storing),
        "hidden_size_per_layer_input": 0 if per_layer is None else entries.size("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": None if per_layer is None else per_layer.shape[0],
        "enable_moe_block": bool(entries.number_or_none("expert_count")),
    }


def _scaled_by(entries: Entries, layers_of_27b: int) -> int:
    """Return what scores are divided by the root of: a head's size, but for Gemma's models of 27B."""
    if entries.layers == layers_of_27b:
        return entries.size("embedding_length") // entries.size("attention.head_count")
    return entries.head_dim


def _gpt_oss(entries: Entries) -> dict[str, Any]:
    rope = rope_parameters(entries)
    return {"rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {})}


def _ministral3(entries: Entries) -> dict[str, Any]:
    growth = entries.number_or_none("attention.temperature_scale")
    return {"rope_parameters": rope_parameters(entries) | ({"llama_4_scaling_beta": growth} if growth else {})}


def _olmo(entries: Entries) -> dict[str, Any]:
    return {"attention_bias": False}  # the converter puts weights in another order, and leaves biases as they are


def _olmo2(entries: Entries) -> dict[str, Any]:
    windows = entries.number_or_none("attention.sliding_window")
    return {"rope_parameters": ropes_by_type(entries, 10000.0)} if windows else {}


def _mellum(entries: Entries) -> dict[str, Any]:
    return {"rope_parameters": ropes_by_type(entries, 10000.0)}


def _phi3(entries: Entries) -> dict[str, Any]:
    original = entries.size("rope.scaling.original_context_length", entries.size("context_length"))
    return {"original_max_position_embeddings": original}


def _ernie4_5_moe(entries: Entries) -> dict[str, Any]:
    return {
        "moe_layer_start_index": entries.number("leading_dense_block_count", 0),
        "moe_layer_end_index": -1,
        "moe_layer_interval": entries.number("interleave_moe_layer_step"),
    }


def _lfm2(entries: Entries) -> dict[str, Any]:
    return {"layer_types": _kinds(entries, "full_attention", "conv"), "block_auto_adjust_ff_dim": False}


def _qwen3_5(entries: Entries) -> dict[str, Any]:
    return {"layer_types": _kinds(entries, "full_attention", "linear_attention")}


def _gpt_neox(entries: Entries) -> dict[str, Any]:
    return {"use_parallel_residual": entries.flag("use_parallel_residual", True)}


def _stablelm(entries: Entries) -> dict[str, Any]:
    return {"use_parallel_residual": not any(entries.having("ffn_norm.weight"))}


def _kinds(entries: Entries, with_attention: str, others: str) -> list[str]:
    """Return the type of each layer: what is stored is there."""
    return [with_attention if attends else others for attends in entries.having("attn_q.weight")]


ARCHITECTURES = {
    "arcee": Architecture("arcee", interleaved=True),
    "chatglm": Architecture("glm", interleaved=True),
    "cohere2": Architecture("cohere2", interleaved=True, every=4),
    "command-r": Architecture("cohere", interleaved=True),
    "dots1": Architecture("dots1", scores=SIGMOID, normalized=False),
    "ernie4_5": Architecture("ernie4_5", interleaved=True),
    "ernie4_5-moe": Architecture("ernie4_5_moe", fields=_ernie4_5_moe, interleaved=True),
    "exaone-moe": Architecture("exaone_moe", every=4, scores=SIGMOID, normalized=False),
    "exaone4": Architecture("exaone4", every=4),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", fields=_gemma2, every=2),
    "gemma3": Architecture("gemma3_text", fields=_gemma3, every=6),
    "gemma4": Architecture("gemma4_text", same=("gemma4_unified_text",), fields=_gemma4),
    "glm4": Architecture("glm4", interleaved=True),
    "glm4moe": Architecture("glm4_moe", same=("solar_open",), scores=SIGMOID, normalized=False),
    "gpt-oss": Architecture("gpt_oss", fields=_gpt_oss, every=2, scores=SOFTMAX_OF_CHOSEN),
    "gptneox": Architecture("gpt_neox", fields=_gpt_neox),
    "granite": Architecture("granite", same=("granitemoehybrid",), fields=_granite, interleaved=True),
    "granitemoe": Architecture(
        "granite", {"expert_count": "granitemoeshared"}, ("granitemoe",), fields=_granite, interleaved=True
    ),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "jais2": Architecture("jais2"),
    "lfm2": Architecture("lfm2", fields=_lfm2),
    "lfm2moe": Architecture("lfm2_moe", fields=_lfm2, scores=SIGMOID),
    "llama": Architecture(
        "llama",
        {"expert_count": "mixtral", "attention.sliding_window": "mistral"},
        ("internlm3", "iquestcoder"),
        interleaved=True,
    ),
    "mellum": Architecture("mellum", fields=_mellum, every=4),
    "minimax-m2": Architecture("minimax_m2", scores=SIGMOID),
    "mistral3": Architecture(
        "mistral", {"attention.temperature_scale": "ministral3"}, fields=_ministral3, interleaved=True
    ),
    "nemotron": Architecture("nemotron"),
    "olmo": Architecture("olmo", fields=_olmo, interleaved=True),
    "olmo2": Architecture("olmo2", {"attention.sliding_window": "olmo3"}, fields=_olmo2, every=4),
    "olmoe": Architecture("olmoe", normalized=False),
    "phi2": Architecture("phi"),
    "phi3": Architecture("phi3", fields=_phi3),
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture("qwen2_moe", normalized=False),
    "qwen2vl": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen35": Architecture("qwen3_5_text", fields=_qwen3_5, tiled=True),
    "qwen35moe": Architecture("qwen3_5_moe_text", fields=_qwen3_5, tiled=True),
    "qwen3moe": Architecture("qwen3_moe"),
    "qwen3next": Architecture("qwen3_next", fields=_qwen3_5),
    "qwen3vl": Architecture("qwen3"),
    "qwen3vlmoe": Architecture("qwen3_moe"),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", interleaved=True),
    "stablelm": Architecture("stablelm", fields=_stablelm),
    "starcoder2": Architecture("starcoder2"),
}
"""The architectures by their names. The language models of Qwen's vision models are read for text."""
