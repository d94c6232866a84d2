"""Rotary embedding of a GGUF model, as `rope_parameters` of `config.json`. This module does not import torch."""

from typing import Any

from batchinfer.models.gguf_entries import Entries

DIVISORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = (DIVISORS, SHORT, LONG)
"""Tensors that are read here."""


def rope_parameters(entries: Entries, partial: bool = False, theta: float = 10000.0) -> dict[str, Any]:
    """Return the parameters; `theta` is that of files that do not say. With `partial`, a part of heads may be rotated.

    Raises `ValueError` for an entry that is missing or not supported.
    """
    size = entries.head_dim
    rope = {"rope_theta": entries.number("rope.freq_base", theta), **_scaling(entries)}
    if partial:
        rope["partial_rotary_factor"] = entries.size("rope.dimension_count", size) / size
    else:
        entries.refuse_others({"rope.dimension_count": size})
    return rope


def ropes_by_type(entries: Entries, theta: float, local: float | None = None) -> dict[str, Any]:
    """Return the parameters of layers with and without a window. Only those without one are scaled.

    `theta` and `local` are those of files that do not say; without `local`, both types have the same.
    """
    full = rope_parameters(entries, theta=theta)
    own = entries.number("rope.freq_base_swa", full["rope_theta"] if local is None else local)
    return {"sliding_attention": {"rope_type": "default", "rope_theta": own}, "full_attention": full}


def _scaling(entries: Entries) -> dict[str, Any]:
    """Return what is scaled. Files hold the scalings of Llama 3.1 and of Phi as tensors of divisors."""
    if DIVISORS in entries.file.tensors:
        return {"rope_type": "divided", "divisors": entries.rope_numbers(DIVISORS)}
    kind, original = entries.text_or_none("rope.scaling.type"), "rope.scaling.original_context_length"
    if kind == "longrope" or LONG in entries.file.tensors:
        return {
            "rope_type": "longrope",
            "short_factor": entries.rope_numbers(SHORT),
            "long_factor": entries.rope_numbers(LONG),
            "original_max_position_embeddings": entries.size(original, entries.size("context_length")),
            "attention_factor": entries.number("rope.scaling.attn_factor", 1.0),
        }
    factor = entries.number("rope.scaling.factor", 1.0)
    if kind == "none" or (kind is None and factor in (0, 1)):
        return {"rope_type": "default"}
    if kind != "yarn":
        return {"rope_type": kind or "linear", "factor": factor}  # llama.cpp takes linear if the file does not say
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": entries.size(original, entries.size("context_length")),
        "beta_fast": entries.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": entries.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if multiplier := entries.number_or_none("rope.scaling.yarn_log_multiplier"):
        rope |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    return rope
