"""`ModelConfig`: the shape of a decoder, read from a checkpoint's `config.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batchinfer.errors import Refused
from batchinfer.host.files import read_object
from batchinfer.kernels.attention_shape import AttentionShape
from batchinfer.models.config_file import ConfigFile
from batchinfer.models.families import (
    arcee,
    cohere,
    cohere2,
    cwm,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    exaone_moe,
    flex_olmo,
    gemma,
    gemma2,
    gemma3_text,
    gemma4_text,
    gemma4_unified_text,
    glm,
    glm4,
    glm4_moe,
    gpt_neox,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    granitemoeshared,
    helium,
    hunyuan_v1_dense,
    hyperclovax,
    internlm3,
    iquestcoder,
    jais2,
    lfm2,
    lfm2_moe,
    llama,
    mellum,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    solar_open,
    stablelm,
    starcoder2,
    vaultgemma,
)
from batchinfer.models.feed_forward import Experts
from batchinfer.models.fused_experts import QWEN_3_5, FusedExperts
from batchinfer.models.known_fields import read_fields
from batchinfer.models.layer import Ends, Layer
from batchinfer.models.mixer import Attention, GatedDeltaNet, ShortConvolution
from batchinfer.models.tensors import Matrix, Norm
from batchinfer.models.wrappers import WRAPPERS, is_wrapper, text_fields

if TYPE_CHECKING:  # the formats import torch, which takes long: only a quantized checkpoint needs them
    from batchinfer.formats.registry import Format

MAX_MESSAGE = 1000  # characters of an error message, which quotes a value of any size


class Family(Protocol):
    """A model family: a module in `models/families/`."""

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]:
        """The names that `architectures` in config.json may have."""
        ...

    @property
    def DEFAULTS(self) -> Mapping[str, Any]:
        """The fields that only some families read, and fields with a default of this family's own."""
        ...

    @property
    def FIXED(self) -> Mapping[str, Any]:
        """Fields that would change the result, each with the one value that is supported."""
        ...

    def layers(self, config: ConfigFile) -> list[Layer]:
        """Describe the layers that `config.json` asks for.

        Raises `ValueError` naming a field, its value and what is supported.
        """
        ...

    def ends(self, config: ConfigFile) -> Ends:
        """Describe what is computed before the first layer and after the last one."""
        ...


