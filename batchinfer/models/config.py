"""`ModelConfig`: the shape of a decoder, read from a checkpoint's `config.json`. Unknown fields are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batchinfer.host.files import read_object
from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import cwm, internlm3, iquestcoder, llama, ministral, mistral, qwen2, qwen3
from batchinfer.models.layer import Attention, Layer, Matrix, Norm
from batchinfer.models.rope import Rope, read_rope

if TYPE_CHECKING:  # the formats import torch, which takes long: only a quantized checkpoint needs them
    from batchinfer.formats.registry import Format

MAX_MESSAGE = 1000  # characters of an error message, which quotes a value of any size

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


class Family(Protocol):
    """A model family: a module in `models/families/`."""

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]:
        """The names that `architectures` in config.json may have."""
        ...

    def layers(self, config: ConfigFile) -> list[Layer]:
        """Describe the layers that `config.json` asks for.

        Raises `ValueError` naming a field, its value and what is supported.
        """
        ...


# By `model_type`. Nothing is imported by a name that a checkpoint gives.
FAMILIES: dict[str, Family] = {
    "cwm": cwm,
    "internlm3": internlm3,
    "iquestcoder": iquestcoder,
    "llama": llama,
    "ministral": ministral,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, layers, final norm and output head. All sizes were checked to be positive."""

    embedding: Matrix  # [V, D]
    layers: tuple[Layer, ...]
    norm: Norm
    head: Matrix  # [V, D]
    tied: bool  # whether the head is the embedding's matrix
    max_positions: int
    norm_eps: float
    rope: Rope
    dtype: str
    form: Format | None  # the format of quantized weights; None for floating-point weights

    @property
    def vocab_size(self) -> int:
        """Vocabulary size, V."""
        return self.embedding.rows

    @property
    def hidden_size(self) -> int:
        """Hidden size, D: the width of the residual stream."""
        return self.embedding.columns

    @property
    def attention(self) -> Attention:
        """Attention of the first layer. All layers have the same heads; only their windows differ."""
        return self.layers[0].attention

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Attention window of each layer: the number of positions that a token sees, its own included; None: all."""
        return tuple(layer.attention.window for layer in self.layers)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each tensor in a floating-point checkpoint."""
        yield f"{self.embedding.name}.weight", (self.vocab_size, self.hidden_size)
        for layer in self.layers:
            yield from layer.tensors()
        yield f"{self.norm.name}.weight", (self.norm.size,)
        if not self.tied:
            yield f"{self.head.name}.weight", (self.vocab_size, self.hidden_size)


def read_model_config(model: Path) -> ModelConfig:
    """Read the config in a checkpoint's folder.

    Raises `ValueError` naming a field, its value and what is supported.
    """
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
    """Make the config from parsed JSON. Raises `ValueError` as `read_model_config` does."""
    family = _family(raw)
    _refuse_unknown(raw)
    config = ConfigFile(raw)
    layers = tuple(family.layers(config))
    vocab, hidden, positions = (config.size(key) for key in ("vocab_size", "hidden_size", "max_position_embeddings"))
    return ModelConfig(
        embedding=Matrix("model.embed_tokens", vocab, hidden),
        layers=layers,
        norm=Norm("model.norm", hidden),
        head=Matrix("lm_head", vocab, hidden),
        tied=config.flag("tie_word_embeddings"),
        max_positions=positions,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config, layers[0].attention.head_dim, positions),
        dtype=stored_dtype(raw),
        form=_form(raw["quantization_config"]) if raw.get("quantization_config") else None,
    )


def stored_dtype(raw: Mapping[str, Any]) -> str:
    """The type that a checkpoint's tensors are in, as its config.json names it."""
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")


def _family(raw: dict[str, Any]) -> Family:
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"config.json: model_type is {name!r}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    named = raw.get("architectures")
    if named and named not in [[architecture] for architecture in family.ARCHITECTURES]:
        expected = " or ".join(f"['{architecture}']" for architecture in family.ARCHITECTURES)
        raise ValueError(f"config.json: architectures is {named}; for {name} it must be {expected}")
    return family


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
