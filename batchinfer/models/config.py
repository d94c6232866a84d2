"""`ModelConfig`: the shape of a decoder, read from a checkpoint's `config.json`; what is not understood is refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchinfer.host.files import read_object
from batchinfer.models.rope import Rope, yarn_attention_factor

if TYPE_CHECKING:  # formats unpack tensors: only who meets one waits for torch
    from batchinfer.formats.registry import Format

MOST = sys.float_info.max  # JSON has whole numbers beyond it
MAX_MESSAGE = 1000  # characters: a value that is refused may be of any size

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Fields that do not change what the model computes here.
_IGNORED = {
    "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "is_decoder", "label2id", "max_window_layers", "name_or_path", "pad_token_id",
    "torch_dtype", "transformers_version", "use_cache", "use_sliding_window", "return_dict", "task_specific_params",
    "tokenizer_class", "model_type", "problem_type", "finetuning_task", "prefix",
}  # fmt: skip
# Fields that change the result, and the one value that is supported.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "pretraining_tp": 1, "partial_rotary_factor": 1.0, "use_mrope": False}
_USED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "sliding_window", "layer_types", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "quantization_config",
}  # fmt: skip
# No model is near these; what follows from a larger one (tables, lists, shapes) would not fit memory.
_LARGEST = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 17, "intermediate_size": 1 << 19, "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10, "num_key_value_heads": 1 << 10, "head_dim": 1 << 10,
    "max_position_embeddings": 1 << 24, "original_max_position_embeddings": 1 << 24, "sliding_window": 1 << 24,
}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that shape the decoder; all positive, checked when read."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    rope: Rope
    windows: tuple[int | None, ...]  # by layer: how many positions a token sees, itself included; None is all
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norm: bool  # RMSNorm on each head of queries and keys
    dtype: str
    form: Format | None  # of weights that are stored quantized


def read_model_config(model: Path) -> ModelConfig:
    """The config of a checkpoint folder. A `ValueError` names the field, its value and what is supported."""
    path = model / "config.json"
    try:
        raw = read_object(path)
    except FileNotFoundError:
        raise ValueError(f"{model} has no config.json; a model is a folder in the Hugging Face layout") from None
    try:
        return parse_model_config(raw)
    except ValueError as error:
        raise ValueError(f"{model}/{error}"[:MAX_MESSAGE]) from None


def parse_model_config(raw: dict[str, Any]) -> ModelConfig:
    """As `read_model_config`, from the parsed JSON."""
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type is {family!r}; supported are {', '.join(ARCHITECTURES)}")
    named = raw.get("architectures") or [ARCHITECTURES[family]]
    if named != [ARCHITECTURES[family]]:
        raise ValueError(f"config.json: architectures is {named}; for {family} it must be {[ARCHITECTURES[family]]}")
    _refuse_unknown(raw)
    heads, hidden = _size(raw, "num_attention_heads"), _size(raw, "hidden_size")
    kv_heads = _size(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and hidden % heads and family != "qwen3":
        raise ValueError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    head_dim = _size(raw, "head_dim", 128 if family == "qwen3" else hidden // heads)
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim is {head_dim}; rotary embedding takes its numbers in pairs")
    positions, layers = _size(raw, "max_position_embeddings"), _size(raw, "num_hidden_layers")
    bias = _flag(raw, "attention_bias", False)
    return ModelConfig(
        family=family,
        vocab_size=_size(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(raw, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, head_dim, positions),
        windows=_windows(raw, family, layers),
        tied=_flag(raw, "tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or bias,
        output_bias=bias,
        mlp_bias=_flag(raw, "mlp_bias", False),
        head_norm=family == "qwen3",
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        form=_form(raw["quantization_config"]) if raw.get("quantization_config") else None,
    )


def _form(quantization: Any) -> Format:
    from batchinfer.formats.registry import checkpoint_format

    return checkpoint_format(quantization)


def _refuse_unknown(raw: dict[str, Any]) -> None:
    if "auto_map" in raw:
        raise ValueError("config.json: auto_map asks to run code from the checkpoint, which is never done")
    for key, value in raw.items():
        if key in _FIXED:
            if value is not None and value != _FIXED[key]:
                raise ValueError(f"config.json: {key} is {value!r}; supported is {_FIXED[key]!r}")
        elif key not in _USED | _IGNORED and not key.startswith("_") and value not in (None, False, {}, []):
            raise ValueError(
                f"config.json: {key} is {value!r}, a field that is not known and may change the result; "
                "remove it if it does not matter"
            )


def _number(raw: dict[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
        raise ValueError(f"config.json: {key} is {value!r}; it must be a positive number")
    return float(value)


def _size(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST[key]:
        raise ValueError(f"config.json: {key} is {value!r}; it must be a whole number from 1 to {_LARGEST[key]}")
    return value


def _flag(raw: dict[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}; it must be true or false")
    return default if value is None else value


def _rope(raw: dict[str, Any], head_dim: int, positions: int) -> Rope:
    """`rope_parameters` as newer checkpoints write it, or `rope_scaling` beside `rope_theta` as older ones do."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"config.json: rope scaling is {scaling!r}; it must be an object")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    known = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate",
        },
        "divided": {"divisors"},
    }  # fmt: skip
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"config.json: RoPE scaling {kind!r} is not supported; supported are {', '.join(known)}")
    for key in scaling.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"} - known[kind]:
        raise ValueError(f"config.json: RoPE scaling {kind!r} has a field {key!r} that is not known")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = _number(scaling if "rope_theta" in scaling else raw, "rope_theta", 10000.0)
    if kind == "default":
        return Rope("default", theta, head_dim)
    if kind == "divided":
        divisors = scaling.get("divisors")
        if (
            not isinstance(divisors, list)
            or len(divisors) != head_dim // 2
            or not all(isinstance(d, float) and 0 < d < float("inf") for d in divisors)
        ):
            raise ValueError(f"config.json: RoPE's divisors are {divisors!r}; it needs {head_dim // 2} positive ones")
        return Rope("divided", theta, head_dim, divisors=tuple(divisors))
    factor = _number(scaling, "factor", 0.0)
    original = _size(scaling, "original_max_position_embeddings", positions)
    if kind == "linear":
        return Rope("linear", theta, head_dim, factor)
    if kind == "llama3":
        low, high = _number(scaling, "low_freq_factor", 1.0), _number(scaling, "high_freq_factor", 4.0)
        return Rope("llama3", theta, head_dim, factor, original, low, high)
    scales = (_number(scaling, key, 1.0) if scaling.get(key) else None for key in ("mscale", "mscale_all_dim"))
    attention = _number(scaling, "attention_factor", yarn_attention_factor(factor, *scales))
    return Rope(
        "yarn",
        theta,
        head_dim,
        factor,
        original,
        beta_fast=_number(scaling, "beta_fast", 32.0),
        beta_slow=_number(scaling, "beta_slow", 1.0),
        truncate=_flag(scaling, "truncate", True),
        attention_factor=attention,
    )


def _windows(raw: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """Sliding windows by layer. Qwen has the field but uses it only if `use_sliding_window` says so."""
    window = raw.get("sliding_window")
    if family in ("qwen2", "qwen3") and not _flag(raw, "use_sliding_window", False):
        window = None
    window = None if family == "llama" or window is None else _size(raw, "sliding_window")
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
        if type(first) is not int:
            raise ValueError(f"config.json: max_window_layers is {first!r}; it must be a whole number")
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ValueError(f"config.json: layer_types must name full_attention or sliding_attention for {layers} layers")
    if "sliding_attention" in kinds and window is None:
        raise ValueError("config.json: layer_types has sliding_attention, but there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
