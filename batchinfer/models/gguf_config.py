"""Making a checkpoint's `config.json` from the entries of a GGUF model. This module does not import torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchinfer.formats.gguf_parts import GGUFParts

# Entries that llama.cpp reads and that change the result, each with the one value that is supported.
_FIXED = {
    "attention.causal": True, "rope.scale_linear": 1.0, "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`."""

    family: str
    fields: Callable[["Entries", dict[str, Any]], dict[str, Any]]  # those of config.json that not every family has
    interleaved: bool = False  # whether rows of q and k are stored in the order in which neighbours are paired
    theta: float = 10000.0  # of rotary embedding, where the file does not say
    by_layer: bool = False  # whether layers may differ in their sizes


@dataclass(frozen=True)
class Entries:
    """The entries of a model's file that describe its shape. Methods raise `ValueError` naming an entry."""

    file: GGUFParts
    name: str

    @classmethod
    def of(cls, file: GGUFParts) -> "Entries":
        """Take them from a file. Raises `ValueError` if its architecture is not supported."""
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise ValueError(f"{file.path}: general.architecture is {_shown(name)}; expected a str")
        if name not in ARCHITECTURES:
            raise ValueError(
                f"{file.path}: general.architecture is {_shown(name)}; supported are {', '.join(ARCHITECTURES)} "
                "(Mistral models say llama)"
            )
        return cls(file, name)

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry of the architecture, unchecked."""
        return self.file.metadata.get(f"{self.name}.{key}", default)

    def number(self, key: str, default: float | None = None) -> Any:
        """Return an entry of the architecture, a number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.file.path}: {self.name}.{key} is {_shown(value)}; expected a number")
        return value

    def by_layer(self, key: str, layers: int, default: float | None = None) -> list[Any]:
        """Return an entry of the architecture that has a number for each layer, or one for all."""
        value = self.get(key, default)
        if not isinstance(value, np.ndarray):
            return [self.number(key, default)] * layers
        if len(value) != layers:
            raise ValueError(
                f"{self.file.path}: {self.name}.{key} has {len(value)} numbers; block_count asks for {layers}"
            )
        numbers: list[Any] = value.tolist()
        return numbers

    def config(self) -> dict[str, Any]:
        """Return `config.json`. Raises `ValueError` for an entry that asks for another computation."""
        architecture, tensors = ARCHITECTURES[self.name], self.file.tensors
        for name in ("token_embd.weight", "blk.0.ffn_gate.weight"):
            if name not in tensors:
                raise ValueError(f"{self.file.path} has no tensor {name}")
        heads, layers = self.number("attention.head_count"), self.number("block_count")

        def size(key: str, default: float | None = None) -> Any:
            return self.by_layer(key, layers, default)[0] if architecture.by_layer else self.number(key, default)

        config: dict[str, Any] = {
            "model_type": architecture.family,
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "hidden_size": self.number("embedding_length"),
            "intermediate_size": size("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": size("attention.head_count_kv", heads),
            "max_position_embeddings": self.number("context_length"),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "rope_parameters": self._rope(architecture.theta),
            "dtype": "float32" if all(t.type == "F32" for t in tensors.values()) else "bfloat16",
        }
        if self.get("attention.key_length") is not None:
            config["head_dim"] = self.number("attention.key_length")
        self._refuse_other_models(head_dim(config))
        return config | architecture.fields(self, config)

    def _rope(self, theta: float) -> dict[str, Any]:
        """Return `rope_parameters`. Files hold Llama 3.1's scaling as a tensor of divisors, others as entries."""
        theta = self.number("rope.freq_base", theta)
        if "rope_freqs.weight" in self.file.tensors:
            stored = self.file.tensors["rope_freqs.weight"]
            if stored.type != "F32":
                raise ValueError(f"{self.file.path}: tensor rope_freqs.weight is {stored.type}; expected F32")
            divisors = self.file.read(stored).view("<f4").tolist()
            return {"rope_type": "divided", "rope_theta": theta, "divisors": divisors}
        kind = self.get("rope.scaling.type", "none")
        if kind == "none":
            return {"rope_type": "default", "rope_theta": theta}
        rope = {"rope_type": kind, "rope_theta": theta, "factor": self.number("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self.number("rope.scaling.original_context_length")
        return rope

    def _refuse_other_models(self, size: int) -> None:
        """Raise `ValueError` for an entry that asks for another computation; `size` is that of a head."""
        self.refuse_others(_FIXED | {"attention.value_length": size, "rope.dimension_count": size})

    def refuse_others(self, fixed: Mapping[str, Any]) -> None:
        """Raise `ValueError` for an entry that has another value than the one that is supported."""
        for key, supported in fixed.items():
            if (value := self.get(key, supported)) != supported:
                raise ValueError(
                    f"{self.file.path}: {self.name}.{key} is {_shown(value)}; supported is {supported}: take the model "
                    "in the Hugging Face layout"
                )


def head_dim(config: dict[str, Any]) -> int:
    """Return the size of a head."""
    found: int = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return found


def _none(entries: Entries, config: dict[str, Any]) -> dict[str, Any]:
    return {}


def _llama(entries: Entries, config: dict[str, Any]) -> dict[str, Any]:
    window = entries.get("attention.sliding_window")
    return {"model_type": "mistral", "sliding_window": window} if window else {}


def _granite(entries: Entries, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "attention_multiplier": entries.number("attention.scale", head_dim(config) ** -0.5),
        "embedding_multiplier": entries.number("embedding_scale", 1.0),
        "residual_multiplier": entries.number("residual_scale", 1.0),
        "logits_scaling": entries.number("logit_scale", 1.0),
    }


def _gemma2(entries: Entries, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": entries.number("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _scaled_by(config, layers_of_27b=46),
        "attn_logit_softcapping": entries.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": entries.number("final_logit_softcapping", 30.0),
    }


def _gemma3(entries: Entries, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_gemma3_windows(entries, config),
        "sliding_window_pattern": entries.number("attention.sliding_window_pattern", 6),
        "query_pre_attn_scalar": _scaled_by(config, layers_of_27b=62),
    }


def _gemma3_windows(entries: Entries, config: dict[str, Any]) -> dict[str, Any]:
    """Return the window, and the rotary embedding of layers with and without it."""
    local = entries.number("rope.freq_base_swa", 10000.0)
    return {
        "sliding_window": entries.number("attention.sliding_window"),
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": config["rope_parameters"],
        },
    }


def _gemma4(entries: Entries, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Gemma 4. Entries without `swa` in their names are those of layers without a window."""
    layers, heads, tensors = config["num_hidden_layers"], config["num_attention_heads"], entries.file.tensors
    shared = entries.number("attention.shared_kv_layers", 0)
    inner = entries.by_layer("feed_forward_length", layers)
    usual, wide = [inner[0]] * layers, [*[inner[0]] * (layers - shared), *[2 * inner[0]] * shared]
    if inner not in (usual, wide):
        raise ValueError(
            f"{entries.file.path}: gemma4.feed_forward_length is {_shown(inner)}; supported is one size, or twice that "
            f"in the last {shared} layers, which share keys"
        )
    windows = entries.by_layer("attention.sliding_window_pattern", layers)
    size, size_in_windows = head_dim(config), entries.number("attention.key_length_swa", head_dim(config))
    entries.refuse_others(dict.fromkeys(("attention.value_length_swa", "rope.dimension_count_swa"), size_in_windows))
    sizes = zip(windows, entries.by_layer("attention.head_count_kv", layers, heads), strict=True)
    own = [{"head_dim": size_in_windows if w else size, "num_key_value_heads": kv} for w, kv in sizes]
    per_layer = tensors.get("per_layer_token_embd.weight")
    storing = [i for i in range(layers - shared) if not windows[i]]
    return {
        **_gemma3_windows(entries, config),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        "per_layer_config": {str(i): sizes for i, sizes in enumerate(own)},
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": inner != usual,
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in tensors for i in storing),
        "hidden_size_per_layer_input": entries.number("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": None if per_layer is None else per_layer.shape[0],
        "final_logit_softcapping": entries.get("final_logit_softcapping"),
        "enable_moe_block": bool(entries.get("expert_count")),
    }


def _scaled_by(config: dict[str, Any], layers_of_27b: int) -> int:
    """Return what scores are divided by the root of: a head's size, but for Gemma's models of 27B."""
    if config["num_hidden_layers"] == layers_of_27b:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return head_dim(config)


def _shown(value: Any) -> str:
    """Return a value from the file as one short line, for a message."""
    return ascii(str(value)[:50])


ARCHITECTURES = {
    "gemma": Architecture("gemma", _none),
    "gemma2": Architecture("gemma2", _gemma2),
    "gemma3": Architecture("gemma3_text", _gemma3, theta=1e6),
    "gemma4": Architecture("gemma4_text", _gemma4, theta=1e6, by_layer=True),
    "granite": Architecture("granite", _granite, interleaved=True),
    "llama": Architecture("llama", _llama, interleaved=True),
    "qwen2": Architecture("qwen2", _none),
    "qwen2vl": Architecture("qwen2", _none),
    "qwen3": Architecture("qwen3", _none),
    "qwen3vl": Architecture("qwen3", _none),
    "smollm3": Architecture("smollm3", _none, interleaved=True),
}
"""The architectures by their names. The language models of Qwen's vision models are read for text."""