# By `model_type`. Nothing is imported by a name that a checkpoint gives.
FAMILIES: dict[str, Family] = {
    "arcee": arcee,
    "cohere": cohere,
    "cohere2": cohere2,
    "cwm": cwm,
    "dots1": dots1,
    "ernie4_5": ernie4_5,
    "ernie4_5_moe": ernie4_5_moe,
    "exaone4": exaone4,
    "exaone_moe": exaone_moe,
    "flex_olmo": flex_olmo,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "gemma4_text": gemma4_text,
    "gemma4_unified_text": gemma4_unified_text,
    "glm": glm,
    "glm4": glm4,
    "glm4_moe": glm4_moe,
    "gpt_neox": gpt_neox,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "granitemoe": granitemoe,
    "granitemoehybrid": granitemoehybrid,
    "granitemoeshared": granitemoeshared,
    "helium": helium,
    "hunyuan_v1_dense": hunyuan_v1_dense,
    "hyperclovax": hyperclovax,
    "internlm3": internlm3,
    "iquestcoder": iquestcoder,
    "jais2": jais2,
    "lfm2": lfm2,
    "lfm2_moe": lfm2_moe,
    "llama": llama,
    "mellum": mellum,
    "minimax_m2": minimax_m2,
    "ministral": ministral,
    "ministral3": ministral3,
    "mistral": mistral,
    "mixtral": mixtral,
    "nemotron": nemotron,
    "olmo": olmo,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmoe": olmoe,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_5_moe_text": qwen3_5_moe_text,
    "qwen3_5_text": qwen3_5_text,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "seed_oss": seed_oss,
    "smollm3": smollm3,
    "solar_open": solar_open,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
    "vaultgemma": vaultgemma,
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, layers, final norm and output head. All sizes were checked to be positive."""

    embedding: Matrix  # [V, D]
    layers: tuple[Layer, ...]
    ends: Ends
    head: Matrix  # [V, D]
    tied: bool  # whether the head is the embedding's matrix
    max_positions: int
    dtype: str
    form: Format | None  # the format of quantized weights; None for floating-point weights
    wrapped: bool = False  # whether the checkpoint holds more than the language model
    notes: tuple[str, ...] = ()  # for the report: what in config.json is not followed

    @property
    def vocab_size(self) -> int:
        """Vocabulary size, V."""
        return self.embedding.rows

    @property
    def hidden_size(self) -> int:
        """Hidden size, D: the width of the residual stream."""
        return self.embedding.columns

    @property
    def norm(self) -> Norm:
        """The norm after the last layer."""
        return self.ends.norm

    @property
    def norm_eps(self) -> float:
        """The number that all norms add to the mean square."""
        return self.ends.norm_eps

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Attention of each layer that has it; at least one has."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, Attention))

    @property
    def attention_shapes(self) -> tuple[AttentionShape, ...]:
        """The shapes of attention that layers have, each once."""
        return tuple(dict.fromkeys(attention.shape for attention in self.attentions))

    @property
    def storing(self) -> tuple[Attention, ...]:
        """Attention of the layers that store keys and values; the others read theirs."""
        return tuple(attention for attention in self.attentions if attention.source is None)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Window of each layer with attention: how many positions a token sees, its own included; None: all."""
        return tuple(a.window for a in self.attentions)

    @property
    def recurrent(self) -> tuple[ShortConvolution | GatedDeltaNet, ...]:
        """The mixer of each layer that keeps a state."""
        return tuple(layer.mixer for layer in self.layers if not isinstance(layer.mixer, Attention))

    @property
    def fused_experts(self) -> FusedExperts:
        """How the checkpoint may hold experts, other than by modules."""
        found = (layer.feed_forward.fused for layer in self.layers if isinstance(layer.feed_forward, Experts))
        return next(found, QWEN_3_5)

    def refuse_on_gpu(self) -> None:
        """Raise `ValueError` if the layers, or the format of their weights, run on a CPU alone."""
        if self.recurrent:
            kinds = {ShortConvolution: "short convolutions", GatedDeltaNet: "gated DeltaNets"}
            found = dict.fromkeys(kinds[type(mixer)] for mixer in self.recurrent)
            raise ValueError(
                f"the model has layers of {' and '.join(found)}, for which there is no kernel on a GPU yet: take "
                "--device cpu, or a model whose layers are all of attention"
            )
        if self.form is not None:
            from batchinfer.formats.registry import refuse_on_gpu

            refuse_on_gpu(self.form)

    def within(self, positions: int) -> ModelConfig:
        """Return the config for sequences of at most so many positions, on which LongRoPE depends."""

        def within(layer: Layer) -> Layer:
            a = layer.mixer
            return (
                replace(layer, mixer=replace(a, rope=a.rope.within(positions))) if isinstance(a, Attention) else layer
            )

        layers = tuple(map(within, self.layers))
        if layers == self.layers:
            return self
        original = self.attentions[0].rope.original_positions
        note = (
            f"LongRoPE: rows may have {positions} tokens, more than the {original} that the model "
            "was first trained with, so all rows take its long factors; --max-model-len decides that"
        )
        return replace(self, layers=layers, notes=(*self.notes, note))

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of each tensor in a floating-point checkpoint."""
        yield f"{self.embedding.name}.weight", (self.vocab_size, self.hidden_size)
        if (p := self.ends.per_layer) is not None:
            yield f"{p.table.name}.weight", (p.table.rows, p.table.columns)
            yield f"{p.projection.name}.weight", (p.projection.rows, p.projection.columns)
            yield f"{p.norm.name}.weight", (p.norm.size,)
        for layer in self.layers:
            yield from layer.tensors()
        yield from self.norm.tensors()
        if not self.tied:
            yield f"{self.head.name}.weight", (self.vocab_size, self.hidden_size)
        if self.head.bias:
            yield f"{self.head.name}.bias", (self.vocab_size,)


def read_model_config(model: Path, quantization: bool = True) -> ModelConfig:
    """Read the config in a checkpoint's folder; without `quantization`, as if its weights were in floating point.

    Raises `ValueError` naming a field, its value and what is supported.
    """
    path = model / "config.json"
    if (model / "adapter_config.json").is_file():
        raise ValueError(
            f"{model} holds an adapter (adapter_config.json), which is never applied: merge it into its model with "
            "merge_and_unload of peft, and take the folder that is saved then"
        )
    try:
        raw = read_object(path)
    except FileNotFoundError:
        raise ValueError(f"{model} has no config.json; a model is a folder in the Hugging Face layout") from None
    try:
        return parse_model_config(raw if quantization else {**raw, "quantization_config": None})
    except ValueError as error:
        raise ValueError(f"{model}/{error}"[:MAX_MESSAGE]) from None


def read_shape(model: Path) -> ModelConfig:
    """Read the config without its quantization, and without torch. Raises `Refused` for a model that cannot run."""
    try:
        return read_model_config(model, quantization=False)
    except ValueError as error:
        raise Refused(f"model {error}") from error


def parse_model_config(raw: dict[str, Any]) -> ModelConfig:
    """Make the config from parsed JSON. Raises `ValueError` as `read_model_config` does."""
    wrapped, raw = is_wrapper(raw), text_fields(raw)
    family = _family(raw)
    config, unknown = read_fields(raw, family.DEFAULTS, family.FIXED)
    layers, ends = tuple(family.layers(config)), family.ends(config)
    vocab, hidden, positions = (config.size(key) for key in ("vocab_size", "hidden_size", "max_position_embeddings"))
    quantization = config.get("quantization_config")
    ends = family.ends(config)
    notes = []
    if wrapped:
        notes.append("the checkpoint wraps a language model: what reads images is left aside")
    if unknown:
        notes.append(f"fields of config.json that are not read, as in transformers: {', '.join(unknown)}")
    return ModelConfig(
        embedding=Matrix(ends.embedding, vocab, hidden),
        layers=layers,
        ends=ends,
        head=Matrix(ends.head, vocab, hidden, ends.head_bias),
        tied=config.flag("tie_word_embeddings") if ends.tied is None else ends.tied,
        max_positions=positions,
        dtype=stored_dtype(raw),
        form=_form(quantization) if quantization else None,
        wrapped=wrapped,
        notes=tuple(notes),
    )


def language_model_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a language model by itself: of what a wrapper holds, if `config.json` is that of one."""
    fields = text_fields(raw)
    return fields if fields is raw else {**fields, "architectures": [_family(fields).ARCHITECTURES[0]]}


def stored_dtype(raw: Mapping[str, Any]) -> str:
    """The type that a checkpoint's tensors are in, as its config.json names it."""
    raw = text_fields(dict(raw))
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")


def _family(raw: dict[str, Any]) -> Family:
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        text = raw.get("text_config")
        inside = f", which wraps a language model of type {text.get('model_type')!r}" if isinstance(text, dict) else ""
        supported = ", ".join(sorted({*FAMILIES, *WRAPPERS}))
        raise ValueError(f"config.json: model_type is {name!r}{inside}; supported are {supported}")
    family = FAMILIES[name]
    named = raw.get("architectures")
    if named and named not in [[architecture] for architecture in family.ARCHITECTURES]:
        expected = " or ".join(f"['{architecture}']" for architecture in family.ARCHITECTURES)
        raise ValueError(f"config.json: architectures is {named}; for {name} it must be {expected}")
    return family


def _form(quantization: Any) -> Format:
    from batchinfer.formats.registry import checkpoint_format

    return checkpoint_format(quantization)
