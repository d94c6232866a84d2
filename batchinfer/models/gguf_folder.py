"""Making a checkpoint folder in the Hugging Face layout from a GGUF model: config, tokenizer, and links to its files.

All code that reads checkpoints can then read the folder. This module does not import torch, because the parent process
of a job imports it.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from batchinfer.formats.gguf_file import TYPES
from batchinfer.formats.gguf_parts import GGUFParts, part_files, part_names
from batchinfer.models.gguf_tokenizer import end_of_text_ids, tokenizer_files

_WEIGHTS = "model.gguf"
FAMILIES = {"gemma3": "gemma3_text", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Entries that llama.cpp reads and that change the result, each with the one value that is supported.
_FIXED = {
    "attention.causal": True, "rope.scale_linear": 1.0, "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0,
}  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """Return the GGUF files in a checkpoint's folder, in the order of their parts: none if it has other weights."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    return sorted(folder.glob("model-?????-of-?????.gguf"))


def unpack_gguf(path: Path, folder: Path, tokenizer: bool = True) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and links to the GGUF files to `folder`.

    `path` is the model's file, or any of its files. Without `tokenizer`, its tokenizer is not read. Raises `ValueError`
    for a file that is damaged, or naming all that is not supported or missing.
    """
    paths = part_files(path)
    file = GGUFParts(paths)
    architecture = _architecture(file)
    refusals, files = [], {}
    try:
        files = tokenizer_files(file) if tokenizer else {}
    except ValueError as error:
        refusals.append(str(error))
    if file.unsupported:
        refusals.append(_types(file))
    if refusals:
        raise ValueError("; and ".join(refusals))
    files["config.json"] = _config(file, architecture)
    _refuse_other_models(file, architecture, files["config.json"])
    eos_ids = end_of_text_ids(file)
    files["generation_config.json"] = {"eos_token_id": eos_ids} if eos_ids else {}
    links = [_WEIGHTS] if len(paths) == 1 else part_names(f"model-00001-of-{len(paths):05}.gguf")
    folder.mkdir(parents=True, exist_ok=True)
    # Each file is moved there by a rename, because another job may be reading the same folder.
    with TemporaryDirectory(dir=folder) as scratch:
        for name, value in files.items():
            (Path(scratch) / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        for name, target in zip(links, paths, strict=True):
            (Path(scratch) / name).symlink_to(target.resolve())
        for name in (*files, *links):
            (Path(scratch) / name).replace(folder / name)


def _architecture(file: GGUFParts) -> str:
    architecture: str = _entry(file, "general.architecture", str)
    if architecture not in FAMILIES:
        raise ValueError(
            f"{file.path}: general.architecture is {_shown(architecture)}; supported are "
            f"{', '.join(FAMILIES)} (Mistral models say llama)"
        )
    return architecture


def _types(file: GGUFParts) -> str:
    """Say which tensors are of types that are not supported."""
    found = [
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} of type {kind} ({names[0]}{', ...' if names[1:] else ''})"
        for kind, names in sorted(file.unsupported.items())
    ]
    supported = ", ".join(name for name, _, _ in TYPES.values())
    return f"{file.path} has {', '.join(found)}; supported are {supported}: take another quantization of the model"


def _config(file: GGUFParts, architecture: str) -> dict[str, Any]:
    tensors = file.tensors
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight"):
        if name not in tensors:
            raise ValueError(f"{file.path} has no tensor {name}")

    def number(key: str, default: float | None = None) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{file.path}: {architecture}.{key} is {_shown(value)}; expected a number")
        return value

    heads = number("attention.head_count")
    window = file.metadata.get(f"{architecture}.attention.sliding_window")
    config: dict[str, Any] = {
        "model_type": "mistral" if architecture == "llama" and window else FAMILIES[architecture],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(file, architecture, number),
        "dtype": "float32" if all(t.type == "F32" for t in tensors.values()) else "bfloat16",
    }
    if f"{architecture}.attention.key_length" in file.metadata:
        config["head_dim"] = number("attention.key_length")
    if config["model_type"] == "mistral":
        config["sliding_window"] = window
    return config | _gemma3(file, config, window) if architecture == "gemma3" else config


def _gemma3(file: GGUFParts, config: dict[str, Any], window: Any) -> dict[str, Any]:
    """Return what config.json says of Gemma 3 beyond other families, and a file leaves to the architecture's name."""
    pattern = file.metadata.get("gemma3.attention.sliding_window_pattern", 6)
    if type(pattern) is not int:
        raise ValueError(
            f"{file.path}: gemma3.attention.sliding_window_pattern is {_shown(pattern)}; expected a number"
        )
    local = file.metadata.get("gemma3.rope.freq_base_swa", 10000.0)
    of_27b = config["num_hidden_layers"] == 62  # the one size whose queries are scaled by other than their head's size
    scalar = config["hidden_size"] // config["num_attention_heads"] if of_27b else config["head_dim"]
    return {
        "sliding_window": window,
        "sliding_window_pattern": pattern,
        "query_pre_attn_scalar": scalar,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": config["rope_parameters"],
        },
    }


def _refuse_other_models(file: GGUFParts, architecture: str, config: dict[str, Any]) -> None:
    """Raise `ValueError` for an entry that asks for another computation than that of `config`."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    sizes = {"attention.value_length": head_dim, "rope.dimension_count": head_dim}
    for key, supported in {**_FIXED, **sizes}.items():
        value = file.metadata.get(f"{architecture}.{key}", supported)
        if value != supported:
            raise ValueError(
                f"{file.path}: {architecture}.{key} is {_shown(value)}; supported is {supported}: take the model in "
                "the Hugging Face layout"
            )


def _rope(file: GGUFParts, architecture: str, number: Any) -> dict[str, Any]:
    """Return `rope_parameters`. GGUF files hold Llama 3.1's scaling as a tensor of divisors, others as entries."""
    theta = number("rope.freq_base", 1e6 if architecture == "gemma3" else 10000.0)
    if "rope_freqs.weight" in file.tensors:
        stored = file.tensors["rope_freqs.weight"]
        if stored.type != "F32":
            raise ValueError(f"{file.path}: tensor rope_freqs.weight is {stored.type}; expected F32")
        divisors = file.read(stored).view("<f4").tolist()
        return {"rope_type": "divided", "rope_theta": theta, "divisors": divisors}
    kind = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": kind, "rope_theta": theta, "factor": number("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = number("rope.scaling.original_context_length")
    return rope


def _entry(file: GGUFParts, key: str, kind: type) -> Any:
    value = file.metadata.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"{file.path}: {key} is {_shown(value)}; expected a {kind.__name__}")
    return value


def _shown(value: Any) -> str:
    """Return a value from the file as one short line, for a message."""
    return ascii(str(value)[:50])
